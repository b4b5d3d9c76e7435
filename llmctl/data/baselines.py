"""What can be scored on rows without looking at their context; a model that has learned something does better."""

from __future__ import annotations

from typing import Any

import numpy as np

CHUNK = 256
"""Rows built at a time."""


def guesses(rows: Any, limit: int) -> dict[str, float]:
    """Scores of the best constant answers to the first `limit` rows, judged on these rows themselves.

    Returns:
        baseline_accuracy: of always saying the most frequent target; baseline_loss: nats a target of saying how
        frequent each is; baseline_next_sentence_accuracy, where rows ask for it: of always giving one answer.
    """
    counts, labels = np.zeros(1, np.int64), np.zeros(2, np.int64)
    last = min(limit, len(rows))
    for start in range(0, last, CHUNK):
        batch = rows.batch(np.arange(start, min(start + CHUNK, last)))
        found = np.bincount(batch["targets"][batch["weights"] > 0])
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
        if "next_label" in batch:
            labels += np.bincount(batch["next_label"][batch["next_label"] >= 0], minlength=2)
    p = counts[counts > 0] / max(1, counts.sum())
    out = {"baseline_accuracy": float(p.max(initial=0)), "baseline_loss": float(-(p * np.log(p)).sum())}
    return out | ({"baseline_next_sentence_accuracy": float(labels.max() / labels.sum())} if labels.sum() else {})


def describe(found: dict[str, float]) -> str:
    """The baselines in words."""
    text = f"one scores accuracy {found['baseline_accuracy']:.2%} and loss {found['baseline_loss']:.4g}"
    pair = found.get("baseline_next_sentence_accuracy")
    return text if pair is None else f"{text}, next sentence {pair:.2%}"

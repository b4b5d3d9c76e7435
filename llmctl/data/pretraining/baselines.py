"""What can be scored on rows without looking at their context; a model that has learned something does better."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

CHUNK = 256
"""Rows built at a time."""


def guesses(rows: Any, limit: int, sentinels: Sequence[int] = ()) -> dict[str, float]:
    """Scores of the best constant answers to the first `limit` rows, judged on these rows themselves.

    Args:
        rows: as `llmctl.data.prefetch.Rows`.
        limit: rows to look at.
        sentinels: those of span corruption. Whoever writes spans knows their form without reading a text: a sentinel
            comes first, then a word, and the next sentinel is the next of the list. So an answer may depend on what
            was just written (nothing, a sentinel or a word), and sentinels count as one.

    Returns:
        baseline_accuracy: of always saying the most frequent target; baseline_loss: nats a target of saying how
        frequent each is; baseline_next_sentence_accuracy, where rows ask for it: of always giving one answer.
    """
    found, labels = collections.Counter[tuple[int, int]](), np.zeros(2, np.int64)
    last = min(limit, len(rows))
    for start in range(0, last, CHUNK):
        batch = rows.batch(np.arange(start, min(start + CHUNK, last)))
        asked = batch["weights"] > 0
        targets, after = batch["targets"][asked], np.zeros(asked.sum(), np.int64)
        if sentinels:
            targets = np.where(np.isin(targets, sentinels), sentinels[0], targets)
            begins = batch["positions"][asked] == 0
            after = np.where(begins, 0, np.where(np.isin(batch["tokens"][asked], sentinels), 1, 2))
        pairs, counts = np.unique(np.stack([after, targets]), axis=1, return_counts=True)
        found.update(dict(zip(map(tuple, pairs.T.tolist()), counts.tolist(), strict=True)))
        if "next_label" in batch:
            labels += np.bincount(batch["next_label"][batch["next_label"] >= 0], minlength=2)
    out = {"baseline_accuracy": 0.0, "baseline_loss": 0.0}
    for case in {after for after, _ in found}:
        n = np.array([count for (after, _), count in found.items() if after == case])
        out["baseline_accuracy"] += float(n.max() / found.total())
        out["baseline_loss"] -= float((n * np.log(n / n.sum())).sum() / found.total())
    return out | ({"baseline_next_sentence_accuracy": float(labels.max() / labels.sum())} if labels.sum() else {})


def describe(found: dict[str, float]) -> str:
    """The baselines in words."""
    text = f"one scores accuracy {found['baseline_accuracy']:.2%} and loss {found['baseline_loss']:.4g}"
    pair = found.get("baseline_next_sentence_accuracy")
    return text if pair is None else f"{text}, next sentence {pair:.2%}"

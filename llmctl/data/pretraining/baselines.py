"""Compute the scores of predictions that do not use the context. A trained model should have better scores."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

CHUNK = 256
"""Number of rows to build at a time, to limit memory."""


def constant_scores(rows: Any, limit: int, sentinels: Sequence[int] = ()) -> dict[str, float]:
    """Find the best constant predictions for the first `limit` rows, and return their scores on the same rows.

    Args:
        rows: Training rows, as `llmctl.data.device_batches.Rows`.
        limit: Maximum number of rows to read.
        sentinels: Sentinel ids of span corruption; empty for other objectives. Sentinels always have the same order in
            the targets, so sentinels are trivial to predict. All sentinels therefore count as one token. A prediction
            may depend on the type of the previous target: no target, a sentinel, or an ordinary token.

    Returns:
        baseline_accuracy: Accuracy if the most frequent target is always predicted.
        baseline_loss: Cross-entropy in nats per target if the predicted probability of each target is its relative
            frequency.
        baseline_next_sentence_accuracy: Accuracy if the most frequent next-sentence label is always predicted; only for
            rows with such labels.
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
    """Format the baseline scores for a log line."""
    text = f"accuracy {found['baseline_accuracy']:.2%}, loss {found['baseline_loss']:.4g}"
    pair = found.get("baseline_next_sentence_accuracy")
    return text if pair is None else f"{text}, next sentence {pair:.2%}"

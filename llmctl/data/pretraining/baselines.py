"""Baselines without context: scores of constant predictions, which a model that learns must exceed."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

CHUNK = 256
"""Number of rows built at a time."""


def guesses(rows: Any, limit: int, sentinels: Sequence[int] = ()) -> dict[str, float]:
    """Return the scores of the best constant predictions on the first `limit` rows, fitted on these rows.

    Args:
      rows: training rows, as `llmctl.data.device_batches.Rows`.
      limit: number of rows to read.
      sentinels: sentinels of span corruption; empty for other objectives. The form of the targets is known without
        reading the text: a sentinel comes first, then a word, and sentinels are numbered in order. The baseline
        therefore predicts sentinels exactly: all count as one token. Its prediction may depend on the previous target
        (none, a sentinel or a word).

    Returns:
      baseline_accuracy: accuracy if the most frequent target is always predicted. baseline_loss: nats per target if
        target frequencies are predicted. baseline_next_sentence_accuracy: accuracy if one label is always predicted;
        only if rows have pairs.
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
    """Format the baselines for a log line."""
    text = f"accuracy {found['baseline_accuracy']:.2%}, loss {found['baseline_loss']:.4g}"
    pair = found.get("baseline_next_sentence_accuracy")
    return text if pair is None else f"{text}, next sentence {pair:.2%}"

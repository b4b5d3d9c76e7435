"""Measure the fraction of padding in training rows, and write a log line if the fraction is large."""

from __future__ import annotations

from typing import Any

import numpy as np

SAMPLE = 256
"""Maximum number of rows to measure. The rows are evenly spaced over the first epoch."""
REPORTED_FRACTION = 0.25
"""Fraction of padding above which a log line is written."""


def lengths(rows: Any) -> dict[str, tuple[np.ndarray, int]]:
    """Count the tokens of up to `SAMPLE` rows, without padding.

    Returns:
        {name of an array of segment ids, which are 0 at padding: (number of tokens in each sampled row [N], row
        length)}. Rows for an encoder-decoder, and rows of text pairs, have two such arrays.
    """
    rows = getattr(rows, "bare", rows)  # outputs of a teacher may be stored for some rows only
    last = min(len(rows), getattr(rows, "total", None) or len(rows))  # `total` may be less than an epoch
    some = np.unique(np.linspace(0, last - 1, min(SAMPLE, last)).astype(np.int64))
    batch = rows.batch(some)
    return {
        name: ((a > 0).sum(axis=1), a.shape[1])
        for name, a in batch.items()
        if name.endswith("segments") and np.ndim(a) == 2
    }


def describe(rows: Any) -> list[str]:
    """Return a list with one log line that recommends a shorter `seq_len`, or [] if there is no need.

    The log line is written under two conditions. More than a quarter of the positions is padding. A shorter `seq_len`
    truncates at most 5 % of the rows. The log line contains the 95th percentile and the maximum of the row lengths.
    """
    found = list(lengths(rows).values())
    if not found:
        return []
    filled, positions = (sum(int(np.sum(n)) for n, _ in found), sum(len(n) * width for n, width in found))
    share, longest = 1 - filled / positions, max(int(n.max()) for n, _ in found)
    if share <= REPORTED_FRACTION:
        return []
    usual = max(int(np.ceil(np.percentile(n, 95))) for n, _ in found)
    room = max(width for _, width in found)
    if usual >= room:
        return []
    most = f"95% of the rows have at most {usual} tokens, the longest of the sample {longest}"
    shorter = longest if longest < room else usual
    return [f"{share:.0%} of the positions are padding: {most}; train.seq_len = {shorter} is faster"]

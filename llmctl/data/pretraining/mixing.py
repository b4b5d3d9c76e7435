"""Mix rows of several sources in proportion to their weights.

The mixture is divided into blocks of `BLOCK` rows. The number of a source's rows per block is constant until a source
is exhausted. A source is exhausted when all rows of its maximum number of epochs are used.

Shapes: S sources, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.config.errors import RequestError
from llmctl.data.pretraining.next_sentence import PairRows
from llmctl.data.pretraining.packing import Batch, PackedRows
from llmctl.data.shuffle import permutation

BLOCK = 1024
"""Number of rows per block of a mixture. In each block, every source has at least one row. The number of a source's
rows is proportional to its weight, up to rounding."""


@dataclass(frozen=True)
class Phase:
    """Describe a phase of a mixture: consecutive rows during which no source is exhausted.

    A mixture is divided into blocks of `BLOCK` rows. The number of a source's rows per block is constant within a
    phase. A source is exhausted when all rows of its allowed epochs are used. The next phase then begins without this
    source.
    """

    start: int
    """Number of the phase's first row in the mixture."""
    blocks: float
    """Number of blocks in this phase; infinite if this is the last phase and its sources have unlimited epochs."""
    counts: np.ndarray
    """Number of rows of each source per block, int64 [S]."""
    done: np.ndarray
    """Number of rows of each source in all earlier phases, int64 [S]."""


class MixedRows:
    """Mix rows of S sources in proportion to their weights.

    The mixture consists of blocks of `BLOCK` rows. Each block contains rows of every source, in random order. Row i
    depends only on the sources, the weights, the epochs, the seed and i.

    A source is exhausted after its maximum number of epochs. Rows of the other sources then take its place. `total` is
    the number of rows until all sources are exhausted. Later rows raise RequestError. If the epochs of a source are
    unlimited, `total` is None.

    Args:
        sources: Rows of each source.
        weights: Relative weight of each source.
        epochs: Maximum number of epochs of each source, 0 if unlimited; all unlimited by default.
        seed: Seed of the shuffle.
    """

    def __init__(
        self,
        sources: Sequence[PackedRows | PairRows],
        weights: Sequence[float],
        epochs: Sequence[float] = (),
        seed: int = 0,
    ):
        self._sources, self._seed = sources, seed
        limits = [
            np.inf if not e else max(1, round(e * len(s)))
            for e, s in zip(epochs or [0] * len(sources), sources, strict=True)
        ]
        self._phases = phases(np.array(weights, float), np.array(limits))
        last = self._phases[-1]
        end = last.start + last.blocks * last.counts.sum()
        self.total = None if np.isinf(end) else int(end)
        self._starts = np.array([p.start for p in self._phases])
        self.tokens = sum(s.tokens for s in sources)
        """Number of tokens in one epoch, summed over the sources."""
        self.waste = float(np.average([s.waste for s in sources], weights=weights))
        """Fraction of positions that are padding: the average over the sources, weighted as in the mixture."""
        self.labelled = float(np.average([getattr(s, "labelled", 0.0) for s in sources], weights=weights))
        """Fraction of rows with a next-sentence label: the average over the sources, weighted as in the mixture."""

    def __len__(self) -> int:
        """Return the number of rows in one epoch, summed over the sources."""
        return sum(map(len, self._sources))

    def __getitem__(self, i: int) -> Batch:
        if i < 0:
            raise IndexError(i)
        return {name: values[0] for name, values in self.batch(np.array([i])).items()}

    def batch(self, rows_B: np.ndarray) -> Batch:
        """Return the rows with the numbers `rows_B` (any >= 0) as arrays [B, ...]."""
        source_B, index_B = self.locate(rows_B)
        order_B = np.argsort(source_B, kind="stable")
        parts = [self._sources[s].batch(index_B[source_B == s]) for s in np.unique(source_B)]
        back_B = np.argsort(order_B)
        return {name: np.concatenate([part[name] for part in parts])[back_B] for name in parts[0]}

    def locate(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each row number, the index of its source and the row number in that source, int64 [B] each."""
        if self.total is not None and rows_B.max() >= self.total:
            raise RequestError(f"the sources' epochs are used up after {self.total} rows; more epochs, or fewer steps")
        phase_B = np.searchsorted(self._starts, rows_B, "right") - 1
        width_B = np.array([p.counts.sum() for p in self._phases])[phase_B]
        block_B, slot_B = np.divmod(rows_B - self._starts[phase_B], width_B)
        source_B, index_B = np.empty_like(rows_B), np.empty_like(rows_B)
        for phase, block in np.unique(np.stack([phase_B, block_B]), axis=1).T:
            here_B = (phase_B == phase) & (block_B == block)
            counts, done = self._phases[phase].counts, self._phases[phase].done
            members = np.repeat(np.arange(len(counts)), counts)
            # The index of the block's first row is unique over all phases. It serves as the epoch of the permutation.
            first = int(self._starts[phase] + block * counts.sum())
            members = members[permutation(len(members), self._seed, first)]
            # Index of each slot among the slots of its source.
            rank = np.empty(len(members), np.int64)
            for s in range(len(counts)):
                rank[members == s] = np.arange(counts[s])
            chosen = members[slot_B[here_B]]
            source_B[here_B] = chosen
            index_B[here_B] = done[chosen] + block * counts[chosen] + rank[slot_B[here_B]]
        return source_B, index_B


def phases(weights: np.ndarray, limits: np.ndarray) -> list[Phase]:
    """Divide a mixture into phases: a new phase begins whenever a source is exhausted.

    Args:
        weights: Relative weight of each source, float [S].
        limits: Number of rows after which each source is exhausted, float [S]; infinity means no limit.
    """
    found: list[Phase] = []
    start, done = 0, np.zeros(len(weights), np.int64)
    while (done < limits).any():
        counts = shares(np.where(done < limits, weights, 0))
        left = limits - done
        whole = float(np.min(np.floor(left[counts > 0] / counts[counts > 0])))
        if whole >= 1:
            blocks = whole
        else:  # a source ends inside this block, so the remaining rows form a shorter block
            counts, blocks = np.minimum(counts, left).astype(np.int64), 1
        found.append(Phase(start, blocks, counts, done))
        if np.isinf(blocks):
            break
        start, done = start + int(blocks) * int(counts.sum()), done + int(blocks) * counts
    return found


def shares(weights: np.ndarray) -> np.ndarray:
    """Return the number of rows of each source in a block of `BLOCK` rows, int64 [S], by the largest-remainder method.

    Every source with a positive weight has at least one row.
    """
    exact = weights / weights.sum() * BLOCK
    counts = np.maximum(np.floor(exact), weights > 0).astype(np.int64)
    short = BLOCK - int(counts.sum())
    if short > 0:
        counts[np.argsort(-(exact - counts), kind="stable")[:short]] += 1
    return counts

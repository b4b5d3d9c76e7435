"""Compute the log-likelihood of continuations after their contexts, such as the choices of a question.

Several sequences are packed into one row as separate segments. All rows have one of a few lengths. The number of
compiled programs is therefore small, and few positions are padding. The output projection runs only at the scored
positions.

Shapes: B rows per batch, T tokens per row, P scored positions per row, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError, WorkError
from llmctl.evaluate.setup import Batch, Setup, answers
from llmctl.evaluate.sliding_window import pack
from llmctl.evaluate.tasks.losses import project
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig

SHORTEST, GROWTH = 128, 4
"""Shortest length of a row, and the ratio of two successive lengths."""
POSITIONS = 32
"""Divisor of the number of scored positions per row. Logits are computed in chunks, whose number must divide the number
of positions."""


class Query(NamedTuple):
    """Store the token ids of a context, and of a continuation to score."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Store the log-likelihood of a continuation in nats, and whether the continuation is the greedy choice."""

    log_likelihood: float
    greedy: bool


class ScoredSequence(NamedTuple):
    """Store the inputs of one sequence, and its scored positions."""

    inputs: tuple[int, ...]
    targets: list[tuple[int, int, int]]
    """Triples (position, target token, number of the query)."""


class Scorer:
    """Score continuations with one model. Its programs are compiled once per length of a row and size of a batch."""

    def __init__(self, model: ModelConfig, params: functional.Params, setup: Setup, prefix: Sequence[int] = ()) -> None:
        """Store the model.

        Args:
            model: Config of a decoder.
            params: Parameters of the model.
            setup: Settings of the measurement. `batch_size` is the number of rows of `SHORTEST` tokens per batch;
                batches of longer rows have fewer rows.
            prefix: Token ids of a trained prompt, which precedes every context.
        """
        self.longest = setup.seq_len - len(prefix)
        """Maximum number of input tokens per query, without the trained prompt."""
        self._model, self._params, self._setup, self._prefix = model, params, setup, tuple(prefix)
        self._step = position_scores(model, setup.dtype)
        self.truncated = 0
        """Number of queries whose context was truncated so far."""

    def __call__(self, queries: Sequence[Query]) -> list[Score]:
        """Return the scores of the queries, in their order.

        The beginning of a context that is too long is removed. Queries with equal inputs are computed once. For
        example, choices of one token after the same context are computed together.

        Raises:
            RequestError: If a continuation alone is longer than `longest`, or if a context or continuation is empty.
            WorkError: If a log-likelihood is not a finite number.
        """
        total_Q, greedy_Q = np.zeros(len(queries)), np.ones(len(queries), bool)
        for length, sequences in by_length(self._sequences(queries), self._setup.seq_len).items():
            rows = PackedRows(sequences, length)
            setup = replace(self._setup, batch_size=rows_per_batch(self._setup, length, len(rows)))
            for batch, found in answers(self._step, self._params, rows, setup, PackedRows.reads):
                query_BP = batch["query"]
                real = query_BP >= 0
                np.add.at(total_Q, query_BP[real], found["log_p"].astype(np.float64)[real])
                np.logical_and.at(greedy_Q, query_BP[real], found["best"][real])
        if not np.isfinite(total_Q).all():
            raise WorkError("the model gives a log-likelihood that is not a finite number")
        return [Score(float(total), bool(greedy)) for total, greedy in zip(total_Q, greedy_Q, strict=True)]

    def _sequences(self, queries: Sequence[Query]) -> list[ScoredSequence]:
        """Return one sequence per distinct input, with the targets of all queries that have this input."""
        found: dict[tuple[int, ...], ScoredSequence] = {}
        for q, (context, continuation) in enumerate(queries):
            count = len(continuation)
            if not len(context) or not count:
                raise RequestError("a context or a continuation has no tokens, so nothing can be scored")
            if count > self.longest:
                raise RequestError(
                    f"a continuation has {count:,} tokens, and the model reads at most {self.longest:,}; raise seq_len"
                )
            self.truncated += len(context) + count > self.longest + 1
            inputs = (*self._prefix, *[*context, *continuation][-self.longest - 1 :][:-1])
            sequence = found.setdefault(inputs, ScoredSequence(inputs, []))
            first = len(inputs) - count
            sequence.targets.extend((first + i, token, q) for i, token in enumerate(continuation))
        return list(found.values())


class PackedRows:
    """Build rows of several sequences each.

    A batch has the arrays tokens, segments and positions [B, T]. The arrays at, targets and query [B, P] contain the
    position, the target token and the query of each scored token. `query` is -1 at entries that only fill a row.
    """

    reads = ("tokens", "segments", "positions", "at", "targets")

    def __init__(self, sequences: Sequence[ScoredSequence], length: int) -> None:
        """Pack the sequences into rows of `length` tokens."""
        self._sequences, self._length = sequences, length
        self._bins = pack([len(s.inputs) for s in sequences], length)
        most = max(sum(len(sequences[i].targets) for i in members) for members in self._bins)
        self._scored = -(-most // POSITIONS) * POSITIONS

    def __len__(self) -> int:
        return len(self._bins)

    def batch(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows with the numbers `rows_B` as arrays, int32."""
        out = {name: np.zeros((len(rows_B), self._length), np.int32) for name in ("tokens", "segments", "positions")}
        out |= {name: np.zeros((len(rows_B), self._scored), np.int32) for name in ("at", "targets")}
        out["query"] = np.full((len(rows_B), self._scored), -1, np.int32)
        for row, members in enumerate(self._bins[i] for i in rows_B):
            first = entry = 0
            for segment, member in enumerate(members, 1):
                inputs, targets = self._sequences[member]
                here = slice(first, first + len(inputs))
                out["tokens"][row, here], out["segments"][row, here] = inputs, segment
                out["positions"][row, here] = np.arange(len(inputs))
                there = slice(entry, entry + len(targets))
                at, out["targets"][row, there], out["query"][row, there] = np.array(targets, np.int32).T
                out["at"][row, there] = first + at
                first, entry = first + len(inputs), entry + len(targets)
        return out


def rows_per_batch(setup: Setup, length: int, rows: int = 2**31) -> int:
    """Return the number of rows of `length` tokens per batch. A batch has about `setup.batch_size` * `SHORTEST` tokens.

    The number is a multiple of the number of devices over which rows are sharded.
    """
    ways = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
    size = min(max(setup.batch_size * SHORTEST // length, 1), rows)
    return -(-size // ways) * ways


def by_length(sequences: Sequence[ScoredSequence], longest: int) -> dict[int, list[ScoredSequence]]:
    """Group sequences by the length of the packed rows, shortest first.

    A row is at least twice as long as each of its sequences, if `longest` permits. Shorter rows would contain much
    padding.

    Args:
        sequences: Sequences of at most `longest` tokens.
        longest: Maximum length of a row.
    """
    lengths = [SHORTEST]
    while lengths[-1] < longest:
        lengths.append(lengths[-1] * GROWTH)
    lengths = [min(length, longest) for length in lengths]
    groups: dict[int, list[ScoredSequence]] = {length: [] for length in lengths}
    for sequence in sequences:
        fitting = next((length for length in lengths if 2 * len(sequence.inputs) <= length), lengths[-1])
        groups[fitting].append(sequence)
    return {length: group for length, group in groups.items() if group}


def position_scores(model: ModelConfig, dtype: str) -> Any:
    """Return a compiled function (params, batch) -> {"log_p": [B, P], "best": [B, P]}.

    "log_p" is the log probability of each target in nats. "best" is true if the target is the most probable token.
    """

    @jax.jit
    def step(params: functional.Params, batch: Batch) -> dict[str, jax.Array]:
        inputs = {name: batch[name] for name in ("tokens", "segments", "positions")}
        x_BTD = functional.hidden(model, params, inputs, dtype=dtype)
        x_BPD = jnp.take_along_axis(x_BTD, batch["at"][..., None], axis=1)
        head = functional.head_params(model, params)

        def scores(head: functional.Params, x: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
            logits = chunked_loss.chunk_logits(project(model, dtype), head, x)
            log_p, _ = chunked_loss.target_log_probability(logits, targets)
            return {"log_p": log_p, "best": chunked_loss.hits(logits, targets)}

        return chunked_loss.per_token(scores, head, x_BPD, batch["targets"], model.vocab_size)

    return step

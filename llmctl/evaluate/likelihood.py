"""Compute the log-likelihood of continuations after their contexts, such as the choices of a question.

Several contexts are packed into one row as separate segments. All rows have one of a few lengths. The number of
compiled programs is therefore small, and few positions are padding. Continuations of the same context share the
context's computation: they are branches of its segment (see `llmctl.model.attention`). The output projection runs only
at the scored positions.

Shapes: B rows per batch, T tokens per row, P scored positions per row, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.config.errors import RequestError
from llmctl.evaluate import nonfinite
from llmctl.evaluate.batch_sizes import balanced
from llmctl.evaluate.setup import Batch, Setup, answers
from llmctl.evaluate.sliding_window import pack
from llmctl.evaluate.tasks.losses import project
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig

SHORTEST, GROWTH = 256, 4
"""Shortest standard length of a row, and the ratio of two successive lengths."""
LEAST = 128
"""Minimum length of a row. Fused attention kernels need multiples of 128 tokens."""
FEW = 2
"""Maximum number of batches of short sequences that are packed into longer rows. For so few batches, compiling another
program would take longer than the computation."""
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
    """Store the input tokens of a context and of its continuations, and the tokens to score."""

    context: tuple[int, ...]
    branches: dict[tuple[int, ...], int]
    """Map from each continuation without its last token (which is no input) to the index of its first input."""
    targets: list[tuple[int, int, int]]
    """Scored tokens: triples (index of the input that predicts the token, token, number of the query)."""

    @property
    def inputs(self) -> int:
        """Return the number of input tokens of the context and of all continuations."""
        return len(self.context) + sum(map(len, self.branches))

    def add(self, continuation: Sequence[int], query: int) -> None:
        """Add a continuation. Continuations whose inputs are equal share these inputs."""
        branch = tuple(continuation[:-1])
        first = self.branches.setdefault(branch, self.inputs)
        at = (len(self.context) - 1, *range(first, first + len(branch)))
        self.targets.extend((i, token, query) for i, token in zip(at, continuation, strict=True))


class Scorer:
    """Score continuations with one model. Its programs are compiled once per length of a row and size of a batch."""

    def __init__(
        self,
        model: ModelConfig,
        params: functional.Params,
        setup: Setup,
        prefix: Sequence[int] = (),
        step: Any = None,
        what: str = "likelihoods",
    ) -> None:
        """Store the model.

        Args:
            model: Config of a decoder.
            params: Parameters of the model.
            setup: Settings of the measurement. `batch_size` is the number of rows of `LEAST` tokens per batch; batches
                of longer rows have fewer rows.
            prefix: Token ids of a trained prompt, which precedes every context.
            step: Result of `position_scores` that several scorers share; None compiles one.
            what: Name of the work in the progress bar.
        """
        self.longest = setup.seq_len - len(prefix)
        """Maximum number of input tokens per query, without the trained prompt."""
        self._model, self._params, self._setup, self._prefix = model, params, setup, tuple(prefix)
        self._step, self._what = step or position_scores(model, setup.dtype), what
        self.truncated = 0
        """Number of queries whose context was truncated so far."""

    def __call__(self, queries: Sequence[Query]) -> list[Score]:
        """Return the scores of the queries, in their order.

        The beginning of a context that is too long is removed. Continuations of a context share the computation of the
        context if that saves time.

        Raises:
            RequestError: If a continuation alone is longer than `longest`, or if a context or continuation is empty.
            WorkError: If a log-likelihood is not a finite number.
        """
        found = summed(
            self._step, self._model, self._params, self._sequences(queries), len(queries), self._setup, self._what
        )
        return [Score(float(total), bool(greedy)) for total, greedy in zip(*found, strict=True)]

    def _sequences(self, queries: Sequence[Query]) -> list[ScoredSequence]:
        """Group the queries into sequences. A sequence has one context, and one or several of its continuations.

        The continuations of one sequence have at most `SHORTEST` * `GROWTH` input tokens in total. Attention would cost
        more in longer rows. If the context is shorter than a continuation, the limit is `SHORTEST`, because sharing the
        context saves little.
        """
        open_: dict[tuple[int, ...], ScoredSequence] = {}
        found: list[ScoredSequence] = []
        for q, (context, continuation) in enumerate(queries):
            count = len(continuation)
            if not (len(context) or self._prefix) or not count:
                raise RequestError("a context or a continuation has no tokens, so nothing can be scored")
            if count > self.longest:
                raise RequestError(
                    f"a continuation has {count:,} tokens, and the model reads at most {self.longest:,}; raise seq_len"
                )
            self.truncated += len(context) + count > self.longest + 1
            kept = (*self._prefix, *context[max(len(context) + count - self.longest - 1, 0) :])
            sequence = open_.get(kept)
            room = SHORTEST if len(kept) < count else SHORTEST * GROWTH
            room = min(len(kept) + room, self._setup.seq_len)
            if sequence is None or sequence.inputs + count - 1 > room:
                sequence = open_[kept] = ScoredSequence(kept, {}, [])
                found.append(sequence)
            sequence.add(continuation, q)
        return found


def summed(
    step: Any,
    model: ModelConfig,
    params: functional.Params,
    sequences: Sequence[ScoredSequence],
    queries: int,
    setup: Setup,
    what: str = "likelihoods",
) -> tuple[np.ndarray, np.ndarray]:
    """Return, per query, the log-likelihood in nats, float64 [Q], and whether every token is the most probable, [Q].

    Args:
        step: The result of `position_scores`.
        model: Config of the model.
        params: Parameters of the model.
        sequences: Sequences with the scored tokens of the queries.
        queries: Number of queries, Q.
        setup: Settings of the measurement (see `Scorer`).
        what: Name of the work in the progress bar.

    Raises:
        WorkError: If a log-likelihood is not a finite number.
    """
    total_Q, greedy_Q = np.zeros(queries), np.ones(queries, bool)
    for rows in packed(sequences, setup.seq_len, FEW * setup.batch_size * LEAST):
        sized = setup.sized(rows_per_batch(setup, rows))
        for batch, found in answers(step, params, rows, sized, PackedRows.reads, what=what):
            query_BP = batch["query"]
            real = query_BP >= 0
            nonfinite.check(model, params, batch, found["log_p"], real, setup.mesh, setup.dtype)
            np.add.at(total_Q, query_BP[real], found["log_p"].astype(np.float64)[real])
            np.logical_and.at(greedy_Q, query_BP[real], found["best"][real])
    return total_Q, greedy_Q


class PackedRows:
    """Build rows of several sequences each.

    A batch has these arrays:

    - `tokens`, `segments` and `positions` [B, T]
    - `branches` [B, T], if a sequence has several continuations (see `llmctl.model.attention`)
    - `at` [B, P]: for each scored token, the index of the input that predicts it
    - `targets` [B, P]: the id of each scored token, or -1 at entries that only fill a row
    - `query` [B, P]: the number of each scored token's query, or -1 at entries that only fill a row
    """

    reads = ("tokens", "segments", "positions", "branches", "at", "targets")

    def __init__(self, bins: Sequence[Sequence[ScoredSequence]], length: int) -> None:
        """Store the sequences of each row of `length` tokens.

        Rows are sorted by their number of scored positions, so that the rows of a batch have similar numbers.
        """
        self.length = length
        self._bins = sorted(bins, key=lambda members: -sum(len(s.targets) for s in members))
        self._scored = -(-sum(len(s.targets) for s in self._bins[0]) // POSITIONS) * POSITIONS
        self._branched = any(sum(map(bool, s.branches)) > 1 for members in bins for s in members)

    def __len__(self) -> int:
        return len(self._bins)

    def batch(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows with the numbers `rows_B` as arrays, int32."""
        names = ("tokens", "segments", "positions", *(["branches"] if self._branched else []))
        out = {name: np.zeros((len(rows_B), self.length), np.int32) for name in names}
        out["at"] = np.zeros((len(rows_B), self._scored), np.int32)
        out |= {name: np.full((len(rows_B), self._scored), -1, np.int32) for name in ("targets", "query")}
        for row, members in enumerate(self._bins[i] for i in rows_B):
            start = entry = 0
            for segment, sequence in enumerate(members, 1):
                first = start
                known = len(sequence.context)
                for branch, inputs in enumerate((sequence.context, *sequence.branches)):
                    here = slice(first, first + len(inputs))
                    out["tokens"][row, here], out["segments"][row, here] = inputs, segment
                    out["positions"][row, here] = np.arange(len(inputs)) + (known if branch else 0)
                    if self._branched:
                        out["branches"][row, here] = branch
                    first = here.stop
                there = slice(entry, entry + len(sequence.targets))
                at, out["targets"][row, there], out["query"][row, there] = np.array(sequence.targets, np.int32).T
                out["at"][row, there] = start + at
                start, entry = first, there.stop
        return out


def rows_per_batch(setup: Setup, rows: PackedRows) -> int:
    """Return the number of rows per batch. A batch has at most about `setup.batch_size` * `LEAST` tokens."""
    return balanced(setup.mesh, setup.batch_size * LEAST // rows.length, len(rows))


def packed(sequences: Sequence[ScoredSequence], longest: int, few: int) -> list[PackedRows]:
    """Pack sequences into rows of a few lengths, the longest rows first.

    A row has the shortest standard length that is sufficient for its longest sequence. Shorter sequences fill the rest
    of a long row. If the remaining short sequences have at most `few` tokens in total, they are added to longer rows.
    The length of the shortest rows is halved while this does not increase the total length of these rows.

    Args:
        sequences: Sequences of at most `longest` tokens.
        longest: Maximum length of a row.
        few: Maximum total number of tokens of short sequences that are packed into longer rows. If the short sequences
            have more tokens in total, they are packed into shorter rows. Another program is then compiled.
    """
    lengths = [min(SHORTEST, longest)]
    most = max((s.inputs for s in sequences), default=0)
    while lengths[-1] < most:
        lengths.append(min(lengths[-1] * GROWTH, longest))
    found, left = [], list(sequences)
    for length, shorter in zip(lengths[::-1], [*lengths[-2::-1], 0], strict=True):
        if not any(s.inputs > shorter for s in left):
            continue
        opens = shorter if sum(s.inputs for s in left if s.inputs <= shorter) > few else 0
        sizes = [s.inputs for s in left]
        bins = pack(sizes, length, opens)
        if not opens:
            while length % 2 == 0 and length // 2 >= max(LEAST, *sizes):
                halves = pack(sizes, length // 2)
                if len(halves) > 2 * len(bins):
                    break
                length, bins = length // 2, halves
        found.append(PackedRows([[left[i] for i in members] for members in bins], length))
        inside = {i for members in bins for i in members}
        left = [s for i, s in enumerate(left) if i not in inside]
    return found


def position_scores(model: ModelConfig, dtype: str) -> Any:
    """Return a compiled function that computes two arrays [B, P], "log_p" and "best", by name.

    Its arguments are the parameters and a batch. "log_p" is the log probability of each target in nats. "best" is true
    if the target is the most probable token.
    """

    @jax.jit
    def step(params: functional.Params, batch: Batch) -> dict[str, jax.Array]:
        inputs = {name: batch[name] for name in PackedRows.reads[:4] if name in batch}
        x_BTD = functional.hidden(model, params, inputs, dtype=dtype)
        x_BPD = jnp.take_along_axis(x_BTD, batch["at"][..., None], axis=1)
        head = functional.head_params(model, params)

        def scores(head: functional.Params, x: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
            logits = chunked_loss.chunk_logits(project(model, dtype), head, x)
            log_p, _ = chunked_loss.target_log_probability(logits, targets)
            return {"log_p": log_p, "best": chunked_loss.hits(logits, targets)}

        def scores_if_any(head: functional.Params, x: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
            """Return the scores of a chunk of positions.

            If the chunk has no targets, return zeros. The output projection is then not computed.
            """
            none = {"log_p": jnp.zeros(targets.shape, jnp.float32), "best": jnp.zeros(targets.shape, bool)}
            return jax.lax.cond(jnp.any(targets >= 0), scores, lambda *_: none, head, x, targets)

        return chunked_loss.per_token(scores_if_any, head, x_BPD, batch["targets"], model.vocab_size)

    return step

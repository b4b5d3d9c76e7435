"""Compute the log probability of tokens that an encoder predicts at a mask (Salazar et al., 2020, arXiv:1910.14659).

The pseudo-log-likelihood of a text is the sum over its tokens, each masked alone.

Shapes: Q queries, B rows per batch, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.examples.labelled import ExampleRows, padded, templated
from llmctl.data.pretraining.next_sentence import IS_NEXT
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.likelihood import ScoredSequence, position_scores, summed
from llmctl.evaluate.setup import Batch, Setup, answers
from llmctl.model import functional
from llmctl.model.config import ModelConfig

WIDTH = 32
"""Padded lengths of pairs of texts are multiples of this number."""


class MaskedToken(NamedTuple):
    """Store a row of token ids with one mask, the position of the mask, and the token to score there."""

    row: tuple[int, ...]
    position: int
    target: int


def masked(row: Sequence[int], position: int, mask_id: int) -> MaskedToken:
    """Return the query for one token of a row: the token is masked and scored.

    Example:
        >>> masked([1, 7, 8, 2], 2, mask_id=9)
        MaskedToken(row=(1, 7, 9, 2), position=2, target=8)
    """
    return MaskedToken((*row[:position], mask_id, *row[position + 1 :]), position, row[position])


class MaskedScorer:
    """Score masked tokens with one encoder. Rows are packed as those of `llmctl.evaluate.likelihood`."""

    def __init__(self, model: ModelConfig, params: functional.Params, setup: Setup) -> None:
        """Store the encoder, and compile its function once per length of packed rows."""
        self._model, self._params, self._setup = model, params, setup
        self._step = position_scores(model, setup.dtype)

    def __call__(self, queries: Sequence[MaskedToken]) -> np.ndarray:
        """Return the log probability of each query's target in nats, float64 [Q].

        Equal rows are computed once.

        Raises:
            RequestError: If a row is longer than `setup.seq_len`.
            WorkError: If a log probability is not a finite number.
        """
        found: dict[tuple[int, ...], ScoredSequence] = {}
        for q, (row, position, target) in enumerate(queries):
            check_length(len(row), self._setup)
            found.setdefault(row, ScoredSequence(row, {}, [])).targets.append((position, target, q))
        sequences = list(found.values())
        return summed(self._step, self._model, self._params, sequences, len(queries), self._setup)[0]


def check_length(tokens: int, setup: Setup) -> None:
    """Check that a text fits into the sequence length of the measurement.

    Raises:
        RequestError: If the text is too long.
    """
    if tokens > setup.seq_len:
        raise RequestError(f"a text has {tokens:,} tokens, and seq_len is {setup.seq_len:,}; raise seq_len")


def mask_id(tokenizer: Tokenizer, where: str) -> int:
    """Return the id of the tokenizer's mask token.

    Raises:
        RequestError: If the tokenizer has no mask token.
    """
    if tokenizer.mask_id is None:
        raise RequestError(f"{where}: the tokenizer has no mask token, so its model cannot score masked tokens")
    return tokenizer.mask_id


def next_sentence(artifact: Artifact, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], setup: Setup) -> Any:
    """Return the log probability that the second text of each pair follows the first, float64 [N].

    Args:
        artifact: Encoder with a next-sentence head.
        tokenizer: Tokenizer of the artifact.
        pairs: Pairs of texts.
        setup: Settings of the measurement.

    Raises:
        RequestError: If a pair is longer than `setup.seq_len`.
    """
    model, rows = artifact.model, _Pairs(tokenizer, pairs, setup)

    @jax.jit
    def step(params: functional.Params, batch: Batch) -> jax.Array:
        x_BTD = functional.hidden(model, params, batch, dtype=setup.dtype)
        logits_B2 = functional.outputs(model, params, x_BTD, batch, setup.dtype)
        return jax.nn.log_softmax(logits_B2.astype(jnp.float32))[:, IS_NEXT]

    found = [log_p_B for _, log_p_B in answers(step, artifact.params, rows, setup)]
    return np.concatenate(found).astype(np.float64)


class _Pairs(ExampleRows):
    """Build one row per pair of texts, with the special tokens and the types of a pair."""

    def __init__(self, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], setup: Setup) -> None:
        super().__init__(len(pairs), seed=0, shuffle=False)
        sides = [tokenizer.encode_batch([pair[k] for pair in pairs]) for k in (0, 1)]
        self._rows = [
            templated(tokenizer.template, np.array(a, np.int32), np.array(b, np.int32), len(a) + len(b) + WIDTH)
            for a, b in zip(*sides, strict=True)
        ]
        longest = max(len(row) for row, _ in self._rows)
        check_length(longest, setup)
        self._width, self._pad = min(-(-longest // WIDTH) * WIDTH, setup.seq_len), tokenizer.pad_id

    def _build(self, example_B: np.ndarray) -> Batch:
        chosen = [self._rows[i] for i in example_B]
        batch = padded([row for row, _ in chosen], self._width, self._pad)
        types_BT = np.zeros_like(batch["tokens"])
        for b, (_, types) in enumerate(chosen):
            types_BT[b, : len(types)] = types
        return batch | {"types": types_BT}

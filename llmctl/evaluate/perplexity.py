"""Perplexity under a protocol that is part of the number: split, context, stride, and what is counted.

Every document is scored alone: nothing of another document is its context, its first token is conditioned on the
prefix token (BOS), its end is not scored. Each target is scored exactly once whatever the stride (see `windows`).
Perplexity a token compares models of one tokenizer; a word (white-space separated, of the raw text) or a byte
compares across tokenizers, as every model must predict the same text.

Shapes: N rows, B batch, T context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.data import prefetch
from llmctl.data.device_batches import Feed
from llmctl.distributed import host_arrays
from llmctl.evaluate import sliding_window
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig


@dataclass(frozen=True)
class Protocol:
    """What a perplexity was measured on, and how."""

    split: str
    documents: int
    context: int
    stride: int
    dtype: str = "float32"
    first: bool = True
    """Whether the first token of a document is scored (it is where documents begin with BOS)."""
    unit: str = "document"
    """What is scored: a document, or the completion of a prompt."""

    def __str__(self) -> str:
        scored = "every token" if self.first else "every token but the first"
        return (
            f"{self.split} split, {self.documents} {self.unit}s each alone, "
            f"context {self.context}, stride {self.stride}, {scored} once, {self.dtype}"
        )


@dataclass(frozen=True)
class Counts:
    """The units of the raw text."""

    tokens: int
    words: int
    bytes: int


def count(texts: Sequence[str], tokens: int) -> Counts:
    """Words are separated by white space; bytes are those of UTF-8."""
    return Counts(tokens, sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts))


def metrics(nll: float, counts: Counts) -> dict[str, float | None]:
    """From the summed negative log-likelihood (nats) to every unit; None (JSON has no infinity) where exp overflows."""

    def exponential(x: float) -> float | None:
        return math.exp(x) if x < 700 else None

    return {
        "perplexity": exponential(nll / max(1, counts.tokens)),
        "word_perplexity": exponential(nll / max(1, counts.words)),
        "byte_perplexity": exponential(nll / max(1, counts.bytes)),
        "bits_per_byte": nll / math.log(2) / max(1, counts.bytes),
        "nll": nll / max(1, counts.tokens),
        "text_tokens": counts.tokens,
        "text_words": counts.words,
        "text_bytes": counts.bytes,
    }


def row_nll(model: ModelConfig, dtype: str) -> Any:
    """Compiled (params, batch) -> summed NLL [B] (nats) of the weighted targets. Logits exist a chunk at a time."""

    def step(params: functional.Params, batch: dict[str, jax.Array]) -> jax.Array:
        x_BTD = functional.hidden(model, params, batch, dtype=dtype)

        def project(head: functional.Params, x: jax.Array) -> jax.Array:
            return functional.head_logits(model, head, x, dtype)

        nll_BT = chunked_loss.token_nll(
            project, functional.head_params(model, params), x_BTD, batch["targets"], model.vocab_size
        )
        return jnp.sum(jnp.where(batch["weights"] > 0, nll_BT * batch["weights"], 0.0), axis=1)

    return jax.jit(step)


def total_nll(
    model: ModelConfig,
    params: functional.Params,
    documents: sliding_window.Documents,
    prefix: int | None,
    *,
    context: int,
    stride: int,
    batch_size: int,
    given: Sequence[int] | None = None,
    dtype: str = "float32",
    feed: Feed | None = None,
) -> tuple[float, int]:
    """(summed NLL in nats, tokens scored) of tokenized documents.

    Args:
      model, params: what is scored.
      documents: token ids by number, without begin and end of sequence.
      prefix: the token before each document (see `windows.rows`).
      context, stride: the windows.
      batch_size: windows rows a step.
      given: tokens of each document that are context alone.
      dtype: compute type; the sum over rows is taken in float64 on the host.
      feed: the way onto the devices.
    """
    rows = sliding_window.Rows(documents, prefix, context, stride, given)
    step = row_nll(model, dtype)
    total = 0.0
    place, spans = (feed.place, feed.spans) if feed else (None, None)
    with prefetch.eval_batches(rows, batch_size, place=place, spans=spans) as batches:
        for _, batch in batches:
            total += float(np.sum(host_arrays.read(step(params, batch)), dtype=np.float64))
    return total, rows.scored

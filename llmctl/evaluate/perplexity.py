"""Measure perplexity, and report the split, context, stride and units of the measurement.

Every document is scored independently: its context never includes another document. The first token of a document is
conditioned on the prefix token (BOS). The end of a document is not scored. Each target is scored exactly once for every
stride (see `sliding_window`).

Perplexity per token is comparable between models with the same tokenizer. Perplexity per word or per byte is comparable
across tokenizers, because every model must predict the same text. Words are separated by white space in the raw text.

Shapes: D documents, N rows, B rows per batch, T context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.data.device_batches import DeviceBatches
from llmctl.distributed import host_arrays
from llmctl.evaluate import nonfinite, sliding_window
from llmctl.model import chunked_loss, functional
from llmctl.model.config import ModelConfig


@dataclass(frozen=True)
class Protocol:
    """Describe a perplexity measurement: the split, the number of documents, the context, the stride and the dtype.

    Example:
        >>> print(Protocol(split="test", documents=50, context=512, stride=256))
        test split, 50 documents each alone, context 512, stride 256, every token once, float32
    """

    split: str
    documents: int
    context: int
    stride: int
    dtype: str = "float32"
    first: bool = True
    """Whether the first token of a document is scored, which requires a prefix token (BOS) or a prompt before it."""
    unit: str = "document"
    """Unit of scoring: a document, or the completion of a prompt."""

    def __str__(self) -> str:
        scored = "every token" if self.first else "every token but the first"
        return (
            f"{self.split} split, {self.documents} {self.unit}s each alone, "
            f"context {self.context}, stride {self.stride}, {scored} once, {self.dtype}"
        )


@dataclass(frozen=True)
class Counts:
    """Store the numbers of tokens, words and bytes of the scored texts."""

    tokens: int
    words: int
    bytes: int


def count(texts: Sequence[str], tokens: int) -> Counts:
    """Count the words (separated by white space) and the UTF-8 bytes of texts. `tokens` is the number of tokens."""
    return Counts(tokens, sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts))


def metrics(nll: float, counts: Counts) -> dict[str, float | None]:
    """Convert the summed negative log-likelihood `nll` (in nats) to perplexities, bits per byte and nats per token.

    A perplexity is None if exp overflows, because JSON cannot store infinity.
    """

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


def target_nll(model: ModelConfig, dtype: str) -> Any:
    """Return a compiled function that computes the negative log-likelihood [B, T] of each target, in nats.

    Its arguments are the parameters and a batch. The value of each target is multiplied by the target's weight in the
    array `weights` of the batch. Logits are computed in chunks, never for all positions at once.
    """

    def step(params: functional.Params, batch: dict[str, jax.Array]) -> jax.Array:
        x_BTD = functional.hidden(model, params, batch, dtype=dtype)

        def project(head: functional.Params, x: jax.Array) -> jax.Array:
            return functional.head_logits(model, head, x, dtype)

        nll_BT = chunked_loss.token_nll(
            project, functional.head_params(model, params), x_BTD, batch["targets"], model.vocab_size
        )
        return jnp.where(batch["weights"] > 0, nll_BT * batch["weights"], 0.0)

    return jax.jit(step)


def document_nll(
    model: ModelConfig,
    params: functional.Params,
    documents: sliding_window.Documents,
    prefix: int | Sequence[int] | None,
    *,
    context: int,
    stride: int,
    batches: DeviceBatches,
    given: Sequence[int] | None = None,
    repeated: int = 0,
    dtype: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the negative log-likelihood (NLL) of each tokenized document, summed over its tokens.

    Args:
        model: Config of the model.
        params: Parameters of the model.
        documents: Token ids by document number, without BOS and EOS.
        prefix: Token or tokens before each document (see `sliding_window.Rows`).
        context: Maximum number of inputs per window.
        stride: Number of newly scored tokens per window.
        batches: Size and sharding of the batches of windows.
        given: Number of tokens at the beginning of each document that are context only, such as prompts.
        repeated: Number of tokens from the start of `prefix` that every later window repeats (see
            `sliding_window.Rows`).
        dtype: Dtype of the computation. The sum over tokens is in float64 on the host.

    Returns:
        The summed NLL of each document in nats, float64 [D], and the number of its scored tokens, int64 [D].

    Raises:
        WorkError: If a NLL is not a finite number.
    """
    rows = sliding_window.Rows(documents, prefix, context, stride, given, repeated)
    step = target_nll(model, dtype)
    nll_D = np.zeros(len(documents))

    def place(batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
        return batch, batches.place(batch)

    with batches.once(rows, place=place) as steps:
        for _, (batch, placed) in steps:
            inputs = {name: a for name, a in placed.items() if name not in ("document", "row_weight")}
            nll_BT = np.asarray(host_arrays.read(step(params, inputs)), np.float64)
            whole = batches.gather(batch, placed)
            nonfinite.check(model, params, whole, nll_BT, np.array(True), batches.mesh, dtype)
            document_BT = whole["document"]
            nll_D += np.bincount(document_BT.ravel(), weights=nll_BT.ravel(), minlength=len(nll_D))
    return nll_D, rows.scored_per_document

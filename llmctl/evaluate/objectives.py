"""How well a model does what it was pretrained for: masks filled, passages told apart, spans or completions written.

Every row is a pure function of the held-out text and a fixed seed, so all artifacts of one tokenizer and length are
asked the same; completions are judged as texts are (`perplexity`). Beside every score stands what one scores without
looking at the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.device_batches import DeviceBatches
from llmctl.data.examples.labelled import SequencePairRows
from llmctl.data.examples.task_rows import objective, task_rows
from llmctl.data.pretraining import baselines
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate import perplexity
from llmctl.model import chunked_loss
from llmctl.model.config import ModelConfig
from llmctl.model.losses import loss_of

ASKED = {"masked": "15 % of the tokens masked", "next_sentence": "15 % of the tokens masked, half of the pairs true",
         "spans": "15 % of the tokens dropped in spans of 3"}  # fmt: skip


Outcome = tuple[str, str, dict[str, Any], Any, dict[str, np.ndarray]]
"""(task, protocol, metrics, compiled step, one host batch)."""


def measure(
    artifact: Artifact, examples: Examples, split: str, seq_len: int, dtype: str, batches: DeviceBatches
) -> Outcome:
    """A language model on all rows of the held-out texts.

    Args:
        artifact: an encoder or an encoder-decoder with the lm head.
        examples: held-out texts.
        split: their name.
        seq_len: tokens a row.
        dtype: compute type.
        batches: size and sharding of the batches.

    Raises RequestError where the tokenizer lacks the special tokens.
    """
    model = artifact.model
    tokenizer, asked = tokenizers.load(artifact.tokenizer_dir), objective(model)
    rows, name = task_rows(model, examples, tokenizer, seq_len, shuffle=False), asked.name
    step, metrics = _scored(artifact, rows, dtype, batches, asked.sentinels(tokenizer))
    task = {"masked": "masked tokens", "next_sentence": "masked tokens"}.get(name, name)
    protocol = (
        f"{split} split, {len(examples)} examples in {len(rows)} rows of {seq_len} tokens, {ASKED[name]}, {dtype}"
    )
    return task, protocol, metrics, step, _inputs(rows, batches)


def complete(
    artifact: Artifact, examples: Examples, split: str, seq_len: int, dtype: str, batches: DeviceBatches
) -> Outcome:
    """Perplexity of completions given prompts that an encoder reads, `seq_len` tokens of each. As `measure`.

    Completions are whole, however long, and their ends are not scored: a word and a byte are then what they are for
    a decoder (`perplexity`). Raises RequestError for one that is longer than the model's longest sequence.
    """
    texts, most = list(examples.texts("completion")), artifact.model.max_seq_len
    rows = SequencePairRows(
        examples, tokenizers.load(artifact.tokenizer_dir), seq_len, shuffle=False, whole=True, ends=False
    )
    if rows.written > most:
        raise RequestError(
            f"{artifact.path}: the longest completion and its end have {rows.written} tokens, its longest sequence "
            f"{most}; leave such pairs out with data.filter, or shorten them"
        )
    step, metrics = _scored(artifact, rows, dtype, batches)
    metrics |= perplexity.metrics(metrics["nll"] * metrics["predicted_tokens"],
                                  perplexity.count(texts, metrics["predicted_tokens"]))  # fmt: skip
    protocol = f"{split} split, {len(examples)} completions each given its prompt ({rows.cut} cut to {seq_len} tokens "
    protocol += f"for the encoder), every token once, {dtype}"
    return "perplexity", protocol, metrics, step, _inputs(rows, batches)


def _scored(
    artifact: Artifact, rows: Any, dtype: str, batches: DeviceBatches, sentinels: Sequence[int] = ()
) -> tuple[Any, dict[str, Any]]:
    """(compiled step, its means over all rows beside what one scores without looking)."""
    step = scorer(artifact.model, dtype)
    total: dict[str, float] = {}
    with batches.once(rows) as steps:
        for _, batch in steps:
            found = {k: float(v) for k, v in step(artifact.params, batch).items()}
            total = {k: total.get(k, 0.0) + v for k, v in found.items()}
    metrics: dict[str, Any] = {k: float(v) for k, v in chunked_loss.means(total).items()}
    # A share of tokens is no accuracy of a classifier, which has its own column.
    metrics |= {"token_accuracy": metrics.pop("accuracy"), "nll": metrics.pop("loss")}
    return step, metrics | baselines.guesses(rows, len(rows), sentinels) | {"predicted_tokens": int(total["weight"])}


def _inputs(rows: Any, batches: DeviceBatches) -> dict[str, np.ndarray]:
    """The first rows, to time."""
    return rows.batch(np.arange(batches.size) % len(rows)) | {"row_weight": np.ones(batches.size, np.float32)}


def scorer(model: ModelConfig, dtype: str) -> Any:
    """Compiled (params, batch) -> the sums of the objective's metrics."""
    loss = loss_of(model, dtype=dtype)
    return jax.jit(lambda params, batch: loss(params, batch)[1])

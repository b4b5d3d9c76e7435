"""How well a model does what it was pretrained for: masks filled, passages told apart, spans or completions written.

Every row is a pure function of the held-out text and a fixed seed, so all artifacts of one tokenizer and length are
asked the same. Beside every score stands what one scores without looking at the context.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from llmctl import losses
from llmctl.artifact import Artifact
from llmctl.data import baselines, pipeline
from llmctl.data import tokenizer as tokenizers
from llmctl.data.splits import Examples
from llmctl.data.tasks import completes, objective, task_rows
from llmctl.feed import Feed
from llmctl.model import ModelConfig
from llmctl.model.loss import loss_of

ASKED = {"masked": "15 % of the tokens masked", "next_sentence": "15 % of the tokens masked, half of the pairs true",
         "spans": "15 % of the tokens dropped in spans of 3"}  # fmt: skip


def measure(
    artifact: Artifact, examples: Examples, split: str, seq_len: int, dtype: str, feed: Feed
) -> tuple[str, str, dict[str, Any], Any, dict[str, np.ndarray]]:
    """(task, protocol, metrics, compiled step, one host batch) of a language model on all rows of the held-out texts.

    Args:
        artifact: an encoder or an encoder-decoder with the lm head.
        examples: held-out texts, or prompts with completions for an encoder-decoder.
        split: their name.
        seq_len: tokens a row.
        dtype: compute type.
        feed: the way onto the devices.

    Raises RequestError where the tokenizer lacks the special tokens.
    """
    model = artifact.model
    rows = task_rows(model, examples, tokenizers.load(artifact.tokenizer_dir), seq_len, shuffle=False)
    step = scorer(model, dtype)
    total: dict[str, float] = {}
    with pipeline.eval_batches(rows, feed.size, place=feed.place, spans=feed.spans) as batches:
        for _, batch in batches:
            found = {k: float(v) for k, v in step(artifact.params, batch).items()}
            total = {k: total.get(k, 0.0) + v for k, v in found.items()}
    metrics = {k: float(v) for k, v in losses.means(total).items()}
    # A share of tokens is no accuracy of a classifier, which has its own column.
    metrics |= {"token_accuracy": metrics.pop("accuracy"), "nll": metrics.pop("loss")}
    metrics |= baselines.guesses(rows, len(rows))
    completion = completes(model, examples.columns)
    name = "completion" if completion else objective(model).name
    task = {"masked": "masked tokens", "next_sentence": "masked tokens", "spans": "spans"}.get(name, name)
    asked = "completions given their prompts" if completion else ASKED[name]
    protocol = f"{split} split, {len(examples)} examples in {len(rows)} rows of {seq_len} tokens, {asked}, {dtype}"
    inputs = rows.batch(np.arange(feed.size) % len(rows)) | {"row_weight": np.ones(feed.size, np.float32)}
    return task, protocol, metrics | {"predicted_tokens": int(total["weight"])}, step, inputs


def scorer(model: ModelConfig, dtype: str) -> Any:
    """Compiled (params, batch) -> the sums of the objective's metrics."""
    loss = loss_of(model, dtype=dtype)
    return jax.jit(lambda params, batch: loss(params, batch)[1])

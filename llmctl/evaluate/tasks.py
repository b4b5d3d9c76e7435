"""What is measured on which artifact: one function a task, and the table that says which task a head answers to.

A task scores one loaded artifact on held-out examples and also leaves the programs that the speed measurement runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.examples.labelled import ClassificationRows
from llmctl.data.examples.task_rows import completes
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.evaluate import objectives, retrieval, token_tasks
from llmctl.evaluate import perplexity as likelihood
from llmctl.evaluate.metrics import classification as scoring
from llmctl.evaluate.metrics import regression
from llmctl.evaluate.setup import KEPT, Batch, Held, Measured, Setup, answers, first, label_map, programs
from llmctl.model import functional
from llmctl.model.config import ModelConfig


def classify(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """Accuracy with its interval, F1, the confusion matrix: every example once, labels matched by name."""
    model, names = artifact.model, artifact.manifest.labels
    truth_of = label_map(held.examples.classes, names, str(artifact.path))
    tokenizer = tokenizers.load(artifact.tokenizer_dir)
    rows = ClassificationRows(
        held.examples,
        tokenizer,
        setup.seq_len,
        truncate=setup.truncate,
        shuffle=False,
        corpus=held.corpus(tokenizer),
    )

    predict = predictor(model, setup.dtype)
    found = [(truth_of[batch["label"]], said) for batch, said in answers(predict, artifact.params, rows, setup)]
    labels, predictions = map(np.concatenate, zip(*found, strict=True))
    confusion = scoring.confusion_matrix(labels, predictions, len(names))
    cut = f"{KEPT[setup.truncate]} {setup.seq_len} tokens"
    protocol = f"{held.split} split, {len(held.examples)} examples, {cut}, {setup.dtype}"
    single, batched = programs(predict, artifact.params, first(rows, setup), setup.mesh)
    units = {"examples_per_second": setup.batch_size}
    named = [names[i] for i in labels], [names[i] for i in predictions]
    return Measured("classification", protocol, scoring.scores(confusion, names), single, batched, units, named)


def regress(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """Errors and correlations of predicted numbers: every example once."""
    model, tokenizer = artifact.model, tokenizers.load(artifact.tokenizer_dir)
    if held.examples.classes:
        raise RequestError(f'{artifact.path}: predicts numbers; set data.label_type = "number"')
    corpus = held.corpus(tokenizer)
    rows = ClassificationRows(
        held.examples, tokenizer, setup.seq_len, truncate=setup.truncate, shuffle=False, corpus=corpus
    )

    predict = predictor(model, setup.dtype)
    found = [(batch["label"], said) for batch, said in answers(predict, artifact.params, rows, setup)]
    cut = f"{KEPT[setup.truncate]} {setup.seq_len} tokens"
    protocol = f"{held.split} split, {len(held.examples)} examples, {cut}, {setup.dtype}"
    single, batched = programs(predict, artifact.params, first(rows, setup), setup.mesh)
    truth, predictions = map(np.concatenate, zip(*found, strict=True))
    scored, units = regression.scores(truth, predictions), {"examples_per_second": setup.batch_size}
    return Measured("regression", protocol, scored, single, batched, units, (truth, predictions))


def predictor(model: ModelConfig, dtype: str) -> Any:
    """Compiled (params, batch) -> the likeliest class [B], or the number [B]."""

    @jax.jit
    def predict(params: functional.Params, batch: Batch) -> jax.Array:
        x_BTD = functional.hidden(model, params, batch, dtype=dtype)
        y = functional.outputs(model, params, x_BTD, batch, dtype)
        return y if model.head == "regress" else y.argmax(-1)

    return predict


def predict_text(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """Perplexity of the held-out texts (of completions, where the data has them), a token, a word and a byte."""
    model, tokenizer = artifact.model, tokenizers.load(artifact.tokenizer_dir)
    pairs = completes(model, held.examples.columns)
    texts = list(held.examples.texts("completion" if pairs else "text"))
    documents, given = held.pairs(tokenizer) if pairs else (held.corpus(tokenizer), None)
    # A model that never saw BOS before a text knows nothing about first tokens.
    prefix = tokenizer.bos_id if tokenizer.add_bos else None
    nll, tokens = likelihood.total_nll(
        model,
        artifact.params,
        documents,
        prefix,
        context=setup.seq_len,
        stride=setup.stride,
        batches=setup.batches(),
        given=given,
        dtype=setup.dtype,
    )
    protocol = likelihood.Protocol(
        held.split,
        len(texts),
        setup.seq_len,
        setup.stride,
        setup.dtype,
        first=pairs or prefix is not None,
        unit="completion" if pairs else "document",
    )
    full = np.ones((setup.batch_size, setup.seq_len), np.int32)
    inputs = {
        "tokens": full,
        "targets": full,
        "weights": full.astype(np.float32),
        "segments": full,
        "positions": full * np.arange(setup.seq_len, dtype=np.int32),
    }
    single, batched = programs(likelihood.row_nll(model, setup.dtype), artifact.params, inputs, setup.mesh)
    units = {"tokens_per_second": setup.batch_size * setup.seq_len}
    found = likelihood.metrics(nll, likelihood.count(texts, tokens))
    return Measured("perplexity", str(protocol), found, single, batched, units)


def predict_parts(artifact: Artifact, held: Held, setup: Setup) -> Measured:
    """What the architecture is pretrained for, on held-out texts: masks and next sentences, spans, completions."""
    pairs = completes(artifact.model, held.examples.columns)
    measure = objectives.complete if pairs else objectives.measure
    task, protocol, metrics, step, inputs = measure(
        artifact, held.examples, held.split, setup.seq_len, setup.dtype, setup.batches()
    )
    single, batched = programs(step, artifact.params, inputs, setup.mesh)
    tokens = setup.batch_size * sum(a.shape[1] for name, a in inputs.items() if name.endswith("tokens"))
    return Measured(task, protocol, metrics, single, batched, {"tokens_per_second": tokens})


TASKS: dict[tuple[str, str], Callable[[Artifact, Held, Setup], Measured]] = {
    ("decoder", "lm"): predict_text,
    ("decoder", "classify"): classify,
    ("decoder", "regress"): regress,
    ("encoder", "regress"): regress,
    ("encoder", "lm"): predict_parts,
    ("encoder_decoder", "lm"): predict_parts,
    ("encoder", "classify"): classify,
    ("encoder_decoder", "classify"): classify,
    ("decoder", "tokens"): token_tasks.tag,
    ("encoder", "tokens"): token_tasks.tag,
    ("decoder", "span"): token_tasks.find,
    ("encoder", "span"): token_tasks.find,
    ("decoder", "embed"): retrieval.embed,
    ("encoder", "embed"): retrieval.embed,
}
"""(architecture, head) -> the task that measures it."""


def task(model: ModelConfig, where: str) -> Callable[[Artifact, Held, Setup], Measured]:
    """The task that measures a model. Raises RequestError where there is none."""
    found = TASKS.get((model.architecture, model.head))
    if found is None:
        raise RequestError(f"{where}: eval has no task for a {model.architecture} with the head {model.head!r}")
    return found

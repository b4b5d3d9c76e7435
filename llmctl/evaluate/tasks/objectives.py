"""Define pretraining objectives as tasks, so that language models are measured on their training objective.

Each row depends only on the held-out text and a fixed seed. All artifacts with the same tokenizer and sequence length
therefore get the same rows. Each score is reported together with the score of a baseline without context.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.config.errors import RequestError
from llmctl.data.corpus import tokenize
from llmctl.data.pretraining import objective_rows
from llmctl.data.pretraining.lm_corpus import Text
from llmctl.data.splits import Examples
from llmctl.data.tokenizers import loading as tokenizers
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate import perplexity as likelihood
from llmctl.evaluate.setup import Held, Measured, Setup, programs
from llmctl.evaluate.tasks.language import Language, scored, timed
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model.config import ModelConfig


class TextObjective(Language):
    """Measure a model on the rows of a pretraining objective (see `llmctl.data.pretraining.objective_rows`).

    Args:
        name: Name of the objective.
        title: Name of the task in results.
        asked: Description of the targets, such as "15 % of the tokens masked", for the results.
    """

    def __init__(self, name: objective_rows.ObjectiveName, title: str, asked: str) -> None:
        self.name, self.title, self.asked = name, title, asked  # type: ignore[misc]
        self.objective = objective_rows.Objective(name)

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> Any:
        """Build rows for the objective from the texts of the examples.

        Several texts in one row are separate segments.
        """
        documents = settings.corpus(tokenizer) if settings.corpus else tokenize(examples.texts(), tokenizer)
        return self.objective.rows(documents, tokenizer, settings.seq_len, packing="segments", **settings.order)

    def stage_rows(
        self,
        model: ModelConfig,
        text: Text,
        split: str,
        tokenizer: Tokenizer,
        cache: Path,
        settings: RowSettings,
        needed: int = 0,
    ) -> Any:
        """Build rows for the objective from a split of a training stage's data.

        The texts may have been tokenized before (`llmctl prepare`). Several corpora are mixed by weight.
        """
        objective_rows.check(self.name, model.architecture, model.next_sentence)
        return text.rows(
            split, tokenizer, settings.seq_len, cache,
            seed=settings.seed, shuffle=settings.shuffle, needed=needed, objective=self.objective,
        )  # fmt: skip

    def check_model(self, model: ModelConfig, where: str) -> None:
        """Check that the model has the language-model head and that the objective supports its architecture.

        Raises:
            RequestError: If the model has another head, or an architecture that the objective does not support.
        """
        super().check_model(model, where)
        objective_rows.check(self.name, model.architecture, model.next_sentence)

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure the loss and the accuracy of predicting the targets in all rows of the held-out texts."""
        tokenizer = tokenizers.load(artifact.tokenizer_dir)
        settings = RowSettings(setup.seq_len, corpus=held.corpus)
        rows = self.rows(artifact.model, held.examples, tokenizer, settings)
        step, metrics = scored(self, artifact, rows, setup, tuple(self.objective.sentinels(tokenizer)))
        protocol = f"{held.split} split, {len(held.examples)} examples in {len(rows)} rows of {setup.seq_len} tokens, "
        return timed(self, f"{protocol}{self.asked}, {setup.dtype}", metrics, artifact, rows, step, setup)


class Causal(TextObjective):
    """Measure next-token prediction of a decoder by sliding windows over each text separately."""

    def compares(self, model: ModelConfig, columns: Iterable[str]) -> bool:
        """Return True: two artifacts can be compared by the log-likelihood of each document."""
        return True

    def evaluate(self, artifact: Artifact, held: Held, setup: Setup) -> Measured:
        """Measure the perplexity of the held-out texts per token, per word and per byte."""
        tokenizer = tokenizers.load(artifact.tokenizer_dir)
        texts = list(held.examples.texts())
        return sliding(self, artifact, held, setup, tokenizer, texts, held.corpus(tokenizer))


def sliding(
    task: Language,
    artifact: Artifact,
    held: Held,
    setup: Setup,
    tokenizer: Tokenizer,
    texts: list[str],
    documents: Any,
    given: list[int] | None = None,
) -> Measured:
    """Measure a decoder's perplexity on documents with sliding windows.

    Args:
        task: Task of the artifact. The speed of the program that `task.scorer` returns is measured.
        artifact: The decoder.
        held: The split of the data, for the description of the measurement.
        setup: Context, stride, batch size and dtype.
        tokenizer: The artifact's tokenizer.
        texts: Scored texts. Their words and bytes are counted, for the perplexity per word and the bits per byte.
        documents: Token ids of the scored texts.
        given: Number of tokens at the beginning of each document that are context only, such as a prompt. If None, all
            tokens are scored.

    Raises:
        RequestError: If the context has no room for text after a trained prompt.
    """
    # Every window begins with a trained prompt, so each advances by at most the rest of the context.
    room = setup.seq_len - len(tokenizer.prefix)
    if room < 1:
        raise RequestError(
            f"seq_len = {setup.seq_len:,}: no room for text after the trained prompt of {len(tokenizer.prefix):,} "
            "tokens; set a larger seq_len"
        )
    stride = min(setup.stride, room)
    # Without BOS in training a model cannot predict first tokens.
    prefix = tokenizer.begin or None
    nll_D, tokens_D = likelihood.document_nll(
        artifact.model,
        artifact.params,
        documents,
        prefix,
        context=setup.seq_len,
        stride=stride,
        batches=setup.batches(),
        given=given,
        repeated=len(tokenizer.prefix),
        dtype=setup.dtype,
    )
    protocol = likelihood.Protocol(
        held.split,
        len(texts),
        setup.seq_len,
        stride,
        setup.dtype,
        first=given is not None or prefix is not None,
        unit="document" if given is None else "completion",
    )
    full = np.ones((setup.batch_size, setup.seq_len), np.int32)
    inputs = {
        "tokens": full,
        "targets": full,
        "weights": full.astype(np.float32),
        "segments": full,
        "positions": full * np.arange(setup.seq_len, dtype=np.int32),
    }
    single, batched = programs(task.scorer(artifact.model, setup.dtype), artifact.params, inputs, setup.mesh)
    units = {"tokens_per_second": setup.batch_size * setup.seq_len}
    metrics = likelihood.metrics(float(nll_D.sum()), likelihood.count(texts, int(tokens_D.sum())))
    each = [likelihood.count([text], 0) for text in texts]
    values = {
        "document_nll": nll_D,
        "document_tokens": tokens_D,
        "document_words": np.array([count.words for count in each]),
        "document_bytes": np.array([count.bytes for count in each]),
    }
    return Measured(task.title, str(protocol), metrics, single, batched, units, values=values)


CAUSAL = Causal("causal", "perplexity", "")
MASKED = TextObjective("masked", "masked tokens", "15 % of the tokens masked")
NEXT_SENTENCE = TextObjective(
    "next_sentence", "masked tokens, next sentences", "15 % of the tokens masked, half of the pairs true"
)
SPANS = TextObjective("spans", "spans", "15 % of the tokens dropped in spans of 3")
PREFIX = TextObjective("prefix", "rest of a text", "the rest of each text after a prefix")

"""Token classification: one label per word, such as named entities or parts of speech.

Shapes: B rows, T tokens per row, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact
from llmctl.data.config import Truncate
from llmctl.data.examples.token_labels import TagRows
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.metrics import classification, entities, entity_counts
from llmctl.evaluate.setup import Batch, Held, Setup, label_map
from llmctl.evaluate.tasks.base import Corpora, Found, Options, Scored
from llmctl.evaluate.tasks.classify import Classify
from llmctl.model.config import ModelConfig
from llmctl.model.losses import Sums, class_sums, soft_class_sums


class Tokens(Classify):
    """Cross-entropy at the first token of each word; accuracy per word, and F1 of entities if the labels mark them."""

    name = "tokens"
    head = "tokens"
    title = "token classification"
    architectures = ("decoder", "encoder")
    columns = ("tokens", "tags")
    answers = False
    peft_type = "TOKEN_CLS"

    def rows(
        self,
        model: ModelConfig,
        examples: Examples,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int = 0,
        shuffle: bool,
        truncate: Truncate = "tail",
        corpus: Corpora | None = None,
    ) -> TagRows:
        """Return one text per row, with a target at the first token of each word."""
        return TagRows(examples, tokenizer, seq_len, seed=seed, shuffle=shuffle)

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return the F1 of entities if the labels mark them, else accuracy."""
        return "entity_f1" if entities.is_scheme(labels) else "accuracy"

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the cross-entropy of logits [B, T, C] at the first token of each word."""
        targets_BT, weights_BT = batch["targets"], batch["weights"]
        loss, sums = class_sums(y, targets_BT, weights_BT, options.label_smoothing, options.z_loss)
        if (marks := entities.marks(options.labels)) is not None:
            sums |= entity_counts.sums(marks, targets_BT, y.argmax(-1), weights_BT, batch.get("order"))
        return loss, sums

    def soft_score(
        self, teacher: jax.Array, y: jax.Array, batch: Batch, temperature: float, hard: float
    ) -> tuple[jax.Array, Sums]:
        """Return the softened divergence from the teacher's logits [B, T, C], mixed with the cross-entropy."""
        return soft_class_sums(teacher, y, batch["targets"], batch["weights"], temperature, hard)

    def metrics(self, artifact: Artifact, examples: Examples, rows: TagRows, found: Found) -> Scored:
        """Return scores of words, and of entities if the labels mark them."""
        names = artifact.manifest.labels
        truth_of = label_map(examples.classes, names, str(artifact.path))
        truth: list[np.ndarray] = []
        predicted: list[np.ndarray] = []
        for batch, predicted_BT in found:
            for words_T, truth_T, predicted_T in zip(batch["weights"] > 0, batch["targets"], predicted_BT, strict=True):
                truth.append(truth_of[truth_T[words_T]])
                predicted.append(predicted_T[words_T])
        confusion = classification.confusion_matrix(np.concatenate(truth), np.concatenate(predicted), len(names))
        scored = classification.scores(confusion, names)
        metrics = {k: scored[k] for k in ("accuracy", "macro_f1")} | {"examples": len(examples)}
        metrics |= {"words": rows.words, "words_cut": rows.cut}
        if entities.is_scheme(names):
            metrics |= entities.scores(*([[names[i] for i in text] for text in side] for side in (truth, predicted)))
        return metrics, None

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: TagRows, metrics: dict[str, Any]) -> str:
        """Return which words were counted, and how entities were compared."""
        text = f"{held.split} split, {len(held.examples)} examples, labels at the first token of a word, "
        text += f"{rows.words - rows.cut} of {rows.words} words within {setup.seq_len} tokens, {setup.dtype}"
        marks = entities.is_scheme(artifact.manifest.labels)
        return text + (", entities exact in type and ends (conlleval)" if marks else "")


TASK = Tokens()

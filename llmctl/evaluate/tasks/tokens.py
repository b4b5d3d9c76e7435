"""Classify tokens: predict one label per word, such as named entities or parts of speech.

Shapes: B rows, T tokens per row, W words per row, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.data.examples.token_labels import TagRows
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.data.tokenizers.base import Tokenizer
from llmctl.evaluate.metrics import classification, entities, entity_counts
from llmctl.evaluate.setup import Batch, Held, Setup, label_map
from llmctl.evaluate.tasks.classify import Classify
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.predictions import Outputs, named, new_examples, short
from llmctl.evaluate.tasks.rows import RowSettings
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import SoftLoss
from llmctl.model.losses import Sums, class_sums, soft_class_sums


class Tokens(Classify):
    """Train with cross-entropy at the first token of each word; measure accuracy per word.

    If the labels are entity tags, entity F1 is also measured.
    """

    name = "tokens"
    head = "tokens"
    title = "token classification"
    calibrates = False
    packs = False
    architectures = ("decoder", "encoder")
    columns = ("tokens", "tags")
    asks = ()
    text_field = "tags"
    answers = False
    peft_type = "TOKEN_CLS"

    def rows(self, model: ModelConfig, examples: Examples, tokenizer: Tokenizer, settings: RowSettings) -> TagRows:
        """Return rows of one text each, with a target label at the first token of each word."""
        return TagRows(examples, tokenizer, settings.seq_len, **settings.order)

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return the validation metric that selects the best checkpoint: "entity_f1" for entity tags, else
        "accuracy".
        """
        return "entity_f1" if entities.is_scheme(labels) else "accuracy"

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the cross-entropy and the metrics, both summed over the batch, from logits [B, T, C].

        Only the first token of each word counts.
        """
        targets_BT, weights_BT = batch["targets"], batch["weights"]
        loss, sums = class_sums(y, targets_BT, weights_BT, options.label_smoothing, options.z_loss)
        if (marks := entities.marks(options.labels)) is not None:
            sums |= entity_counts.sums(marks, targets_BT, y.argmax(-1), weights_BT, batch.get("order"))
        return loss, sums

    def decided(self, y: jax.Array, batch: Batch) -> Batch:
        """Return {"targets": most probable class of each token}, from logits [B, T, C]."""
        return {"targets": y.argmax(-1)}

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss of logits [B, T, C], the weighted sum of divergence and cross-entropy."""
        return soft_class_sums(teacher, y, batch["targets"], batch["weights"], how)

    def weighted(self, batch: Batch, weight_C: jax.Array) -> Batch:
        """Return the batch with the loss weight of each word multiplied by the weight of the word's class."""
        return batch | {"weights": batch["weights"] * weight_C[batch["targets"]]}

    def new_rows(self, model: ModelConfig, rows: Sequence[Row], tokenizer: Tokenizer, settings: RowSettings) -> TagRows:
        """Return tokenized model inputs for new rows of the user.

        If a row has no column `tokens`, its text is split into words at white space.
        """
        words = [row.get("tokens") or row["text"].split() for row in rows]
        filled = [{"tokens": w, "tags": [settings.labels[0]] * len(w)} for w in words]
        examples = new_examples(filled, ("tokens", "tags"), settings.labels)
        return TagRows(examples, tokenizer, settings.seq_len, shuffle=False)

    def predictions(self, count: int, rows: TagRows, outputs: Outputs) -> list[Any]:
        """Return the class probabilities [W, C] of each row's words; NaN for words beyond the sequence length."""
        found: list[Any] = [None] * count
        for index_B, batch, p_BTC in outputs:
            for i, weight_T, p_TC in zip(index_B, batch["weights"], p_BTC, strict=True):
                found[i] = np.full((rows.count_of(i), p_TC.shape[-1]), np.nan, np.float32)
                found[i][rows.seen_of(i)] = p_TC[weight_T > 0]
        return found

    def answer(self, row: Row, prediction: np.ndarray, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Return the words, and the most likely label of each word with the probability of the label.

        Labels and probabilities are null for words beyond the sequence length. If `every` is true, the probabilities of
        all classes are included.
        """
        names = manifest.labels
        read_W = np.asarray(np.isfinite(prediction).all(-1))
        best_W = np.where(read_W, np.nan_to_num(prediction).argmax(-1), 0)
        tags = [names[k] if read else None for k, read in zip(best_W, read_W, strict=True)]
        p_W = prediction[np.arange(len(best_W)), best_W]
        found: dict[str, Any] = {
            "tokens": row.get("tokens") or row["text"].split(),
            "tags": tags,
            "tag_probabilities": [short(p) if read else None for p, read in zip(p_W, read_W, strict=True)],
        }
        every_W = [named(names, p_C) if read else None for p_C, read in zip(prediction, read_W, strict=True)]
        return found | ({"probabilities": every_W} if every else {})

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes the most likely class of each token, [B, T].

        Its arguments are the parameters and a batch.
        """

        @jax.jit
        def predict(params: functional.Params, batch: Batch) -> jax.Array:
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            return functional.outputs(model, params, x_BTD, batch, dtype).argmax(-1)

        return predict

    def metrics(self, artifact: Artifact, examples: Examples, rows: TagRows, found: Found) -> Scores:
        """Return accuracy and macro F1 over words; if the labels are entity tags, also the entity metrics."""
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
        right = [((t == p).sum(), len(t)) for t, p in zip(truth, predicted, strict=True)]
        values = {"accuracy": np.array(right).reshape(-1, 2)}
        if entities.is_scheme(names):
            tags = [[[names[i] for i in text] for text in side] for side in (truth, predicted)]
            metrics |= entities.scores(*tags)
            values |= entities.counts(*tags)
        return Scores(metrics, values=values)

    def protocol(self, artifact: Artifact, held: Held, setup: Setup, rows: TagRows, metrics: dict[str, Any]) -> str:
        """Return a description of the measurement: the number of counted words, and the rule by which entities are
        compared.
        """
        text = f"{held.split} split, {len(held.examples)} examples, labels at the first token of a word, "
        text += f"{rows.words - rows.cut} of {rows.words} words within {setup.seq_len} tokens, {setup.dtype}"
        marks = entities.is_scheme(artifact.manifest.labels)
        return text + (", entities exact in type and ends (conlleval)" if marks else "")


TASK = Tokens()

"""Classify a text, or a pair of texts, into one class per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.errors import RequestError
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.evaluate.metrics import calibration, classification
from llmctl.evaluate.setup import Batch, Setup, answers, label_map
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.predictions import named, short
from llmctl.evaluate.tasks.rows import KINDS
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import SoftLoss
from llmctl.model.losses import Sums, class_sums, row_weight, soft_class_sums


class Classify(Task):
    """Train with softmax cross-entropy; measure accuracy, F1 and the confusion matrix.

    Classes of the data and of the model are matched by name.

    Shapes: B rows, C classes.
    """

    name = "classify"
    head = "classify"
    title = "classification"
    calibrates = True
    packs = True
    architectures = ("decoder", "encoder", "encoder_decoder")
    label_type = "class"
    classes = True
    perturbs = ("text", "pair")
    peft_type = "SEQ_CLS"

    def best(self, labels: Sequence[str] = ()) -> str:
        """Return "accuracy", the validation metric that selects the best checkpoint."""
        return "accuracy"

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the summed cross-entropy of logits [B, C], and the metrics summed over the batch."""
        label_B = batch["label"]
        return class_sums(y, label_B, row_weight(batch, label_B), options.label_smoothing, options.z_loss)

    def decided(self, y: jax.Array, batch: Batch) -> Batch:
        """Return {"label": most probable class of each row}, from logits [B, C]."""
        return {"label": jnp.argmax(y, axis=-1)}

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss of logits [B, C], and the metrics summed over the batch.

        The loss is the weighted sum of cross-entropy and divergence from the teacher.
        """
        return soft_class_sums(teacher, y, batch["label"], row_weight(batch, y), how)

    def weighted(self, batch: Batch, weight_C: jax.Array) -> Batch:
        """Return the batch with the loss weight of each row multiplied by the weight of the row's class.

        As in torch's `CrossEntropyLoss`, the mean loss is the weighted sum of losses divided by the sum of weights.
        """
        label_B = batch["label"]
        return batch | {"row_weight": row_weight(batch, label_B) * weight_C[label_B]}

    def check_examples(self, artifact: Artifact, examples: Examples) -> None:
        """Check the type of the labels, and that the model has every class of the data.

        Raises:
            RequestError: If the labels have another type, or if the model lacks a class.
        """
        sets = examples.labels is not None and examples.labels.ndim > 1
        if examples.classes and sets != (self.label_type == "set"):
            kind = KINDS[self.label_type]
            raise RequestError(f'{artifact.path}: predicts {kind}; set data.label_type = "{self.label_type}"')
        label_map(examples.classes, artifact.manifest.labels, str(artifact.path))

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that computes logits [B, C]. Its arguments are the parameters and a batch."""

        @jax.jit
        def predict(params: functional.Params, batch: Batch) -> jax.Array:
            return functional.outputs(model, params, functional.hidden(model, params, batch, dtype=dtype), batch, dtype)

        return predict

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scores:
        """Return the metrics, the true and predicted class names, and a record of each wrong prediction.

        The metrics describe the confusion matrix and the calibration of the probabilities.
        """
        names = artifact.manifest.labels
        truth_of = label_map(examples.classes, names, str(artifact.path))
        label_N, logits_NC = map(np.concatenate, zip(*((truth_of[b["label"]], y) for b, y in found), strict=True))
        return scores(examples, names, label_N, logits_NC)

    def calibrated(
        self, model: ModelConfig, params: functional.Params, rows: Any, setup: Setup
    ) -> tuple[functional.Params, dict[str, Any]]:
        """Scale the head's matrix and bias, so that the logits are divided by a temperature fitted on `rows`.

        The temperature minimizes the log loss. Predicted classes do not change, and exported models have the same
        probabilities.

        Returns:
            The parameters, and the metrics "temperature" and "ece" (before and after).
        """
        found = answers(self.scorer(model, setup.dtype), params, rows, setup, self.reads)
        label_N, logits_NC = map(np.concatenate, zip(*((b["label"], y) for b, y in found), strict=True))
        divisor = calibration.temperature(logits_NC, label_N)
        out = {name: a / divisor for name, a in params["head"]["out"].items()}
        scaled = {**params, "head": {**params["head"], "out": out}}
        before, after = (calibration.scores(calibration.softmax(logits_NC / t), label_N) for t in (1.0, divisor))
        return scaled, {"temperature": divisor, "ece_uncalibrated": before["ece"], "ece": after["ece"]}

    def prediction(self, y: jax.Array, batch: Batch) -> jax.Array:
        """Return class probabilities [B, C] in float32 from logits."""
        return jax.nn.softmax(y.astype(jnp.float32), axis=-1)

    def answer(self, row: Row, prediction: np.ndarray, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Return the most likely class and its probability; if `every` is true, also the probability of every class."""
        best = int(prediction.argmax())
        found: dict[str, Any] = {"label": manifest.labels[best], "probability": short(prediction[best])}
        return found | ({"probabilities": named(manifest.labels, prediction)} if every else {})


def scores(examples: Examples, names: Sequence[str], label_N: np.ndarray, logits_NC: np.ndarray) -> Scores:
    """Return the metrics of a classifier, the true and predicted class names, and a record of each wrong prediction.

    Args:
        examples: Classified examples.
        names: Names of the C classes of the classifier.
        label_N: True class of each example, an index into `names`.
        logits_NC: Logits of the classes.
    """
    p_NC = calibration.softmax(logits_NC)
    predicted_N = logits_NC.argmax(-1)
    confusion = classification.confusion_matrix(label_N, predicted_N, len(names))
    class_names = [names[i] for i in label_N], [names[i] for i in predicted_N]
    scored = classification.scores(confusion, names) | calibration.scores(p_NC, label_N)
    values = {"label": label_N, "prediction": predicted_N, "accuracy": predicted_N == label_N}
    values |= {"log_loss": calibration.log_losses(p_NC, label_N)}
    return Scores(scored, class_names, wrong_cases(examples, names, label_N, p_NC), values)


def wrong_cases(
    examples: Examples, names: Sequence[str], label_N: np.ndarray, p_NC: np.ndarray
) -> list[dict[str, Any]]:
    """Return a record of each wrong prediction with its row, texts, classes and probabilities, most confident first."""
    wrong = np.flatnonzero(p_NC.argmax(-1) != label_N)
    records = []
    for i in wrong[np.argsort(-p_NC[wrong].max(-1), kind="stable")]:
        number = int(examples.index[i])
        row: Row = examples.source[number]
        best = int(p_NC[i].argmax())
        texts = {column: row[column] for column in ("text", "pair") if column in row}
        classes_of_row = {"label": names[int(label_N[i])], "prediction": names[best]}
        sure = {"probability": short(p_NC[i, best]), "label_probability": short(p_NC[i, label_N[i]])}
        records.append({"row": examples.source.where(number), **texts, **classes_of_row, **sure})
    return records


TASK = Classify()

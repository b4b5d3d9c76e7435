"""Predict one number per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llmctl.artifacts.artifact import Artifact, Manifest
from llmctl.config.errors import RequestError
from llmctl.data.source import Row
from llmctl.data.splits import Examples
from llmctl.evaluate.metrics import regression
from llmctl.evaluate.setup import Batch
from llmctl.evaluate.tasks.base import Task
from llmctl.evaluate.tasks.evaluation import Found, Scores
from llmctl.evaluate.tasks.losses import Options
from llmctl.evaluate.tasks.predictions import short
from llmctl.model import functional
from llmctl.model.config import ModelConfig
from llmctl.model.divergences import SoftLoss
from llmctl.model.losses import Sums, number_sums, row_weight, soft_number_sums


class Regress(Task):
    """Train a regression head with the squared error. Report correlations, and errors in the label's unit."""

    name = "regress"
    head = "regress"
    title = "regression"
    label_type = "number"
    perturbs = ("text", "pair")
    text_field = "value"
    packs = True
    peft_type = "SEQ_CLS"
    problem_type = "regression"

    def score(self, y: jax.Array, batch: Batch, options: Options) -> tuple[jax.Array, Sums]:
        """Return the summed squared error of predictions [B], and the metrics summed over the batch."""
        return number_sums(y, batch["label"], row_weight(batch, batch["label"]))

    def mean_output(self, outputs: Sequence[jax.Array], batch: Batch, temperature: float) -> jax.Array:
        """Return the predicted numbers [B], averaged over the teachers."""
        return sum(outputs[1:], outputs[0]) / len(outputs)

    def soft_score(self, teacher: jax.Array, y: jax.Array, batch: Batch, how: SoftLoss) -> tuple[jax.Array, Sums]:
        """Return the distillation loss of predictions [B].

        The loss is the weighted sum of the squared errors to the teacher and to the labels.
        """
        return soft_number_sums(teacher, y, batch["label"], row_weight(batch, y), how)

    def check_examples(self, artifact: Artifact, examples: Examples) -> None:
        """Check that the labels of the data are numbers.

        Raises:
            RequestError: If the labels are classes.
        """
        if examples.classes:
            raise RequestError(f'{artifact.path}: predicts numbers; set data.label_type = "number"')

    def scorer(self, model: ModelConfig, dtype: str) -> Any:
        """Return a compiled function that predicts numbers [B]. Its arguments are the parameters and a batch."""

        @jax.jit
        def predict(params: functional.Params, batch: Batch) -> jax.Array:
            x_BTD = functional.hidden(model, params, batch, dtype=dtype)
            return functional.outputs(model, params, x_BTD, batch, dtype)

        return predict

    def metrics(self, artifact: Artifact, examples: Examples, rows: Any, found: Found) -> Scores:
        """Return errors and correlations, and the true and predicted numbers of all examples."""
        pairs = [(batch["label"], predicted) for batch, predicted in found]
        truth_N, predicted_N = map(np.concatenate, zip(*pairs, strict=True))
        values = {"label": truth_N, "prediction": predicted_N}
        return Scores(regression.scores(truth_N, predicted_N), (truth_N, predicted_N), values=values)

    def hf_fields(self, model: ModelConfig, labels: Sequence[str], fitted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of config.json for one output without a class name, with the problem type "regression"."""
        return {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": self.problem_type}

    def answer(self, row: Row, prediction: Any, manifest: Manifest, every: bool) -> dict[str, Any]:
        """Format the prediction for one row as JSON data: {"value": predicted number}."""
        return {"value": short(prediction)}


TASK = Regress()

"""Define how a task is described in the files of other libraries: Hugging Face's config.json and PEFT's adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.evaluate.tasks.record import TaskRecord
from llmctl.model.config import ModelConfig
from llmctl.model.hf_config import Keys


class ExportMethods(TaskRecord):
    """Define the methods of a task that export and import call."""

    def hf_fields(self, model: ModelConfig, labels: Sequence[str], fitted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of Hugging Face's config.json that describe the outputs, such as `id2label`.

        Args:
            model: Config of the model.
            labels: Class names.
            fitted: Values that were fitted on validation rows after training, such as the decision threshold of each
                class.
        """
        if not self.classes:
            return {}
        names = list(labels) or [f"LABEL_{i}" for i in range(model.labels)]
        fields = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        return fields | ({"problem_type": self.problem_type} if self.problem_type else {})

    def fitted_of(self, keys: Keys, labels: Sequence[str]) -> dict[str, Any]:
        """Return the fitted values in a config.json, such as decision thresholds, by name. If there are no such values,
        return {}.
        """
        return {}

    def peft_task_type(self, model: ModelConfig) -> str:
        """Return PEFT's `task_type` for a model of this task."""
        return "SEQ_2_SEQ_LM" if model.encoder_layers else self.peft_type

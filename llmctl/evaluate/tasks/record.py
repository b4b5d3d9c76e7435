"""Define the record of a task: the class attributes that describe the task to the stages, `eval`, `predict` and
`plan`."""

from __future__ import annotations

from typing import ClassVar

from llmctl.evaluate.setup import READ
from llmctl.model.config import ModelConfig


class TaskRecord:
    """Describe one task by class attributes.

    The defaults suit tasks that read one text, or a pair of texts, per row.
    """

    name: ClassVar[str]
    """Name of the task in the registry of tasks."""
    head: ClassVar[str]
    """Model head that the task needs, a key of `llmctl.model.head_kinds.HEAD_KINDS`."""
    title: ClassVar[str]
    """Name of the task in the results of an evaluation."""
    architectures: ClassVar[tuple[str, ...]] = ("decoder", "encoder")
    """Model architectures that support the task."""
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    """Columns that labelled rows must have, by llmctl's own column names (see `data.columns`)."""
    columns_read: ClassVar[tuple[str, ...]] = ()
    """Columns that rows without labels must have, by llmctl's own column names; if empty, one text column is enough."""
    label_type: ClassVar[str] = ""
    """Required value of `data.label_type`; empty accepts every value."""
    classes: ClassVar[bool] = False
    """Whether labels are classes. The model then has one output per class, and the artifact stores the class names."""
    reads_conversations: ClassVar[bool] = False
    """Whether the task's rows are conversations, from the columns messages and tools."""
    completes_prompts: ClassVar[bool] = False
    """Whether `predict` generates an answer to each row."""
    generates: ClassVar[bool] = False
    """Whether validation and evaluation generate answers, with the settings of the section `generation`."""
    calibrates: ClassVar[bool] = False
    """Whether `calibrated` can scale the probabilities of the classes."""
    distilled_as: ClassVar[str] = ""
    """Name of the task that `distill` trains a student on if its teacher has this task; empty for the same task."""
    pooling: ClassVar[str] = ""
    """Default pooling of hidden states to one vector per sequence; empty keeps the pooling of the model."""
    section: ClassVar[str] = ""
    """Section of the `finetune` settings that belongs to this task; empty if the task has no settings."""
    answers: ClassVar[bool] = True
    """Whether `metrics` also returns true labels and predictions, which user-selected metrics need."""
    perturbs: ClassVar[tuple[str, ...]] = ()
    """Columns whose texts the probe `robustness` changes. If empty, the probe does not support the task. Otherwise,
    `metrics` must return the values per example "prediction", which the probe compares."""
    packs: ClassVar[bool] = False
    """Whether the outputs are those of the task head, one per text. Evaluation then packs several texts into a row."""
    reads: ClassVar[tuple[str, ...]] = READ
    """Names of the batch arrays that `scorer` reads; empty means all."""
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    """Value of `task_type` in a PEFT adapter's config."""
    problem_type: ClassVar[str] = ""
    """Value of `problem_type` in Hugging Face's config.json; empty omits the field."""

    def head_for(self, model: ModelConfig) -> str:
        """Return the head that a model of the given architecture needs, a key of `HEAD_KINDS`."""
        return self.head

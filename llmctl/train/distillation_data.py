"""Check that the data of a distillation has the teacher's classes, and the columns that the mode reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.data.class_names import numbers_hint

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Artifact
    from llmctl.data.pretraining.lm_corpus import Text
    from llmctl.train.learner import Learner


def check(config: Any, learner: Learner, teacher: Artifact, text: Text) -> None:
    """Check the classes and columns of the data.

    Args:
      config: config of the stage `distill`.
      learner: the student.
      teacher: the teacher. The arrays may be abstract.
      text: data of the stage.

    Raises:
      RequestError: If the classes of the data are not the teacher's classes. If the data has no prompts with
          completions, although the mode `on_policy` or the training without a teacher needs them.
    """
    labels = teacher.manifest.labels
    if labels and list(text.classes) != labels:
        advice = numbers_hint(text.classes, labels)
        raise RequestError(f"data: classes {list(text.classes)} are not the teacher's {labels}{advice}")
    completed = learner.task.reads_conversations or {"prompt", "completion"} <= set(text.columns)
    if config.mode == "on_policy" and not completed:
        raise RequestError('mode = "on_policy": the data has no prompts with completions; map them in data.columns')
    if config.mode == "sequence" and config.compare_without_teacher and not completed:
        raise RequestError(
            "compare_without_teacher: the data has no completions to learn without the teacher; map data.columns."
            "completion, or leave the comparison out"
        )

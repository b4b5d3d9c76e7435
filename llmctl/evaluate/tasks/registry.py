"""Registry of tasks. A task's module is imported when the task is first used, so listing names does not import JAX.

Another package adds a task by an entry point:

    [project.entry-points."llmctl"]
    "task.ordinal" = "my_package.ordinal:TASK"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmctl.config.registry import Registry

if TYPE_CHECKING:
    from llmctl.artifacts.artifact import Manifest
    from llmctl.evaluate.tasks.base import Task
    from llmctl.model.config import ModelConfig

TASKS: Registry[Task] = Registry(
    "task",
    {
        "classify": "llmctl.evaluate.tasks.classify:TASK",
        "multilabel": "llmctl.evaluate.tasks.multilabel:TASK",
        "regress": "llmctl.evaluate.tasks.regress:TASK",
        "tokens": "llmctl.evaluate.tasks.tokens:TASK",
        "span": "llmctl.evaluate.tasks.span:TASK",
        "embed": "llmctl.evaluate.tasks.embed:TASK",
        "lm": "llmctl.evaluate.tasks.language:TASK",
        "causal": "llmctl.evaluate.tasks.objectives:CAUSAL",
        "masked": "llmctl.evaluate.tasks.objectives:MASKED",
        "next_sentence": "llmctl.evaluate.tasks.objectives:NEXT_SENTENCE",
        "spans": "llmctl.evaluate.tasks.objectives:SPANS",
        "prefix": "llmctl.evaluate.tasks.objectives:PREFIX",
        "completions": "llmctl.evaluate.tasks.completions:TASK",
    },
)
"""Tasks by name. The task with the name of a head is the default for artifacts that name no task. "lm" selects one of
the tasks after it by data columns and architecture."""

OF_LM = ("causal", "masked", "next_sentence", "spans", "prefix", "completions")
"""Tasks that "lm" selects from."""


def finetuned() -> list[str]:
    """Return the names of the tasks that finetuning accepts. The task "lm" selects those of `OF_LM` itself."""
    return [name for name in TASKS if name not in OF_LM]


def default(model: ModelConfig) -> Task:
    """Return the task that has the name of the model's head."""
    return TASKS[model.head]


def of_problem(head: str, problem_type: object) -> str:
    """Return the name of the task for a head and a `problem_type` of Hugging Face's config.json.

    If no task has both, return the name of the head's default task.
    """
    if not problem_type:
        return head
    return next((n for n in TASKS if (TASKS[n].head, TASKS[n].problem_type) == (head, problem_type)), head)


def of(manifest: Manifest) -> Task:
    """Return the task that an artifact's manifest names, or the default task of its head if it names none."""
    return TASKS[manifest.task] if manifest.task else default(manifest.model)

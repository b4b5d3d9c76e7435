"""Register the tasks by name.

A task's module is imported when the task is first used, so that listing the names does not import JAX. Another package
adds a task by an entry point:

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
        "chat": "llmctl.evaluate.tasks.chat:TASK",
        "choice": "llmctl.evaluate.tasks.choice:TASK",
        "preference": "llmctl.evaluate.tasks.preference:TASK",
        "seq2seq": "llmctl.evaluate.tasks.seq2seq:TASK",
        "lm": "llmctl.evaluate.tasks.language:TASK",
        "causal": "llmctl.evaluate.tasks.objectives:CAUSAL",
        "masked": "llmctl.evaluate.tasks.objectives:MASKED",
        "next_sentence": "llmctl.evaluate.tasks.objectives:NEXT_SENTENCE",
        "spans": "llmctl.evaluate.tasks.objectives:SPANS",
        "prefix": "llmctl.evaluate.tasks.objectives:PREFIX",
        "completions": "llmctl.evaluate.tasks.completions:TASK",
    },
)
"""Tasks by name.

The default task of an artifact has the name of the model's head. The task "lm" selects one of the tasks in `OF_LM` by
data columns and architecture.
"""

OF_LM = ("causal", "masked", "next_sentence", "spans", "prefix", "completions")
"""Names of the tasks that "lm" selects from."""


def finetuned() -> list[str]:
    """Return the names of the tasks that finetuning accepts: all tasks except the tasks in `OF_LM`."""
    return [name for name in TASKS if name not in OF_LM]


def default(model: ModelConfig) -> Task:
    """Return the default task of a model. The task has the name of the model's head."""
    return TASKS[model.head]


def of_problem(head: str, problem_type: object) -> str:
    """Return the name of the task with the given head and the given `problem_type` of Hugging Face's config.json.

    If there is no such task, return the name of the head's default task.
    """
    if not problem_type:
        return head
    return next((n for n in TASKS if (TASKS[n].head, TASKS[n].problem_type) == (head, problem_type)), head)


def of(manifest: Manifest) -> Task:
    """Return the task that an artifact's manifest names, or else the default task of the model's head."""
    return named(manifest.task, manifest.model)


def named(name: str, model: ModelConfig) -> Task:
    """Return the task with the given name. If the name is empty, return the default task of the model."""
    return TASKS[name] if name else default(model)


def distilled(teacher: Manifest) -> str:
    """Return the name of the task that a student learns from a teacher with this manifest.

    The name is empty if the student learns the default task of its head.
    """
    return of(teacher).distilled_as or teacher.task

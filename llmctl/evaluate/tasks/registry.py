"""Registry of tasks. Names need no import of JAX; a record is imported when it is first used.

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
"""Every head has a task of its own name: the default for artifacts that name none. "lm" chooses by the data and the
architecture among the tasks after it."""

OF_LM = ("causal", "masked", "next_sentence", "spans", "prefix", "completions")
"""Tasks among which "lm" chooses."""


def finetuned() -> list[str]:
    """Return the names of the tasks to finetune for. Those of `OF_LM` are chosen by "lm"."""
    return [name for name in TASKS if name not in OF_LM]


def default(model: ModelConfig) -> Task:
    """Return the task that has the name of the model's head."""
    return TASKS[model.head]


def of_problem(head: str, problem_type: object) -> str:
    """Return the name of the task with this head and Hugging Face `problem_type`; else the default of the head."""
    if not problem_type:
        return head
    return next((n for n in TASKS if (TASKS[n].head, TASKS[n].problem_type) == (head, problem_type)), head)


def of(manifest: Manifest) -> Task:
    """Return the task of an artifact: the one that it names, else the default of its head."""
    return TASKS[manifest.task] if manifest.task else default(manifest.model)

"""Check the columns and the first labels of the data that a recipe's stages read, before the first stage runs.

Without this check, a wrong column of the last stage would end the run after hours. Large or prepared data is not
checked, because the check must be fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config.errors import RequestError
from llmctl.data.config import DataConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmctl.pipeline.recipe import Recipe, Step

ROWS = 100
"""Number of rows at the beginning of each source whose labels are checked."""
LARGEST = 64_000_000
"""Largest size in bytes of a csv, jsonl or text file that is checked. Other sources have a schema, which is read
quickly."""


def check(recipe: Recipe, names: Iterable[str] = (), missing: bool = False) -> None:
    """Check the data of the named stages, or of all stages.

    Args:
      recipe: the validated recipe.
      names: stages to check; all if empty.
      missing: whether missing data is accepted, because `plan` and `doctor` need no data.

    Raises:
      RequestError: If the data lacks a column that a stage needs, or a label is not among the classes.
    """
    wanted, seen = set(names), set()
    for step in recipe.steps:
        data = getattr(step.config, "data", None)
        if (wanted and step.name not in wanted) or not isinstance(data, DataConfig) or not step.config.reads_data:
            continue
        columns, (labels, conversations) = needed(recipe, step), _reads(recipe, step)
        if (mark := (data.model_dump_json(), columns, labels, conversations)) not in seen:
            seen.add(mark)
            _check(step.name, data, columns, missing, labels, conversations)


def needed(recipe: Recipe, step: Step) -> tuple[str, ...]:
    """Return the canonical columns, such as `text` and `label`, that a stage's data must have.

    The result is empty if the recipe does not determine the columns.
    """
    if step.config.kind == "pretrain":
        return ("prompt", "completion") if getattr(step.config, "objective", "") == "completions" else ("text",)
    if getattr(step.config, "mode", "") == "sequence":
        return ("prompt",)
    from llmctl.evaluate.tasks.registry import TASKS

    # "lm" reads text, or prompts and completions, as the data has them
    tasks = [TASKS[t] for t in _tasks(recipe, step) if t != "lm"]
    columns = dict.fromkeys(c for task in tasks for c in task.columns)
    return tuple(c for c in columns if c != "pair")  # the pair is optional with scores


def _reads(recipe: Recipe, step: Step) -> tuple[bool, bool | None]:
    """Return whether a task of the stage reads labels, and whether a task of the stage reads conversations.

    The second value is None if the stage's tasks are unknown.
    """
    from llmctl.evaluate.tasks.registry import TASKS

    tasks = [TASKS[task] for task in _tasks(recipe, step)]
    unknown = not tasks and step.config.kind != "pretrain"
    return any(t.reads_labels for t in tasks), None if unknown else any(t.reads_conversations for t in tasks)


def _tasks(recipe: Recipe, step: Step) -> list[str]:
    """Return the tasks that determine the columns of a stage's data.

    The first of these that exist are returned; [] if there are none:

    - the tasks that the stage's config sets
    - the tasks of the artifacts that the config names, such as the teacher in `distill`
    - the parent's task, for `eval`
    """
    if hasattr(step.config, "task"):
        return [str(getattr(step.config, "task", ""))]
    if step.config.kind not in ("distill", "eval"):
        return []
    if step.config.kind == "distill":
        named = [_distilled(recipe, step)]
    else:
        named = [_learned(recipe, read) for read in step.others.values() or [step.parent]]
    chosen: list[str] = list(getattr(step.config, "tasks_on_data", [""]))
    return [task for name in chosen for task in ([name] if name else named) if task]


def _distilled(recipe: Recipe, step: Step) -> str:
    """Return the task that the student of a stage `distill` learns. If no stage of the recipe sets a task, return
    ""."""
    from llmctl.evaluate.tasks.registry import TASKS

    task = _learned(recipe, next(iter(step.others.values()), None))
    return task and (TASKS[task].distilled_as or task)


def _learned(recipe: Recipe, read: str | Path | None) -> str:
    """Return the task that the artifact `read` is trained for.

    The task is a setting of the stage that writes the artifact or of an earlier stage. If no stage sets the task,
    return "".
    """
    steps: dict[Any, Step] = {s.name: s for s in recipe.steps}
    while isinstance(read, str) and read in steps:
        if hasattr(steps[read].config, "task"):
            return str(getattr(steps[read].config, "task", ""))
        if steps[read].config.kind == "distill":
            return _distilled(recipe, steps[read])
        read = steps[read].parent
    return ""


def _check(
    name: str, data: DataConfig, columns: tuple[str, ...], missing: bool, labels: bool, conversations: bool | None
) -> None:
    from llmctl.data import columns as mapping
    from llmctl.data.dedup import scan
    from llmctl.data.source import open_source

    try:
        if any(part.source == "prepared" or _is_large(part) for part in data.sources()):
            return
        for part in data.sources():
            open_source(part)
    except RequestError:
        if missing:
            return
        raise
    try:
        if conversations is None and mapping.holds_conversations(data):
            return  # the artifact may have been trained on conversations, or not
        views = mapping.views(data, labels, bool(conversations))
        pairs = {"prompt", "completion"}
        for view in views:
            absent = [c for c in columns if c not in view.columns]
            if len(view) and absent:
                raise RequestError(
                    f"the data has no column {' and no column '.join(map(repr, absent))}; map it in data.columns "
                    f"(it has: {', '.join(view.columns)})"
                    + '; objective = "completions" trains on these'
                    * (absent == ["text"] and pairs <= set(view.columns))
                )
            scan(data, view, 0, min(ROWS, len(view)))
    except RequestError as e:
        raise RequestError(f"{name}: {e}") from None


def _is_large(part: Any) -> bool:
    files = part.inputs() if part.source in ("csv", "jsonl", "text") else []
    return any("://" in f or Path(f).stat().st_size > LARGEST for f in files)

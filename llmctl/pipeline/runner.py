"""Runs a recipe's steps: what is done already is skipped, what was interrupted goes on, what changed is done again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import artifact, atomic
from llmctl.artifacts.workspace import Context
from llmctl.config.base import Config, hint, keyed
from llmctl.config.errors import LlmctlError, RequestError, WorkError
from llmctl.data.config import SourceConfig
from llmctl.data.sources import SOURCES
from llmctl.distributed import backend
from llmctl.distributed import processes as hosts
from llmctl.pipeline import stage
from llmctl.pipeline.recipe import MANIFEST, out_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from llmctl.pipeline.recipe import Recipe, Step

WORK = ".work"
"""Folder of a run where stages keep what they need while they work."""


@dataclass(frozen=True)
class Task:
    """A step with its key, and whether its artifact is there already."""

    step: Step
    key: str
    why: str
    """Why it has to run, for people; empty when the artifact is up to date."""


def run(
    recipe: Recipe,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
    processes: Mapping[str, Any] | None = None,
) -> list[str]:
    """Runs the steps that are not done.

    Of several processes the first decides what is due and holds the locks; all of them run the stages.

    Args:
      recipe: resolved steps.
      only: names of the steps to run; what they start from must be there and up to date. Empty runs all.
      say: is told one line a step.
      processes: what `llmctl.distributed.processes.join` takes.

    Returns:
      The names of the steps that ran.

    Raises:
      RequestError: a name in `only` is unknown, an input is missing, another process is at work in the same place.
      WorkError, Interrupted: whatever a stage raises.
    """
    names = [s.name for s in recipe.steps]
    for name in only:
        if name not in names:
            raise RequestError(f"--only {name}: no such stage{hint(name, names)}; there are {', '.join(names)}")
    platforms = {s.config.platform for s in recipe.steps if not only or s.name in only} - {""}
    if len(platforms) == 1:  # several are refused once it is known what is due
        backend.choose(platforms)
    hosts.join(**processes or {})
    # All settings, not those of a key alone: a process that saves when others do not waits for them for ever.
    hosts.check_same([[s.config.model_dump(mode="json") for s in recipe.steps], list(only)], "the recipe")
    with hosts.in_turn():  # the first process downloads for all that see its disk
        for step in recipe.steps:
            if not only or step.name in only:
                fetch(step.config)
    found = hosts.tell(lambda: [(t.key, t.why) for t in plan(recipe)])
    tasks = [Task(step, key, why) for step, (key, why) in zip(recipe.steps, found, strict=True)]
    wanted = [t for t in tasks if not only or t.step.name in only]
    _inputs_are_there(tasks, wanted, bool(only))
    due = [t for t in wanted if t.why]
    one = len(recipe.steps) == 1
    with lock(recipe.run / WORK / "run.lock", shared=one):
        hosts.check_shared(recipe.run / WORK)
        if due:
            backend.settle((t.step.config.platform for t in due), say)
        for i, task in enumerate(wanted, 1):
            name = task.step.name
            with lock(recipe.run / WORK / f"{name}.lock") if one else contextlib.nullcontext():
                if hosts.tell(lambda task=task: not task.why or _is_done(task)):
                    if hosts.first():  # of a process killed at its very end
                        shutil.rmtree(recipe.run / WORK / name, ignore_errors=True)
                    say(f"[{i}/{len(wanted)}] {name}: up to date, skipped")
                    continue
                source = f" from {out_name(task.step.parent)}" if task.step.parent else ""
                say(f"[{i}/{len(wanted)}] {name}{source}: {task.why}")
                _do(recipe, task, say)
    return [t.step.name for t in due]


def plan(recipe: Recipe) -> list[Task]:
    """Every step with its key and whether it is due, from the recipe and what lies on the disk; runs nothing.

    Raises:
      RequestError: an input file or a folder that is started from is missing or damaged.
    """
    keys: dict[str, str] = {}
    tasks: list[Task] = []
    for step in recipe.steps:
        parent = _key_of(step.parent, keys) if step.parent else None
        others = [[n, _key_of(a, keys)] for n, a in step.others.items()]
        keys[step.name] = key(step.config, parent, others)
        tasks.append(Task(step, keys[step.name], _why(step, keys[step.name], {t.step.name for t in tasks if t.why})))
    return tasks


def key(config: stage.StageConfig, parent: str | None, others: Sequence[Sequence[str]] = ()) -> str:
    """The content key of a stage's result: equal keys mean equal results.

    sha256 over the canonical JSON of the config without its unkeyed fields, the keys of all artifacts it reads, the
    content of its input files, and the version of the artifact format.

    Raises:
      RequestError: an input file is missing.
    """
    settings = {k: v for k, v in keyed(config).items() if k not in config.artifact_fields}
    files = [_content(str(path)) for path in inputs(config)]
    what = {"format": artifact.FORMAT, "config": settings, "parent": parent, "others": list(others), "files": files}
    text = json.dumps(what, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs(config: Any) -> list[Any]:
    """The files that a config reads, those of its sections included: each settings class may have `inputs()`."""
    return [path for section in sections(config) if hasattr(section, "inputs") for path in section.inputs()]


def sections(config: Any) -> Iterator[Any]:
    """A config and everything in it that has settings of its own."""
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from sections(part)
    elif isinstance(config, Config):
        yield config
        for name in type(config).model_fields:
            yield from sections(getattr(config, name))


def fetch(config: Any) -> None:
    """Downloads what a config may download and is not there: before keys are taken, which are over what is read."""
    for section in sections(config):
        if isinstance(section, SourceConfig):
            SOURCES[section.source].fetch(section)


@contextlib.contextmanager
def lock(path: Path, shared: bool = False) -> Iterator[None]:
    """Holds `path` for this process (for all of a run, in the first); the kernel lets go of it however it ends.

    Raises:
      RequestError: another process holds it.
    """
    if not hosts.first():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip()
            raise RequestError(
                f"{path.parent.parent}: another llmctl{f' (process {who})' if who else ''} is at work there"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _do(recipe: Recipe, task: Task, say: Callable[[str], None]) -> None:
    step = task.step
    work = recipe.run / WORK / step.name
    made = hosts.tell(lambda: _begin(step, work, task.key, say))

    def folder(of: str | Path) -> Path:
        return of if isinstance(of, Path) else recipe.run / of

    siblings = {name: folder(of) for name, of in step.others.items()}
    parent = folder(step.parent) if step.parent else None
    try:
        stage.load(step.config.kind).run(step.config, parent, Context(step.out, work, task.key, siblings))
    except RequestError:
        if made and hosts.first():  # a request that was wrong leaves nothing behind
            shutil.rmtree(work, ignore_errors=True)
        raise
    if not hosts.tell(lambda: _manifest_key(step.out) == task.key):
        raise WorkError(f"{step.name}: the stage ended without leaving its artifact in {step.out}")
    if hosts.first():
        shutil.rmtree(work)


def _begin(step: Step, work: Path, key: str, say: Callable[[str], None]) -> bool:
    """Makes the stage's scratch folder ready, whatever an earlier run left there; whether it is new."""
    artifact.check_place(step.out)
    note = work / "key"
    if work.exists() and (not note.exists() or note.read_text() != key):
        say(f"{step.name}: its settings changed since it was interrupted; {work} is discarded")
        shutil.rmtree(work)
    made = not work.exists()
    if not note.exists():
        work.mkdir(parents=True, exist_ok=True)
        draft = work / "key.draft"
        draft.write_text(key)
        draft.replace(note)  # whole or not at all: a key cut off by a full disk would discard the checkpoints
    return made


def _inputs_are_there(tasks: list[Task], wanted: list[Task], some: bool) -> None:
    """With `--only`, what a wanted step reads was made before, from the same recipe."""
    by_name = {t.step.name: t for t in tasks}
    coming = {t.step.name for t in wanted}
    for task in wanted if some else ():
        for needed in (task.step.parent, *task.step.others.values()):
            if not isinstance(needed, str) or needed in coming:
                continue
            if by_name[needed].why:
                raise RequestError(
                    f"{task.step.name}: needs {needed}, which is not up to date ({by_name[needed].why}); run it as well"
                )


def _why(step: Step, key: str, due: set[str]) -> str:
    """One clause: why the step has to run; empty when its artifact has this key."""
    if not (step.out / MANIFEST).exists():
        return "new"
    try:
        manifest = artifact.read_manifest(step.out)
    except LlmctlError:
        return "the artifact that is there cannot be read"
    if not _is_whole(step.out):
        return "the artifact that is there is damaged"
    if manifest.key == key:
        return ""
    before, now = _leaves(manifest.config), _leaves(keyed(step.config))
    changed = [f"{k} {before[k]} → {v}" for k, v in now.items() if k in before and before[k] != v]
    changed += [f"{k} {'is new' if k in now else 'is gone'}" for k in sorted(before.keys() ^ now.keys())]
    if changed:
        return "changed: " + ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    above = [a for a in (step.parent, *step.others.values()) if isinstance(a, str) and a in due]
    return f"{above[0]} is made anew" if above else "its input changed"


def _is_done(task: Task) -> bool:
    """Whether another process has made the artifact since it was found missing."""
    return _manifest_key(task.step.out) == task.key and _is_whole(task.step.out)


def _is_whole(folder: Path) -> bool:
    """Whether the parameters lie there at the size that the manifest tells; `load` also checks their digest."""
    manifest = artifact.read_manifest(folder)
    return not manifest.weights or atomic.size(folder / "params") == manifest.bytes


def _leaves(values: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(values, dict):
        return {k: v for name, value in values.items() for k, v in _leaves(value, f"{prefix}{name}.").items()}
    return {prefix[:-1]: json.dumps(values)}


def _key_of(of: str | Path, keys: dict[str, str]) -> str:
    if isinstance(of, str):
        return keys[of]
    manifest = artifact.read_manifest(of)
    return f"{manifest.key}:{manifest.digest}"


def _manifest_key(folder: Path) -> str:
    try:
        return artifact.read_manifest(folder).key
    except LlmctlError:
        return ""


_seen: dict[tuple[str, int, int], str] = {}


def _content(path: str) -> str:
    """sha256 of a file's content; once a process, as several stages read the same files."""
    file: Any = Path(path)
    if "://" in path:
        from etils import epath

        file = epath.Path(path)
    try:
        stat = file.stat()
        mark = (path, stat.length, stat.mtime) if "://" in path else (path, stat.st_size, stat.st_mtime_ns)
        if mark not in _seen:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
            _seen[mark] = digest.hexdigest()
    except OSError as e:
        raise RequestError(f"{path}: cannot be read: {e.strerror or e}") from None
    return _seen[mark]

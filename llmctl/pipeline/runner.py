"""Run the stages of a recipe: skip finished stages, resume interrupted stages, and repeat stages whose inputs
changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import artifact, integrity
from llmctl.artifacts.manifest_file import ADVICE, listed
from llmctl.artifacts.workspace import Context
from llmctl.config import containment, limits
from llmctl.config.base import Config, hint, keyed
from llmctl.config.errors import RequestError, WorkError
from llmctl.data.config import SourceConfig
from llmctl.data.sources import SOURCES
from llmctl.distributed import backend, locks
from llmctl.distributed import processes as hosts
from llmctl.pipeline import data_check, stage, up_to_date
from llmctl.pipeline.recipe import out_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from llmctl.pipeline.recipe import Recipe, Step

WORK = ".work"
"""Name of the folder in a run's folder that contains the temporary files of its stages."""


@dataclass(frozen=True)
class StageStatus:
    """Store a stage, its key (a hash of settings and inputs), and the reason why the stage has to run."""

    step: Step
    key: str
    reason: str
    """Reason why the stage has to run, as a text for the user; empty if its artifact is up to date."""


def run(
    recipe: Recipe,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
    processes: Mapping[str, Any] | None = None,
) -> list[str]:
    """Run the stages whose artifacts are not up to date.

    If there are several processes, process 0 decides which stages have to run, and holds the locks. All processes run
    the stages.

    Args:
      recipe: the validated recipe.
      only: names of the stages to run. The inputs of these stages must be up to date. If empty, all stages run.
      say: function that prints one line per stage.
      processes: arguments of `llmctl.distributed.processes.join`.

    Returns:
      The names of the stages that ran.

    Raises:
      RequestError: If a name in `only` is unknown. If an input is missing. If another process uses the same folder.
      WorkError, Interrupted: If a stage raises this error.
    """
    names = [s.name for s in recipe.steps]
    for name in only:
        if name not in names:
            raise RequestError(f"--only {name}: no such stage{hint(name, names)}; there are {', '.join(names)}")
    platforms = {s.config.platform for s in recipe.steps if not only or s.name in only} - {""}
    if len(platforms) == 1:  # several are refused below, among the steps that are due
        backend.choose(platforms)
    hosts.join(**processes or {})
    # Compare all settings, not only keyed ones: a process that saves when others do not would wait for them for ever.
    hosts.check_same([[s.config.model_dump(mode="json") for s in recipe.steps], list(only)], "the recipe")
    with hosts.process_0_first():  # process 0 downloads; the others then find the files
        for step in recipe.steps:
            if not only or step.name in only:
                fetch(step.config)
    found = hosts.broadcast(lambda: [(t.key, t.reason) for t in plan(recipe)])
    statuses = [StageStatus(step, key, reason) for step, (key, reason) in zip(recipe.steps, found, strict=True)]
    chosen = [t for t in statuses if not only or t.step.name in only]
    _check_inputs(statuses, chosen, bool(only))
    due = [t for t in chosen if t.reason]
    for status in due:
        _check_batch_memory(status.step)
    if due:
        hosts.broadcast(lambda: data_check.check(recipe, [t.step.name for t in due]))
    with locks.lock(recipe.run / WORK / "run.lock", str(recipe.run), shared=recipe.alone, own_folder=True):
        hosts.check_shared(recipe.run / WORK)
        if due:
            backend.initialize((t.step.config.platform for t in due), say)
        for i, status in enumerate(chosen, 1):
            name = status.step.name
            with locks.claim(status.step.out):
                if hosts.broadcast(
                    lambda status=status: not status.reason or up_to_date.is_done(status.step, status.key)
                ):
                    if hosts.first():  # left by a process that was killed after it wrote the artifact
                        shutil.rmtree(recipe.run / WORK / name, ignore_errors=True)
                    remark = hosts.broadcast(lambda status=status: up_to_date.remark(status.step))
                    say(f"[{i}/{len(chosen)}] {name}: up to date, skipped{remark}")
                    continue
                source = f" from {out_name(status.step.parent)}" if status.step.parent else ""
                say(f"[{i}/{len(chosen)}] {name}{source}: {status.reason}")
                _run_stage(recipe, status, say)
    return [t.step.name for t in due]


def plan(recipe: Recipe) -> list[StageStatus]:
    """Return the status of every stage, without running a stage.

    A status has the stage's key, a hash of its settings and inputs. It also has the reason why the stage has to run.

    Raises:
      RequestError: If an input file or a parent's folder is missing or damaged.
    """
    keys: dict[str, str] = {}
    statuses: list[StageStatus] = []
    for step in recipe.steps:
        bases = step.config.bases
        parent = _key_of(step.parent, keys, bases) if step.parent else None
        others = [[n, _key_of(a, keys, bases)] for n, a in step.others.items()]
        keys[step.name] = key(step.config, parent, others)
        due = {t.step.name for t in statuses if t.reason}
        statuses.append(StageStatus(step, keys[step.name], up_to_date.why(step, keys[step.name], due)))
    return statuses


def key(config: stage.StageConfig, parent: str | None, others: Sequence[Sequence[str]] = ()) -> str:
    """Return the key of a stage's result, a hash. Equal keys mean equal results.

    The key is the SHA-256 of canonical JSON with these parts:

    - the config without the fields that do not change the result
    - the keys of all artifacts that the stage reads
    - the content of the stage's input files
    - the version of the artifact format

    Args:
      config: config of the stage.
      parent: key of the parent; None if the stage has no parent.
      others: [name, key] of each other artifact that the stage reads.

    Raises:
      RequestError: If an input file is missing.
    """
    omitted = set(config.artifact_fields) - set(config.keyed_artifact_fields)
    settings = {k: v for k, v in keyed(config).items() if k not in omitted}
    files = [_content(str(path)) for path in inputs(config)]
    what = {"format": artifact.FORMAT, "config": settings, "parent": parent, "others": list(others), "files": files}
    text = json.dumps(what, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def inputs(config: Any) -> list[Any]:
    """Return the paths of the input files that a stage's config names, such as data files or a chat template."""
    return [path for section in sections(config) if hasattr(section, "inputs") for path in section.inputs()]


def sections(config: Any) -> Iterator[Any]:
    """Yield a config and all configs that are nested in it at any depth, such as `data` and `train`."""
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from sections(part)
    elif isinstance(config, Config):
        yield config
        for name in type(config).model_fields:
            yield from sections(getattr(config, name))


def fetch(config: Any) -> None:
    """Download missing data if the config allows downloads.

    Call this before `plan`, because `plan` hashes the data files.
    """
    for section in sections(config):
        if isinstance(section, SourceConfig):
            SOURCES[section.source].fetch(section)


def _check_batch_memory(step: Step) -> None:
    """Check that each process's share of a batch fits in the memory of this machine.

    A batch needs 12 bytes per token: 4 each for the token, its target and the target's weight in the loss.

    Raises:
      RequestError: If the batch does not fit.
    """
    for section in sections(step.config):
        rows, length = getattr(section, "batch_size", 0), getattr(section, "seq_len", 0) or 1
        what = f"{step.name}: a batch of {rows:,} rows of {length:,} tokens"
        limits.check_memory(12 * rows * length // hosts.count(), what, "lower batch_size or seq_len")


def _run_stage(recipe: Recipe, status: StageStatus, say: Callable[[str], None]) -> None:
    step = status.step
    work = recipe.run / WORK / step.name
    made = hosts.broadcast(lambda: _create_work_folder(step, work, status.key, say, recipe.alone))

    def folder(of: str | Path) -> Path:
        return of if isinstance(of, Path) else recipe.run / of

    siblings = {name: folder(of) for name, of in step.others.items()}
    parent = folder(step.parent) if step.parent else None
    try:
        stage.load(step.config.kind).run(step.config, parent, Context(step.out, work, status.key, siblings))
    except RequestError:
        if made and hosts.first():  # a wrong request leaves no scratch files
            shutil.rmtree(work, ignore_errors=True)
        raise
    if not hosts.broadcast(lambda: up_to_date.key_at(step.out) == status.key):
        raise WorkError(f"{step.name}: the stage ended without leaving its artifact in {step.out}")
    if hosts.first():
        shutil.rmtree(work)


def _create_work_folder(step: Step, work: Path, key: str, say: Callable[[str], None], alone: bool) -> bool:
    """Create the stage's temporary folder, and return whether it is new.

    If a folder exists and its settings or inputs differ (another `key`), the folder is removed first. `alone` is true
    for a single stage command. Such a command may replace an artifact only if a stage of the same kind wrote the
    artifact.
    """
    artifact.check_output(step.out, stage=step.config.kind if alone else "", replace=step.config.replace)
    note = work / "key"
    if work.exists() and (not note.exists() or note.read_text() != key):
        say(f"{step.name}: its settings changed since it was interrupted; {work} is discarded")
        shutil.rmtree(work)
    containment.check(containment.own(work))
    made = not work.exists()
    if not note.exists():
        work.mkdir(parents=True, exist_ok=True)
        draft = work / "key.draft"
        draft.write_text(key)
        draft.replace(note)  # atomic, because a key truncated by a full disk would discard the checkpoints
    return made


def _check_inputs(statuses: list[StageStatus], chosen: list[StageStatus], only: bool) -> None:
    """Check that the artifacts that the chosen stages read are up to date.

    If `only` is false, the user chose no stages, all stages run, and nothing is checked.

    Raises:
      RequestError: If an input is not up to date, and the stage that writes the input is not chosen.
    """
    by_name = {t.step.name: t for t in statuses}
    selected = {t.step.name for t in chosen}
    for status in chosen if only else ():
        for needed in (status.step.parent, *status.step.others.values()):
            if not isinstance(needed, str) or needed in selected:
                continue
            if reason := by_name[needed].reason:
                name = status.step.name
                raise RequestError(f"{name}: needs {needed}, which is not up to date ({reason}); run it as well")


def _key_of(of: str | Path, keys: dict[str, str], bases: Sequence[Path]) -> str:
    if isinstance(of, str):
        return keys[of]
    manifest = artifact.read_manifest(of)
    if wrong := integrity.quick_check(of, manifest, bases).content:
        raise RequestError(f"{of}: damaged ({listed(wrong.values())}); {ADVICE}")
    return f"{manifest.key}:{manifest.content or manifest.digest}"


_seen: dict[tuple[str, int, int], str] = {}


def _content(path: str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits.

    The hash is computed once per process, because several stages may read the same file.
    """
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

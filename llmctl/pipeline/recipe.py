"""Read and validate a recipe: shared settings and an ordered list of stages.

Each stage writes an artifact, a folder with a model or with the results of an evaluation.

The recipe is validated before any stage runs. A setting may have values in several places. The last value
in this order is used:

1. the default in the config class
2. the recipe's shared settings
3. the stage's table
4. `--set`
5. the flags of a stage's command
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts import atomic
from llmctl.config.base import hint, merge, read_toml
from llmctl.config.errors import RequestError
from llmctl.config.validation import validate
from llmctl.distributed import locks
from llmctl.pipeline import overrides, shared_settings, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmctl.pipeline.stage import StageConfig

MANIFEST = "manifest.json"
"""Name of the file that marks a folder as an artifact."""

RUNS = Path("runs")
"""Default folder in which run folders are created."""


@dataclass(frozen=True)
class Step:
    """Store a stage's validated config and the locations of its artifacts.

    Each artifact that the stage reads is a str or a Path. A str is the name of an earlier stage, and a Path is a
    folder.
    """

    config: StageConfig
    out: Path
    parent: str | Path | None
    others: dict[str, str | Path] = field(default_factory=dict)
    """Artifacts that the stage reads in addition to the parent, such as the teacher of `distill`. The keys are the
    names of the artifacts in the config."""

    @property
    def name(self) -> str:
        """Return the name of the stage, which is also the name of its folder in the run."""
        return self.config.name


@dataclass(frozen=True)
class Recipe:
    """Store the validated stages of a recipe, in order, and the folder of their artifacts."""

    name: str
    run: Path
    steps: tuple[Step, ...]
    alone: bool = False
    """Whether the recipe was built for a stage's command with --out. The field `run` is then the folder that contains
    the output."""


def read(path: str | Path, run: str | Path | None = None, sets: Iterable[str] = ()) -> Recipe:
    """Read and validate the recipe in a TOML file.

    Args:
      path: the TOML file.
      run: folder of the run. The default is the recipe's `run`, or `runs/<name>`.
      sets: assignments. `stage.2.sparsity=0.6` names a stage by its index, from 0. `stage.prune.sparsity=0.6` names a
        stage by its name. `data.path=x.csv` sets a shared setting. Values are TOML; a value that is not valid TOML is a
        string.

    Raises:
      RequestError: If the file is missing, or a setting is invalid.
    """
    doc = read_toml(path)
    for text in sets:
        overrides.assign_to(doc, text)
    tables, names = _stages(doc, str(path))
    for key in ("name", "run"):
        if not isinstance(doc.get(key, ""), str) or "\0" in doc.get(key, ""):
            raise RequestError(f"{path}: {key}: must be a string without a zero byte")
    name = doc.get("name") or Path(path).stem
    folder = Path(run or doc.get("run") or RUNS / name)

    classes = [stage.load(t["kind"]).Config for t in tables]
    shared = shared_settings.of_stages(doc, classes, str(path))

    steps: list[Step] = []
    for i, (table, cls) in enumerate(zip(tables, classes, strict=True)):
        values = {**merge(shared[i], table, cls), "name": names[i]}
        config = validate(cls, values, _place(str(path), i, table, shared[i]))
        steps.append(_linked(config, steps, folder / names[i], f"{path}: stage.{i} ({names[i]})"))
    return Recipe(name, folder, tuple(steps))


def single(
    kind: str,
    flags: dict[str, Any],
    out: str | Path,
    recipe: str | Path | None = None,
    sets: Iterable[str] = (),
) -> Recipe:
    """Return a recipe of one stage, for a stage's command such as `llmctl prune --from A --out B --sparsity 0.5`.

    Args:
      kind: kind of the stage.
      flags: nested settings from the command line, including `from`.
      out: folder of the stage's artifact. The folder that contains `out` is the folder of the run.
      recipe: a TOML recipe whose shared settings and stage of this kind are used. If several stages have this kind,
          `flags` selects one by its name.
      sets: assignments inside the stage, such as `train.steps=10`.

    Raises:
      RequestError: If the recipe or a setting is invalid.
    """
    cls = stage.load(kind).Config
    values: dict[str, Any] = {}
    if recipe:
        doc = read_toml(recipe)
        tables, names = _stages(doc, str(recipe))
        mine = {n: t for t, n in zip(tables, names, strict=True) if t["kind"] == kind}
        if len(mine) > 1 and flags.get("name") not in mine:
            raise RequestError(f"{recipe}: has {len(mine)} {kind} stages, say which with --name: {', '.join(mine)}")
        own_table = mine[flags["name"]] if len(mine) > 1 else next(iter(mine.values()), {})
        shared = shared_settings.of_stages(doc, [cls, *(stage.load(t["kind"]).Config for t in tables)], str(recipe))
        values = merge(shared[0], own_table, cls)
    for text in sets:
        overrides.assign_in(values, text, cls)
    out = Path(out)
    atomic.check(out)
    _check_name(flags.get("name", kind), "--name")
    values = {**merge(values, flags, cls), "kind": kind, "name": flags.get("name") or out.name}

    def place(path: str) -> str:
        return f"--{path.replace('_', '-')}" if path else kind

    step = _linked(validate(cls, values, place), [], out, kind, beside=out.parent)
    return Recipe(out.name, out.parent, (step,), alone=True)


def _stages(doc: dict[str, Any], file: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the `[[stage]]` tables of a recipe, and the names of the stages.

    Raises:
      RequestError: If a kind is unknown, or a name is invalid or not unique.
    """
    tables = doc.get("stage")
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise RequestError(f"{file}: a recipe needs stages, each a table [[stage]] with its kind")
    names: list[str] = []
    for i, table in enumerate(tables):
        kind = table.get("kind")
        if kind is None:
            raise RequestError(f"{file}: stage.{i}.kind: is required; one of {', '.join(stage.kinds())}")
        if kind not in stage.kinds():
            raise RequestError(
                f"{file}: stage.{i}.kind: no stage {kind!r}{hint(str(kind), stage.kinds())}"
                f"; there are {', '.join(stage.kinds())}"
            )
        name = table.get("name", kind)
        _check_name(name, f"{file}: stage.{i}.name")
        if name in names:
            raise RequestError(
                f"{file}: stage.{i}.name: {name!r} is stage.{names.index(name)} already; give each its own name"
            )
        names.append(name)
    return tables, names


def _check_name(name: Any, where: str) -> None:
    """Check that a name is valid as the name of a folder.

    Raises:
      RequestError: If the name is not valid.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RequestError(f"{where}: must be letters, digits, '.', '-', '_', got {name!r}")
    locks.check_name(name, where)


def _place(file: str, index: int, table: dict[str, Any], shared: dict[str, Any]) -> Callable[[str], str]:
    label = f"({table.get('name', table['kind'])})"

    def place(path: str) -> str:
        if path and _holds(shared, path) and not _holds(table, path):
            return f"{file}: {path}"
        return f"{file}: stage.{index}{'.' + path if path else ''} {label}"

    return place


def _holds(values: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(values, dict) or part not in values:
            return isinstance(values, list)
        values = values[part]
    return True


def _linked(config: StageConfig, before: list[Step], out: Path, where: str, beside: Path | None = None) -> Step:
    """Find the parent and the other artifacts that a stage reads, and return the stage's Step.

    Args:
      config: config of the stage. Each artifact in the config is the name of an earlier stage, or a folder.
      before: the earlier stages.
      out: folder of the stage's artifact.
      where: path of the stage in the recipe, for errors.
      beside: folder whose artifacts may be given by their names alone; None if there is no such folder.

    Raises:
      RequestError: If an artifact is missing, or the stage would replace an artifact that it reads.
    """
    models = [s.name for s in before if s.config.produces]
    if config.parent:
        parent = _find(config.parent, models, f"{where}: from", beside)
    elif config.starts or (not models and _names_others(config)):
        parent = None
    elif models:
        parent = models[-1]
    elif beside:
        raise RequestError(f"{where}: --from: say which artifact to start from")
    else:
        raise RequestError(f"{where}: from: there is no model before this stage to start from")
    others: dict[str, str | Path] = {}
    for key in config.artifact_fields:
        named = getattr(config, key)
        if named is None:  # an optional field that is not set
            continue
        if isinstance(named, str):
            named = [named] if named else []
        elif not named:  # an empty list means all earlier models
            others |= {m: m for m in models} or ({out_name(parent): parent} if parent else {})
        others |= {n: _find(n, models, f"{where}: {key}", beside) for n in named}
    for name, read in {"from": parent, **others}.items():
        if isinstance(read, Path) and read.resolve() == out.resolve():
            raise RequestError(f"{where}: {out} would replace what it is made of ({name}); choose another folder")
    return Step(config, out, parent, others)


def _names_others(config: StageConfig) -> bool:
    """Return whether a stage needs no parent because its config names every artifact that it reads.

    Examples are `distill` with a teacher and a new student, and `eval` with a list of artifacts.
    """
    named = any(getattr(config, key) for key in config.artifact_fields)
    return named and (not config.produces or config.makes_model)


def out_name(artifact: str | Path) -> str:
    """Return the name of an artifact: the stage's name, or the name of the folder."""
    return artifact if isinstance(artifact, str) else artifact.resolve().name


def _find(name: str, models: list[str], where: str, beside: Path | None) -> str | Path:
    if name in models:
        return name
    folders = [Path(name), *([beside / name] if beside else [])]
    for folder in folders:
        if (folder / MANIFEST).is_file():
            return folder
    if folders[0].is_dir():
        inside = sorted(str(f.parent) for f in folders[0].glob(f"[!.]*/{MANIFEST}"))
        if inside:
            raise RequestError(f"{where}: {name} is a run, not an artifact; name one of {', '.join(inside)}")
        raise RequestError(f"{where}: {name} is not an artifact: it has no {MANIFEST}")
    known = f"; before it there are {', '.join(models)}" if models else ""
    raise RequestError(f"{where}: no artifact {name!r}{hint(name, models)}{known}")

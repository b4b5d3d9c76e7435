"""Build a stage's command from its config class. Every field becomes a flag with its default and its docstring."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from llmctl.cli import stage_help
from llmctl.config.base import Config, parse_value, section
from llmctl.config.errors import RequestError
from llmctl.config.registry import Choices, Registry
from llmctl.pipeline import stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pydantic.fields import FieldInfo

    from llmctl.pipeline.recipe import Step

CHOICES_WIDTH = 56
"""Maximum number of characters in a list of choices that the help prints directly after a flag. Longer lists are added
to the flag's help text."""
HIDDEN = ("kind",)
"""Names of config fields that have no flag, because the command itself determines their values."""
ARTIFACT = "artifact"
"""Python name of the positional argument for the artifact to start from. The argument has the same meaning as
--from."""


Coordinator = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT", envvar="LLMCTL_COORDINATOR", help="Several processes: host of process 0, and a free port."
    ),
]
NumProcesses = Annotated[
    int,
    typer.Option(
        metavar="N", envvar="LLMCTL_NUM_PROCESSES", help="Number of processes; Slurm and TPU pods provide it."
    ),
]
ProcessId = Annotated[
    int,
    typer.Option(metavar="I", envvar="LLMCTL_PROCESS_ID", help="Number of this process, from 0.", show_default=False),
]
PROCESSES: dict[str, tuple[Any, Any]] = {
    "coordinator": (Coordinator, ""),
    "num_processes": (NumProcesses, 0),
    "process_id": (ProcessId, -1),
}
"""Flags for runs of several processes, as {argument of `llmctl.distributed.processes.join`: (annotation, default)}."""


def command(kind: str) -> tuple[Callable[..., None], Any]:
    """Return (function, click class) with which Typer registers a stage's command. The function has one parameter per
    flag.
    """
    module = stage.load(kind)
    cls: type[stage.StageConfig] = module.Config
    fields = list(config_fields(cls))

    def run_stage(**given: Any) -> None:
        from llmctl.pipeline import console, recipe, runner

        out, recipe_file, sets, json = (given.pop(k) for k in ("out", "recipe_file", "sets", "json"))
        if artifact := given.pop(ARTIFACT, None):
            if given["parent"]:
                raise RequestError(f"{kind}: {artifact} and --from {given['parent']}: say one of the two")
            given["parent"] = artifact
        processes = {k: given.pop(k) for k in PROCESSES}
        flags: dict[str, Any] = {}
        for path, field in fields:
            if (value := given[variable(path)]) is not None:
                at = flags
                for part in path[:-1]:
                    at = at.setdefault(part, {})
                at[path[-1]] = parsed(field, value)
        if not out and cls.produces:
            raise RequestError(f"{kind}: --out: say where the artifact goes")
        with console.folder(out) as folder:
            chosen = recipe.single(kind, flags, folder, recipe_file, sets or ())
            runner.run(chosen, say=console.say, processes=processes)
            _report(chosen.steps[0], json)

    made = "Folder of the new artifact." if cls.produces else "Folder for the report; without it the result is printed."
    first = [
        _parameter("out", Path, "--out", metavar="DIR", help=made),
        _parameter(
            "recipe_file",
            Path,
            "--recipe",
            metavar="FILE",
            help="Recipe whose shared settings and stage of this kind are used.",
        ),
        _parameter(
            "sets",
            list[str],
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting, such as train.steps=10; flags override it.",
        ),
    ]
    if not cls.starts:
        named = typer.Argument(metavar="ARTIFACT", help="Artifact to start from, as --from.", show_default=False)
        first.insert(0, _parameter(ARTIFACT, str, argument=named))
    json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
    everything = typer.Option(
        stage_help.ALL, is_eager=True, callback=stage_help.help_all, expose_value=False, help="Show every flag."
    )
    last = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in {
            **PROCESSES, "json": (json, False), "help_all": (Annotated[bool, everything], False),
        }.items()
    ]  # fmt: skip
    own = [flag(path, field, default) for (path, field), default in zip(fields, _defaults(cls, fields), strict=True)]
    parameters = [*sorted([*first, *own], key=lambda p: p.name not in (ARTIFACT, "parent", "out")), *last]
    run_stage.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run_stage.__annotations__ = {p.name: p.annotation for p in parameters}
    run_stage.__doc__ = summary(module)
    variables = {path: variable(path) for path, _ in fields}
    always = [ARTIFACT, "parent", "out", "recipe_file", "sets", "json"]
    return run_stage, stage_help.of_stage(cls, variables, always, list(PROCESSES))


def summary(module: types.ModuleType) -> str:
    """Return the description of a stage: the docstring of its config class, or of its module if the class has none."""
    return inspect.cleandoc(module.Config.__doc__ or module.__doc__ or "")


def _report(step: Step, json: bool) -> None:
    from llmctl.cli import summary as shown
    from llmctl.evaluate import report
    from llmctl.pipeline import console

    results, compared = shown.results(step.out), shown.comparisons(step.out)
    if results and json:
        several = {"results": results} | ({"comparisons": compared} if compared else {})
        console.result(results[0] if len(results) == 1 else several)
    elif results:
        console.show(report.table(results))
        if compared:
            console.show(report.comparison_table(compared))
        for protocol in report.protocols(results):
            console.show(protocol)
    elif json:
        console.result(shown.one(step.out))
    else:
        console.show(shown.table([shown.one(step.out)], str(step.out)))


def config_fields(cls: type[Config], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield (path, field) for each field of a config class and of the config classes nested in it (its sections)."""
    for name, field in cls.model_fields.items():
        key = field.alias or name
        if not above and key in HIDDEN:
            continue
        inner = section(cls, key)
        if inner:
            yield from config_fields(inner, (*above, key))
        else:
            yield (*above, key), field


def _defaults(cls: type[Config], fields: list[tuple[tuple[str, ...], FieldInfo]]) -> Iterator[Any]:
    """Yield the default of each flag. A stage's config may override the defaults that a nested config class defines."""
    tops = {f.alias or n: f.get_default(call_default_factory=True) for n, f in cls.model_fields.items()}
    for path, field in fields:
        at: Any = tops[path[0]]
        for part in path[1:]:
            at = getattr(at, _attribute(type(at), part)) if isinstance(at, Config) else None
        yield field.default if at is None and len(path) > 1 else at


def _attribute(cls: type[Config], key: str) -> str:
    return next(n for n, f in cls.model_fields.items() if key in (n, f.alias))


def flag(path: tuple[str, ...], field: FieldInfo, default: Any) -> inspect.Parameter:
    """Return the function parameter that defines the flag `--PATH`. Its help text is the docstring of the field."""
    name = ".".join(path).replace("_", "-")
    kind = _base(field.annotation)
    text, metavar = field.description or "", _metavar(field)
    choices = metavar.split("|") if "|" in metavar else []
    if choices and isinstance(default, str) and default and default not in choices:
        choices = [default, *choices]  # a registry lists only its own names, such as scores without "structured"
        metavar = "|".join(choices)
    if len(metavar) > CHOICES_WIDTH:
        text, metavar = f"{text} One of: {', '.join(choices)}.", "NAME"
    if default not in ("", None, [], {}) and not field.is_required():
        text += f" [default: {_text(default)}]"
    if kind is bool:
        return _parameter(variable(path), bool, f"--{name}/--no-{name}", help=text)
    return _parameter(variable(path), str, f"--{name}", metavar=metavar, help=text, autocompletion=lambda: choices)


def _parameter(variable: str, kind: Any, flag: str = "", argument: Any = None, **option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, argument or typer.Option(flag, show_default=False, **option)]
    return inspect.Parameter(variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def variable(path: tuple[str, ...]) -> str:
    """Return the name of the Python argument with a flag's value."""
    return "__".join("parent" if p == "from" else p for p in path)


def parsed(field: FieldInfo, value: Any) -> Any:
    """Parse the text of a flag into the value of its field. Except for fields of type str, the text is TOML."""
    kind = _base(field.annotation)
    if not isinstance(value, str) or kind is str or get_origin(kind) is Literal:
        return value
    if get_origin(kind) is list and not value.lstrip().startswith("["):
        texts = [part.strip() for part in value.split(",") if part.strip()]
        return texts if _item(kind) is str else [parse_value(t) for t in texts]
    return parse_value(value)


def _item(kind: Any) -> Any:
    """Return the item type of a list type, such as str for `list[Annotated[str, ...]]`; None for other types."""
    (item,) = get_args(kind)[:1] or (None,)
    return getattr(item, "__origin__", item)


def _base(annotation: Any) -> Any:
    """Return a field's type without `| None`, such as int for `int | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [a for a in get_args(annotation) if a is not type(None)]
        return parts[0] if len(parts) == 1 else annotation
    return annotation


def _metavar(field: FieldInfo) -> str:
    """Return the placeholder of a flag's value in the help.

    If the field is a Literal or names entries of a registry, the placeholder is the choices joined by "|". Otherwise
    the placeholder is the name of the type.
    """
    kind = _base(field.annotation)
    registered = next((m for m in (*field.metadata, *_metadata(kind)) if isinstance(m, (Choices, Registry))), None)
    if registered:
        return "|".join(registered)
    if get_origin(kind) is Literal:
        return "|".join(str(a) for a in get_args(kind) if a != "")
    names = {int: "INT", float: "FLOAT", str: "TEXT", list: "LIST", tuple: "LIST", dict: "TABLE"}
    return names.get(get_origin(kind) or kind, "VALUE")


def _metadata(kind: Any) -> Iterator[Any]:
    """Yield the metadata of the `Annotated` types inside a list type or a union type.

    The types inside are the item type of a list, or the members of a union.
    """
    for part in get_args(kind) if get_origin(kind) is not Literal else ():
        yield from getattr(part, "__metadata__", ())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)

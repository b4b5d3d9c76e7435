"""Format the help of a stage's command: the common flags under headings, and all flags with `--help-all`.

The config classes define which flags are common, and their headings (`Config.common`, `Config.heading`).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import typer
from typer.core import TyperCommand

from llmctl.config.base import section

if TYPE_CHECKING:
    from llmctl.pipeline.stage import StageConfig

FILES = "Artifacts and recipe"
"""Heading of the flags for inputs, outputs and printing. Every stage's command has these flags. These flags are not
fields of the config.
"""
WHERE = "Where it runs"
"""Heading of the flags for devices and processes. `MeshConfig` has the same heading."""
ALL = "--help-all"
SYNTAX = {
    "LIST": 'LIST is items with commas, such as a,b or 0.1,0.2, or a TOML list: \'["a, b", "c"]\'.',
    "TABLE": 'TABLE is a TOML table in quotes for the shell: \'{text = "review", label = "stars"}\'.',
}
"""Help texts that explain how to write a list and a table on the command line, by placeholder (LIST, TABLE)."""


class StageCommand(TyperCommand):
    """Format the help of a stage's command in sections. Each stage has a subclass that assigns flags to sections."""

    headings: ClassVar[dict[str, str]] = {}
    """Heading of each flag, by the flag's variable, in the order of the sections."""
    common: ClassVar[list[str]] = []
    """Variables of the flags that `--help` lists, in this order."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help's list of flags: the common flags, under their headings."""
        self._write(ctx, formatter, whole=False)

    def _write(self, ctx: Any, formatter: Any, whole: bool) -> None:
        sections: dict[str, tuple[list[Any], list[Any]]] = {h: ([], []) for h in dict.fromkeys(self.headings.values())}
        order = {name: n for n, name in enumerate(self.common)}
        for param in sorted(self.get_params(ctx), key=lambda p: order.get(p.name or "", len(order))):
            record = param.get_help_record(ctx)
            if record:
                if param.param_type_name == "argument":
                    record = (f"[{param.metavar}]", record[1])  # without the type that typer appends
                sections[self.headings.get(param.name or "", FILES)][param.name not in order].append(record)
        for heading, (common, rest) in sections.items():
            shown = common + (rest if whole else [])
            if shown:
                with formatter.section(heading):
                    formatter.write_dl(shown)
        kinds = {param.metavar for param in self.get_params(ctx) if whole or param.name in order}
        for text in (SYNTAX[kind] for kind in SYNTAX if kind in kinds):
            formatter.write_paragraph()
            formatter.write_text(text)
        hidden = [f"{heading} ({len(rest)})" for heading, (_, rest) in sections.items() if rest]
        if hidden and not whole:
            formatter.write_paragraph()
            formatter.write_text(f"{ALL} lists more flags under: {', '.join(hidden)}.")


def of_stage(cls: type[StageConfig], paths: dict[tuple[str, ...], str], first: list[str], where: list[str]) -> Any:
    """Return the command class of a stage.

    Args:
      cls: the stage's config class.
      paths: {path of a config field: name of the command's parameter that receives the flag's value}.
      first: names of the parameters of the flags that all stages have. These flags are listed first.
      where: names of the parameters of the flags for runs of several processes.
    """
    headings = {**dict.fromkeys(["help", *first], FILES), **dict.fromkeys(["help_all"], FILES)}
    own = [(path, variable) for path, variable in paths.items() if variable not in headings]
    found = {variable: _heading(cls, path) for path, variable in own}
    order = [h for h in dict.fromkeys(found.values()) if h != WHERE]
    headings |= {v: h for wanted in order for v, h in found.items() if h == wanted}
    headings |= {v: h for v, h in found.items() if h == WHERE} | dict.fromkeys(where, WHERE)

    def rank(field: tuple[tuple[str, ...], str]) -> int:
        (key, *below), own_order = field[0], cls.common or ()
        return own_order.index(key) if not below and key in own_order else len(own_order)

    common = [*first, "help", "help_all", *(v for path, v in sorted(own, key=rank) if _is_common(cls, path))]
    return type("StageCommand", (StageCommand,), {"headings": headings, "common": common})


def help_all(ctx: typer.Context, value: bool) -> None:
    """Print the help with every flag, and exit."""
    if not value or ctx.resilient_parsing:
        return
    command: Any = ctx.command
    formatter = ctx.make_formatter()
    command.format_usage(ctx, formatter)
    command.format_help_text(ctx, formatter)
    command._write(ctx, formatter, whole=True)
    typer.echo(formatter.getvalue().rstrip("\n"))
    sys.exit(0)


def _heading(cls: Any, path: tuple[str, ...]) -> str:
    """Return the help heading of a field: `heading` of the innermost section that contains the field and has a
    heading."""
    if path == ("platform",):  # a setting of the stage that belongs to the mesh
        return WHERE
    found = cls.heading
    for part in path[:-1]:
        cls = section(cls, part)
        found = cls.heading or found
    return found


def _is_common(cls: Any, path: tuple[str, ...]) -> bool:
    """Return whether `--help` lists the flag of a field.

    The flag is listed if `common` of the field's class contains the field or is None. A section, such as `optim`, is a
    field that has fields of its own. If a section is inside another section, `common` of the outer section must contain
    the inner section too.
    """
    for depth, part in enumerate(path[:-1]):
        if depth and cls.common is not None and part not in cls.common:
            return False
        cls = section(cls, part)
    return cls.common is None or path[-1] in cls.common

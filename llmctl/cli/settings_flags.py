"""Add the fields of a settings class as flags to a command that is a plain function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from llmctl.cli import flags
from llmctl.config.base import Config, assign
from llmctl.config.validation import validate


def with_settings(section: str, cls: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds flags to a command: one flag `--SECTION.FIELD` per field of a settings class.

    The command gets the validated settings as the argument `SECTION_settings`.

    Args:
        section: Name before the dot of each flag.
        cls: The settings class. Its fields give names, types, defaults and help.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        argument = f"{section}_settings"
        fields = [((section, *path), field) for path, field in flags.config_fields(cls)]

        @functools.wraps(command)
        def run_command(**given: Any) -> None:
            values: dict[str, Any] = {}
            for path, field in fields:
                if (value := given.pop(flags.variable(path))) is not None:
                    assign(values, [*path[1:]], flags.parsed(field, value))
            settings = validate(cls, values, lambda path: f"--{section}" + f".{path}".replace("_", "-") * bool(path))
            command(**given, **{argument: settings})

        hints = get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[name]) for name, p in inspect.signature(command).parameters.items()]
        added = [flags.flag(path, field, field.default) for path, field in fields]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != argument]
        parameters[-1:-1] = added  # --json stays last
        run_command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run_command.__annotations__ = {p.name: p.annotation for p in parameters}
        return run_command

    return decorate

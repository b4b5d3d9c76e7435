"""Print text to the terminal. Text from files and users is printed literally, without markup or control characters."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Regular expression for characters that control a terminal or reorder a line, and for lone surrogates. Tab and line
feed do not match."""


def visible(text: str) -> str:
    r"""Return the text with its control characters replaced by escape sequences.

    Example:
      >>> visible("a\x1b[31mb")
      'a\\x1b[31mb'
    """
    return HIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def as_json(value: Any) -> str:
    """Format a value as JSON on one line, without raw control characters. NaN and infinity become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str)
    return HIDDEN.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def terminal(*, stderr: bool = False, width: int | None = None) -> Console:
    """Return a console that prints strings literally.

    Use rich's `Text` and `style` for styles, never markup in strings.
    """
    return _kind()(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@functools.cache
def _kind() -> type[Console]:
    from rich.console import Console

    class Terminal(Console):
        """Print the control characters of strings as escape sequences, including strings inside tables."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(visible(text), **options)

    return Terminal


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value

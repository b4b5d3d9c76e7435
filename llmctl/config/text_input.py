"""Parse untrusted text: JSON and TOML with limited depth and limited numbers, and valid Unicode only.

Python's parsers recurse, so deeply nested text raises RecursionError. An integer may have any number of digits, and may
then exceed every float. JSON escapes can encode half a surrogate pair, which UTF-8 cannot represent.

Example:
    >>> parse_json('{"a": [1]}')
    {'a': [1]}
    >>> parse_json("[" * 100_000)
    Traceback (most recent call last):
    ValueError: nested deeper than 100 levels
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from llmctl.config.errors import RequestError

DEPTH = 100
"""Maximum number of levels of nested lists and tables."""
LARGEST = 2**128
"""Upper limit of the absolute value of integers; the limit itself is not allowed. Published files contain 10^30, which
means "no limit"."""

_TOO_DEEP = f"nested deeper than {DEPTH} levels"
_LONG_KEY = re.compile(rf"(?:[^\s.=]{{1,80}}[ \t]{{0,8}}\.[ \t]{{0,8}}){{{DEPTH}}}")
_HALF_PAIR = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text and return its value. A byte order mark is skipped.

    Raises:
        ValueError: If the text is not UTF-8, is not JSON or is nested too deeply. If a number is too large. If a
            string contains half a surrogate pair.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 text (byte {e.start})") from None
    _check_bounds(value)
    if _HALF_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string is not valid Unicode (half a surrogate pair)") from None
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML text and return it as a dict.

    Raises:
        ValueError: If the text is not TOML, is nested too deeply, or contains too large a number.
    """
    if _LONG_KEY.search(text):  # the parser's time grows with the square of the number of parts
        raise ValueError(_TOO_DEEP)
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_bounds(value)
    return value


def check_unicode(text: str, where: str) -> str:
    """Check that `text` can be written as UTF-8, and return `text`.

    Python represents undecodable bytes of arguments and of standard input as lone surrogates, which UTF-8 cannot
    represent.

    Raises:
        RequestError: If `text` contains a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(f"{where}: not UTF-8 text (character {e.start + 1}); convert it first") from None
    return text


def _check_bounds(value: Any) -> None:
    level = [value]
    for depth in range(DEPTH + 1):
        if depth == DEPTH and any(isinstance(item, (dict, list)) for item in level):
            raise ValueError(_TOO_DEEP)
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, int) and not -LARGEST < item < LARGEST:
                raise ValueError("a whole number has more than 128 bits")
        level = inner

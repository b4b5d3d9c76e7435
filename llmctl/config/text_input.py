"""Parse text that others wrote: JSON and TOML of bounded depth and numbers, and text that is valid Unicode.

Python's parsers recurse, so a deeply nested text raises RecursionError. A whole number may have any number of digits,
and then no float can hold it. JSON escapes can spell half a surrogate pair, which no file can hold as UTF-8.

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
"""Most levels of nested lists and tables."""
LARGEST = 2**128
"""Bound of whole numbers. Published files hold 10^30, which stands for no limit."""

_TOO_DEEP = f"nested deeper than {DEPTH} levels"
_LONG_KEY = re.compile(rf"(?:[^\s.=]{{1,80}}[ \t]{{0,8}}\.[ \t]{{0,8}}){{{DEPTH}}}")
_HALF_PAIR = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. A byte order mark is skipped.

    Raises:
      ValueError: the text is not UTF-8 or not JSON, it is nested too deeply, a number is too large, or a string holds
        half a surrogate pair.
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
    """Return the tables of a TOML text.

    Raises:
      ValueError: the text is not TOML, it is nested too deeply, or a number is too large.
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
    """Return the text.

    Raises:
      RequestError: the text cannot be written as UTF-8. Python represents undecodable bytes of arguments and of
        standard input as lone surrogates.
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

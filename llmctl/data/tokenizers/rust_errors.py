"""Convert failures of the Rust library `tokenizers` to errors.

A panic of the library raises a BaseException that does not derive from Exception, and writes a report to standard
error. Other failures raise plain Exceptions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llmctl.config.errors import RequestError

T = TypeVar("T")


def reason(error: BaseException) -> str:
    """Return the first line of a library error, at most 200 characters. Raise other errors again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def call(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a library function on texts, and return its result.

    Raises:
        RequestError: If the function fails. The cause is then the tokenizer's file, because all texts are valid input.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        raise RequestError(f"tokenizer.json: the tokenizer fails on a text ({reason(error)})") from None


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Discard output to standard error (file descriptor 2) inside the context, including that of native code."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)

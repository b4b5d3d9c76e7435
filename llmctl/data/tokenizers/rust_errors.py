"""Report failures of the Rust library `tokenizers` as errors.

A panic of the library is a BaseException that is no Exception, and it writes a report to standard error. Other failures
are bare Exceptions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llmctl.config.errors import RequestError

T = TypeVar("T")


def reason(error: BaseException) -> str:
    """Return the first line of a failure of the library, in at most 200 characters; raise any other error again."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def call(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Return the result of a function of the library on texts.

    Raises:
      RequestError: the function fails. The tokenizer's file is the reason, because every text is valid.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        raise RequestError(f"tokenizer.json: the tokenizer fails on a text ({reason(error)})") from None


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Discard what is written to the file of standard error, also by code that is not Python, while a file is read."""
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

"""Convert errors of the Rust library `tokenizers` to RequestError.

If the library panics, it raises a BaseException that is no Exception. The library also prints a report to standard
error. Other errors are of the class Exception.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llmctl.config.errors import RequestError

T = TypeVar("T")


def reason(error: BaseException) -> str:
    """Return the first line of the message of a library error, at most 200 characters.

    If the error does not come from the library, raise the error again.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def call(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a library function on texts, and return its result.

    Raises:
        RequestError: If the function fails. All texts are valid input, so the cause is the tokenizer's file.
    """
    try:
        return function(*args, **options)
    except BaseException as error:
        raise RequestError(f"tokenizer.json: the tokenizer fails on a text ({reason(error)})") from None


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
    """Discard output to standard error (file descriptor 2) inside the context, including the output of native code."""
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

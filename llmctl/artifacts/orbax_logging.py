"""Silence log lines for reads and writes that fail after the first error was already reported.

If several arrays cannot be read or written, Orbax raises the first error and closes its event loop. TensorStore's other
operations end later and find no event loop, or fail as well. Each of them then prints a traceback, although the caller
reports the error.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

LATE = ("Event loop is closed", "Encountered error while reading array index")
"""Prefixes of the messages of such exceptions."""


@functools.cache
def hush() -> None:
    """Silence these log lines from now on. Repeated calls have no effect."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not str(found.exc_value).startswith(LATE):
            before(found)

    sys.unraisablehook = hook

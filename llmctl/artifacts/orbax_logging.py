"""Silence log lines for reads and writes that fail after the first error was already reported.

If several arrays cannot be read or written, Orbax raises the first error and closes its event loop. TensorStore's other
operations end later. They find no event loop or fail too, and each of them prints a traceback. The caller has already
reported the error.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

LATE = ("Event loop is closed", "Encountered error while reading array index")
"""Beginnings of the messages of such late exceptions."""


@functools.cache
def hush() -> None:
    """Silence the log lines of late exceptions from now on. Repeated calls have no effect."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not str(found.exc_value).startswith(LATE):
            before(found)

    sys.unraisablehook = hook

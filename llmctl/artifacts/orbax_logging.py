"""Discard log lines about reads and writes that fail after Orbax has already raised an error.

If several arrays cannot be read or written, Orbax raises the first error and closes its event loop. TensorStore's other
operations end later. These operations also fail, or find no event loop, and print tracebacks. These tracebacks add
nothing to the first error.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

LATE = ("Event loop is closed", "Encountered error while reading array index")
"""Beginnings of the log lines to discard."""


@functools.cache
def silence_late_errors() -> None:
    """Discard the log lines that begin with a string in `LATE`, from now on. Repeated calls have no effect."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not str(found.exc_value).startswith(LATE):
            before(found)

    sys.unraisablehook = hook

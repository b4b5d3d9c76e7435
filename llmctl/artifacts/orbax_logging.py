"""What is said too late: of several arrays that cannot be read or written Orbax raises the first one's error.

It then closes its event loop. TensorStore's other operations end later, find no loop and print so, or fail as well and
nobody asks why: a traceback a file on the terminal. The error itself is told by whoever caught it.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

LATE = ("Event loop is closed", "Encountered error while reading array index")
"""How the messages of such exceptions begin."""


@functools.cache
def hush() -> None:
    """Keeps those off the terminal, from here on."""
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not str(found.exc_value).startswith(LATE):
            before(found)

    sys.unraisablehook = hook

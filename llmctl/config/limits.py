"""Limits on the sizes that files and settings may ask for, each with its reason.

A size is compared with the bytes that are there or with the memory of the machine before anything of that size is made.
All limits are far above what real files need; what exceeds one is damaged or means harm.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from llmctl.config.errors import RequestError

RECIPE = 16 << 20
"""Bytes of a recipe. Recipes have a few thousand."""
LINE = 256 << 20
"""Bytes of one line of a text file. A line is a document or a table's row; the longest books have a few million."""
RATIO = 1000
"""Decompressed bytes per compressed byte. Text has about 3 to 10; gzip of equal bytes reaches 1032, zstd more."""
UNCHECKED = 64 << 20
"""Decompressed bytes before `RATIO` counts, because small files of equal lines are harmless."""

LAYERS = 100_000
"""Layers of a stack. Published models have up to a few hundred; the size of lists grows with them."""
LABELS = 1_000_000
"""Classes that a config.json may count without naming them. Published models have up to 22,000 such."""

TEMPLATE = 1_000_000
"""Characters of a chat template. Published templates have up to 60,000."""
TEMPLATE_TEXT = 20_000_000
"""Characters or items of any value that a chat template makes, and of its output. Longer conversations fit no model."""
TEMPLATE_STEPS = 10_000_000
"""Steps of one rendering: nodes of the template that are visited, and blocks of 64 characters that are read or made. A
conversation of 1,000 messages of 1,000 characters takes about 170,000 steps and 40 ms. Loops without end reach the
limit after about 8 seconds."""
TEMPLATE_BITS = 4000
"""Bits of an integer in a chat template. Python prints at most 4300 digits, and long numbers take long to multiply."""


@functools.cache
def memory() -> int:
    """Return the memory that this process may use, in bytes: the machine's, or less in a container."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return whole
    return min(whole, allowed)


def check_memory(size: int, what: str, advice: str) -> None:
    """Check that something fits into this machine's memory.

    Args:
      size: its bytes.
      what: its name, for the message.
      advice: what to change.

    Raises:
      RequestError: it does not fit.
    """
    if size > memory():
        raise RequestError(
            f"{what} would take {size / 2**30:,.1f} GiB, and this machine has {memory() / 2**30:,.1f}; {advice}"
        )

"""Define limits on sizes that files and settings may request, each with its reason.

Before an object of a requested size is created, the size is compared with the limit. All limits are far above the sizes
of real files. A file that exceeds a limit is damaged or malicious.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from llmctl.config.errors import RequestError

RECIPE = 16 << 20
"""Maximum size of a recipe in bytes. Real recipes have a few thousand bytes."""
LINE = 256 << 20
"""Maximum length of a line of a text file in bytes. A line is a document or a table row. The longest books have a few
million bytes."""
RATIO = 1000
"""Maximum number of decompressed bytes per compressed byte. Text has a ratio of about 3 to 10. If all bytes of a file
are equal, the ratio is up to 1032 with gzip, and larger with zstd."""
UNCHECKED = 64 << 20
"""Largest decompressed size, in bytes, of a file whose compression ratio is not checked. Such a file is harmless, even
if all of its lines are equal."""

LAYERS = 100_000
"""Maximum number of layers of a model, because some lists have one entry per layer. Published models have up to a few
hundred."""
LABELS = 1_000_000
"""Maximum number of classes that a config.json may declare without names. Published models have up to 22,000."""

TEMPLATE = 1_000_000
"""Maximum length of a chat template in characters. Published templates have up to 60,000."""
TEMPLATE_TEXT = 20_000_000
"""Maximum size of the output of a chat template, and of each intermediate value, in characters or items. Longer
conversations exceed the context of every model."""
TEMPLATE_STEPS = 10_000_000
"""Maximum number of steps to render a chat template.

The evaluation of one node of the template's syntax tree takes one step. Every 64 characters that are read or created
take one more step. A conversation of 1,000 messages of 1,000 characters takes about 170,000 steps and 40 ms. An
infinite loop reaches the limit after about 8 seconds.
"""
TEMPLATE_BITS = 4000
"""Maximum size of an integer in a chat template, in bits. Python prints at most 4300 digits, and large products are
slow."""


@functools.cache
def memory() -> int:
    """Return the memory that this process may use, in bytes: the minimum of the machine's and the container's
    memory."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return whole
    return min(whole, allowed)


def check_memory(size: int, what: str, advice: str) -> None:
    """Check that an object fits into this machine's memory.

    Args:
        size: Size of the object in bytes.
        what: Name of the object, for the error message.
        advice: Remedy, for the error message.

    Raises:
        RequestError: If the object does not fit.
    """
    if size > memory():
        raise RequestError(
            f"{what} would take {size / 2**30:,.1f} GiB, and this machine has {memory() / 2**30:,.1f}; {advice}"
        )

"""Memory of large arrays on a CPU: kept by the process instead of given back, in huge pages.

A training step makes and frees hundreds of megabytes of temporaries. The C library gives such memory back to the kernel
at once, which clears every page of it when the next step touches it again: an eighth of the step's time and more. Here
freed memory stays, and a reserve of addresses is marked for huge pages, of which there are 512 times fewer.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt (malloc.h)."""
HUGEPAGE = 14
"""MADV_HUGEPAGE of Linux's madvise."""
HUGE = 2 << 20
"""Bytes of a huge page."""


@functools.cache
def keep() -> bool:
    """Makes this process keep what it frees; True where that was possible (Linux with glibc). Once a process.

    The process then holds on to the most that it ever used. Half of the machine's memory is reserved as addresses; a
    page is taken only when it is first written to.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # one arena, that grows in one piece and never shrinks
    for parameter, value in ((MMAP_MAX, 0), (ARENA_MAX, 1), (TRIM_THRESHOLD, -1)):
        if not libc.mallopt(parameter, value):
            return False
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    start = libc.malloc(size)
    if not start:
        return False  # no such addresses are to be had (ulimit -v); freed memory stays all the same
    first, end = -(-start // HUGE) * HUGE, (start + size) // HUGE * HUGE
    advised = libc.madvise(first, end - first, HUGEPAGE) == 0
    libc.free(start)
    return advised

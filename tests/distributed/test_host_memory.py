"""Check that memory which is freed and allocated again causes no new page faults."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from llmctl.distributed import host_memory

def touched(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(n << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = [touched(256) for _ in range(3)][-1]
kept = host_memory.keep()
first, *_, again = [touched(256) for _ in range(3)]
print(int(kept), plain, first, again)
"""


def test_freed_memory_is_kept_and_taken_again() -> None:
    out = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    kept, plain, first, again = map(int, out.split())
    if not kept:
        pytest.skip("another C library, or a kernel without huge pages")
    assert plain > 50, "the C library keeps memory by itself, and llmctl.distributed.host_memory is of no use"
    assert again < plain / 10, (plain, first, again)


TRIMMED = """
import numpy as np
from llmctl.distributed import host_memory

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1])

kept = host_memory.keep()
blocks = [np.ones(8 << 20, np.uint8) for _ in range(16)]
full, last = resident(), blocks[-1]
del blocks
freed = resident()
host_memory.trim()
print(int(kept), full, freed, resident())
"""


def test_trimmed_memory_is_returned_to_the_kernel() -> None:
    """The blocks below one that is still used are returned too."""
    out = subprocess.run([sys.executable, "-c", TRIMMED], check=True, capture_output=True, text=True).stdout
    kept, full, freed, trimmed = map(int, out.split())
    if not kept:
        pytest.skip("another C library, or a kernel without huge pages")
    pages = (100 << 20) // resource.getpagesize()
    assert full - freed < pages / 10
    assert full - trimmed > pages


THREADS = """
import concurrent.futures, resource
import numpy as np
from llmctl.distributed import host_memory

def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(256 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

shared = host_memory.share_arena()
with concurrent.futures.ThreadPoolExecutor(1) as pool:
    plain = [pool.submit(touched).result() for _ in range(3)][-1]
    kept = host_memory.keep()
    *_, again = [pool.submit(touched).result() for _ in range(3)]
print(int(shared and kept), plain, again)
"""


def test_memory_of_threads_is_kept_too() -> None:
    """JAX allocates in threads that exist before the mesh, so glibc must not give each of them an arena of its own."""
    out = subprocess.run([sys.executable, "-c", THREADS], check=True, capture_output=True, text=True).stdout
    kept, plain, again = map(int, out.split())
    if not kept:
        pytest.skip("another C library, or a kernel without huge pages")
    assert again < plain / 10, (plain, again)

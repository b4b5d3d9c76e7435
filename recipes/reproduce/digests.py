"""Compare the digests of a run's artifacts with those recorded for machines of the same kind (`make reproduce`).

The record is a JSON file: {kind of machine: {artifact: digest of its weights}}. Sums of floats depend on the
instruction set, and may depend on the number of cores and on the version of jaxlib, so the kind has all three. Two CPUs
of one kind may still differ. If the record lacks this kind, the digests are printed in the form to add to it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

from llmctl.cli import summary

LEVELS = ("avx512f", "avx2", "avx", "sve", "asimd")
"""CPU flags that determine which vector instructions XLA uses, the widest first."""


def kind(cpuinfo: str) -> str:
    """Return the kind of this machine: architecture, vector instructions, cores and version of jaxlib.

    Args:
        cpuinfo: Content of /proc/cpuinfo.
    """
    flags = cpuinfo.lower().split()
    level = next((name for name in LEVELS if name in flags), "unknown")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {level}, {cores} cores, jaxlib {importlib.metadata.version('jaxlib')}"


def compare(found: dict[str, str], record: dict[str, dict[str, str]], machine: str) -> tuple[list[str], bool]:
    """Return the lines to print, and whether the digests differ from the recorded ones.

    Args:
        found: Digest of each artifact of the run.
        record: The recorded digests of each kind of machine.
        machine: Kind of this machine.
    """
    if machine not in record:
        text = json.dumps({machine: found}, indent=2)
        return [text, f"nothing is recorded for {machine}, so nothing was compared; the digests are above"], False
    expected = record[machine]
    lines = [
        f"{name}: {'equal' if found.get(name) == expected.get(name) else 'DIFFERENT'} ({found.get(name, 'missing')})"
        for name in dict.fromkeys([*expected, *found])
    ]
    return lines, found != expected


def main() -> None:
    """Print the comparison. The exit code is 1 if a digest differs from the recorded one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("record", type=Path, help="JSON file with the recorded digests; it may be missing")
    args = parser.parse_args()
    found = {entry["name"]: entry["digest"] for entry in summary.run(args.run)["artifacts"]}
    record = json.loads(args.record.read_text(encoding="utf-8")) if args.record.exists() else {}
    cpuinfo = Path("/proc/cpuinfo")
    lines, different = compare(found, record, kind(cpuinfo.read_text() if cpuinfo.exists() else ""))
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(different)


if __name__ == "__main__":
    main()

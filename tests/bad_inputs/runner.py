"""Run bad inputs: each in a child process under limits, in an empty folder inside a watched one."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from valid_inputs import Valid

from bad_inputs.case import Case

SECONDS, MEMORY, PATIENCE = 20, 2 << 30, 300
"""Limits of one input: processor time, resident size of the process in bytes (its imports included), and seconds on the
clock, which only stop a process that waits."""
SECRET = "a secret outside of the inputs"


@dataclass
class Found:
    """What a child process left."""

    code: int | None
    out: str
    err: str
    writes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: int = 0
    """Greatest resident size in bytes, of the shared imports too."""


def child(argv: list[str], place: Path, report: Any) -> None:
    """Run a command in this process under the limits, and send what was found."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        fd = os.open(place / "streams" / name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", closefd=False) for n in range(3))  # noqa: SIM115
    os.chdir(place / "watched" / "here")
    os.environ |= {"JAX_PLATFORMS": "cpu", "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "TERM": "dumb"}
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    tempfile.tempdir = None
    writes: list[str] = []
    ours = (str(place), "/dev/", "/proc/self/", os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(place))

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
            path = os.path.abspath(arguments[0])
            if set("wxa+") & set(arguments[1]) and not path.startswith(ours):
                writes.append(path)

    sys.addaudithook(hook)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    from llmctl.cli import app

    try:
        app.main(argv)
    except SystemExit as e:
        code = e.code
    sys.stdout.flush()
    sys.stderr.flush()
    used = resource.getrusage(resource.RUSAGE_SELF)
    report.send((code, writes, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024))
    os._exit(0)


def tree(folder: Path) -> dict[str, Any]:
    """Return everything below a folder, with the content of its files."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
        else:
            found[name] = path.stat().st_mode
    return found


def run(case: Case, valid: Valid, place: Path) -> Found:
    """Run a case in a folder of its own, and check its ending and what it read and wrote.

    Raises:
      AssertionError: it ended in another way, or touched what is outside.
    """
    shutil.rmtree(place, ignore_errors=True)
    inputs = place / "watched" / "inputs"
    for folder in (inputs, place / "watched" / "here", place / "streams", place / "home", place / "tmp"):
        folder.mkdir(parents=True)
    (place / "watched" / "secret").write_text(SECRET)
    (place / "streams" / "stdin").write_bytes(case.stdin)
    for name in case.uses:
        source = valid / name
        shutil.copytree(source, inputs / name) if source.is_dir() else shutil.copy(source, inputs / name)
    case.make(inputs)
    argv = [word.replace("IN", str(inputs), 1) if "IN" in word else word for word in case.argv]
    argv = [str(place / "watched" / word) if word.startswith("OUT") else word for word in argv]
    before = tree(place / "watched")
    with Opened(place / "watched" / "secret") as times:
        found = in_child(argv, place)
        looked = times()
    after = tree(place / "watched")
    left = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if case.code == 0:
        left = {name for name in left if not name.startswith("OUT")}
    lines = [line for line in found.err.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("llmctl: ")]
    assert found.code == case.code, (case.name, found.code, found.out[-300:], found.err[-1500:])
    assert len(told) == (case.code != 0) and len(lines) <= len(told) + 2, (case.name, found.err[-1500:])
    assert "Traceback" not in found.err and "LLMCTL_DEBUG" not in found.err, (case.name, found.err[-1500:])
    assert SECRET not in found.out + found.err, (case.name, "read outside")
    assert found.memory < MEMORY, (case.name, found.memory)
    assert not looked, (case.name, "opened what is outside")
    # a lock may be tried beside the place that the command names
    beside = tuple(os.path.dirname(word) for word in argv if word.startswith("/") and place not in Path(word).parents)
    outside = [path for path in found.writes if os.path.dirname(path) not in beside]
    assert not outside, (case.name, outside)
    assert not left, (case.name, sorted(left))
    assert not [p for p in (place / "tmp").rglob("*") if p.is_file()], (case.name, "left temporary files")
    return found


def in_child(argv: list[str], place: Path) -> Found:
    """Run a command in a process that is forked from one with the imports."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(argv, place, theirs))
    process.start()
    theirs.close()
    ends = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < ends and resident(process.pid) < MEMORY:
        process.join(0.1)
    if process.is_alive():
        process.kill()
        process.join()
    try:
        code, writes, seconds, memory = ours.recv() if ours.poll() else (process.exitcode, [], 0.0, 0)
    except EOFError:
        code, writes, seconds, memory = process.exitcode, [], 0.0, 0
    out, err = ((place / "streams" / n).read_text(errors="replace") for n in ("stdout", "stderr"))
    return Found(code, out, err, writes, seconds, memory)


def resident(pid: int | None) -> int:
    """Return the resident size of a process in bytes; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class Opened:
    """Count how often a file is opened while the context lasts, by any process and library (inotify)."""

    def __init__(self, path: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._path = path

    def __enter__(self) -> Callable[[], int]:
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._libc.inotify_add_watch(self._fd, os.fsencode(self._path), 0x20) >= 0  # IN_OPEN
        return self._count

    def _count(self) -> int:
        try:
            return len(os.read(self._fd, 65536)) // 16
        except BlockingIOError:
            return 0

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def preload() -> None:
    """Let the server import once what every child needs. It starts no backend and no threads."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        [
            "bad_inputs.runner",
            "llmctl.cli.app",
            "jax",
            "llmctl.artifacts.artifact",
            "orbax.checkpoint",
            "llmctl.convert.importing",
        ]
    )

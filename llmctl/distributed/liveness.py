"""How the processes of a run end: together. Who ends badly says why, who dies is noticed, and nobody is left waiting.

Every process keeps a TCP connection to process 0, which passes on what it hears. The kernel closes the connection of a
process that dies, and its keep-alive finds a host that is gone, so a process that is busy is never taken for dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

GRACE = 10.0
"""Seconds in which a process may end by itself once another has ended."""
RESUME = "the same command goes on from the last checkpoint"


class _Run:
    """This process's part: its connections, and whether it is ending."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.links: dict[int, socket.socket] = {}
        self.ended: set[int] = set()
        """Those that have said so: when their connection closes nobody is lost."""
        self.failed = False
        self.ending = threading.Lock()
        self.over = threading.Event()
        """All have ended well."""
        self.answered = threading.Event()
        """Process 0 has spoken, so it is alive."""

    def send(self, message: dict[str, Any]) -> None:
        text = (json.dumps(message) + "\n").encode()
        for link in list(self.links.values()):
            with contextlib.suppress(OSError):  # whoever is gone is noticed by reading
                link.sendall(text)

    def heard(self, who: int, message: dict[str, Any]) -> None:
        """A process has come to its end."""
        self.answered.set()
        self.ended.add(who)
        if message["code"]:
            self.failed = True
            self.follow(message)
        elif self.index:
            self.over.set()
        else:
            self.finish()

    def finish(self) -> None:
        """Process 0 waits for all to be done."""
        if len(self.ended) == self.count and not self.failed:
            self.send({"from": 0, "code": 0})
            self.over.set()

    def lost(self, who: int) -> None:
        """A connection closed without a word."""
        if not (self.over.is_set() or who in self.ended):
            self.follow({"from": who, "code": 1, "line": f"died or cannot be reached; {RESUME}", "dead": True})

    def follow(self, message: dict[str, Any]) -> None:
        """Ends this process as another has ended, unless it comes to its own end in time."""
        if self.index == 0:
            self.send(message)
        line = f"process {message['from']} of {self.count}: {message['line']}"
        speaks = self.index == 0 or (message["from"] == 0 and "dead" in message)
        wait = 0.0 if "dead" in message else GRACE
        timer = threading.Timer(wait, self.end, (message["code"], line if speaks else ""))
        timer.daemon = True
        timer.start()

    def end(self, code: int, line: str, message: dict[str, Any] | None = None) -> None:
        """Ends this process, once: says `line`, tells the others `message`."""
        if not self.ending.acquire(blocking=False):
            return
        if line:
            sys.stderr.write(f"llmctl: {line}\n")
        if message:
            self.send(message)
        if self.index == 0:  # JAX aborts whoever loses process 0: it goes last
            self.wait_for_others()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # without the farewells of libraries, which wait for processes that are gone

    def wait_for_others(self) -> None:
        """Until their connections are closed; not for ever, as one may hang."""
        until = time.monotonic() + 2 * GRACE
        while self.links and time.monotonic() < until:
            time.sleep(0.02)


_run: _Run | None = None


def silence() -> None:
    """Standard output stays ours: what native libraries print there (Gloo greets its peers) would end up in results."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def bind(index: int, count: int, host: str, seconds: int, tell: Callable[[Any], Any]) -> None:
    """Connects this process to process 0 on `host`.

    Args:
      index, count: this process, and how many there are.
      host: where process 0 runs.
      seconds: after which a host that is silent is given up.
      tell: gives every process what process 0 passes to it.
    """
    global _run
    _run = run = _Run(index, count)
    secret, server = secrets.token_hex(16), None
    if index == 0:
        server = socket.create_server(("", 0), backlog=count)
    port, secret = tell([server.getsockname()[1] if server else 0, secret])
    if server:
        threading.Thread(target=_serve, args=(run, server, secret, seconds), daemon=True).start()
        return
    # JAX aborts this process when it loses process 0, before Python hears of it. The handler is libc's `sleep`, which
    # takes the signal's number for seconds: time enough for the thread below to say what happened and to exit.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
    link = socket.create_connection((host, port), timeout=seconds)
    link.settimeout(None)
    _keep_alive(link, seconds)
    run.links[0] = link
    run.send({"from": index, "secret": secret})
    threading.Thread(target=_listen, args=(run, link), daemon=True).start()


def _keep_alive(link: socket.socket, seconds: int) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", seconds // 2), ("TCP_KEEPINTVL", max(1, seconds // 6)), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen(run: _Run, link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for line in link.makefile("rb"):
            run.heard(0, json.loads(line))
    run.lost(0)


def _serve(run: _Run, server: socket.socket, secret: str, seconds: int) -> None:
    """Process 0's ear: one thread, however many processes there are."""
    chosen = selectors.DefaultSelector()
    chosen.register(server, selectors.EVENT_READ)
    unread: dict[socket.socket, bytes] = {}
    names: dict[socket.socket, int] = {}
    while True:
        for key, _ in chosen.select():
            if key.fileobj is server:
                link, _ = server.accept()
                _keep_alive(link, seconds)
                chosen.register(link, selectors.EVENT_READ)
                unread[link] = b""
                continue
            link: Any = key.fileobj
            try:
                data = link.recv(1 << 16)
            except OSError:
                data = b""
            *lines, unread[link] = (unread[link] + data).split(b"\n")
            for line in lines:
                if link in names:
                    run.heard(names[link], json.loads(line))
                elif (who := _known(line, secret)) is not None:
                    names[link], run.links[who] = who, link
            if not data:
                chosen.unregister(link)
                link.close()
                if link in names:
                    run.links.pop(names[link], None)
                    run.lost(names[link])


def _known(line: bytes, secret: str) -> int | None:
    """The process that says this first; None for a stranger, for whoever scans a network knocks here too."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        message = json.loads(line)
        return message["from"] if secrets.compare_digest(str(message["secret"]), secret) else None
    return None


def leave(code: int, line: str) -> None:
    """Ends this process with the others: returns when all have ended well (code 0), does not return otherwise."""
    run = _run
    if run is None:
        return
    if code:
        message = {"from": run.index, "code": code, "line": line}
        if run.index:
            # Process 0 says the line, and passes the message on to this process too. Where its death is why this one
            # failed, nothing comes back, and `lost` says so instead.
            run.send(message)
            run.answered.wait(GRACE)
        run.end(code, "", None if run.index else message)
        threading.Event().wait()  # another thread is ending this process
    if run.index:
        run.send({"from": run.index, "code": 0})
        run.over.wait()
    else:
        run.ended.add(0)
        run.finish()
        run.over.wait()
        run.wait_for_others()

"""End all processes of a command together, report failures, and detect dead processes.

Every process keeps a TCP connection to process 0, which forwards messages to the others. If a process dies, the kernel
closes its connection. If a host becomes unreachable, TCP keep-alive closes the connection. The processes themselves
send no heartbeats, so a busy process is never reported as dead.
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

from llmctl.config.terminal import visible

GRACE = 10.0
"""Seconds in which a process may exit by itself after another process has ended."""
RESUME = "the same command finishes the work"


class _Run:
    """Store the connections of this process to the other processes of the command, and its state: running or ending."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.connections: dict[int, socket.socket] = {}
        self.ended: set[int] = set()
        """Indices of processes that have sent their exit code. If the connection of such a process closes, the process
        is not reported as dead."""
        self.failed = False
        self.ending = threading.Lock()
        self.all_succeeded = threading.Event()
        """Event that is set when all processes have ended successfully."""
        self.contacted = threading.Event()
        """Event that is set when a message from another process has arrived."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to every connected process."""
        text = (json.dumps(message) + "\n").encode()
        for link in list(self.connections.values()):
            with contextlib.suppress(OSError):  # a lost process is detected by the reading thread
                link.sendall(text)

    def receive(self, sender: int, message: dict[str, Any]) -> None:
        """Handle the last message of process `sender`, which contains the exit code of that process.

        If the code is an error, the end of this process is scheduled. Code 0 has two meanings. In process 0, it means
        that `sender` has succeeded. In the other processes, it comes from process 0, and means that all processes have
        succeeded.
        """
        self.contacted.set()
        self.ended.add(sender)
        if message["code"]:
            self.failed = True
            self.schedule_exit(message)
        elif self.index:
            self.all_succeeded.set()
        else:
            self.finish()

    def finish(self) -> None:
        """Tell all processes that they may exit, if every process has succeeded. Only process 0 calls this method."""
        if len(self.ended) == self.count and not self.failed:
            self.send({"from": 0, "code": 0})
            self.all_succeeded.set()

    def handle_disconnect(self, sender: int) -> None:
        """Report process `sender` as dead if its connection closed before the process had sent its exit code."""
        if not (self.all_succeeded.is_set() or sender in self.ended):
            self.schedule_exit(
                {"from": sender, "code": 1, "line": f"died or cannot be reached; {RESUME}", "dead": True}
            )

    def schedule_exit(self, message: dict[str, Any]) -> None:
        """Schedule the end of this process, because another process has failed or died.

        If the other process failed, this process gets `GRACE` seconds to exit by itself. If the other process died,
        this process ends at once.

        Args:
            message: Last message of the other process: its index, exit code and error line. If the process died, the
                message also has "dead".
        """
        if self.index == 0:
            self.send(message)
        line = f"process {message['from']} of {self.count}: {message['line']}"
        prints = self.index == 0 or (message["from"] == 0 and "dead" in message)
        wait = 0.0 if "dead" in message else GRACE
        timer = threading.Timer(wait, self.end, (message["code"], line if prints else ""))
        timer.daemon = True
        timer.start()

    def end(self, code: int, line: str, message: dict[str, Any] | None = None) -> None:
        """Print `line`, send `message` to the other processes, and exit this process. Later calls have no effect."""
        if not self.ending.acquire(blocking=False):
            return
        if line:
            sys.stderr.write(f"llmctl: {visible(line)}\n")
        if message:
            self.send(message)
        if self.index == 0:  # JAX aborts every process that loses process 0, so process 0 exits last
            self.wait_for_others()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)  # skips libraries' exit handlers, which would wait for lost processes

    def wait_for_others(self) -> None:
        """Wait until all connections are closed, but at most 2 * GRACE seconds, because another process may hang."""
        deadline = time.monotonic() + 2 * GRACE
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.02)


_run: _Run | None = None


def silence() -> None:
    """Discard the standard output of native libraries, but not of Python.

    File descriptor 1 is redirected to the null device, and `sys.stdout` gets a copy of the original descriptor. Gloo,
    for example, logs its peers to standard output. This would corrupt JSON results.
    """
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def connect(index: int, count: int, host: str, seconds: int, broadcast: Callable[[Any], Any]) -> None:
    """Connect this process to process 0 on `host`, and start the thread that receives messages.

    Args:
        index: Index of this process.
        count: Number of processes.
        host: Host of process 0.
        seconds: Number of seconds without a reply after which a host is considered dead.
        broadcast: Function that every process calls, and that returns the argument of process 0 in all processes.
    """
    global _run
    _run = run = _Run(index, count)
    secret, server = secrets.token_hex(16), None
    if index == 0:
        server = socket.create_server(("", 0), backlog=count)
    port, secret = broadcast([server.getsockname()[1] if server else 0, secret])
    if server:
        threading.Thread(target=_serve, args=(run, server, secret, seconds), daemon=True).start()
        return
    # JAX aborts this process when it loses process 0, before Python code can run. The signal handler is libc's `sleep`,
    # which reads the signal's number as seconds. This gives the listening thread time to report the error and to exit.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
    link = socket.create_connection((host, port), timeout=seconds)
    link.settimeout(None)
    _keep_alive(link, seconds)
    run.connections[0] = link
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
            run.receive(0, json.loads(line))
    run.handle_disconnect(0)


def _serve(run: _Run, server: socket.socket, secret: str, seconds: int) -> None:
    """Accept connections and receive messages in process 0, with one thread for all connections."""
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    unread: dict[socket.socket, bytes] = {}
    names: dict[socket.socket, int] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is server:
                link, _ = server.accept()
                _keep_alive(link, seconds)
                selector.register(link, selectors.EVENT_READ)
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
                    run.receive(names[link], json.loads(line))
                elif (sender := _sender_of(line, secret)) is not None:
                    names[link], run.connections[sender] = sender, link
            if not data:
                selector.unregister(link)
                link.close()
                if link in names:
                    run.connections.pop(names[link], None)
                    run.handle_disconnect(names[link])


def _sender_of(line: bytes, secret: str) -> int | None:
    """Return the index of the process that opened a connection. If the first message is invalid, return None.

    A valid message contains a secret that all processes of the command share. Other programs, such as network scanners,
    also connect to the port, and are ignored.
    """
    with contextlib.suppress(ValueError, TypeError, KeyError):
        message = json.loads(line)
        return message["from"] if secrets.compare_digest(str(message["secret"]), secret) else None
    return None


def exit_together(code: int, line: str) -> None:
    """End this process together with the other processes of the command.

    With code 0, return when all processes have succeeded. With another code, or if another process fails, exit this
    process instead of returning.

    Args:
        code: Exit code of this process.
        line: Error message that process 0 prints.
    """
    run = _run
    if run is None:
        return
    if code:
        message = {"from": run.index, "code": code, "line": line}
        if run.index:
            # Process 0 prints the line and forwards the message to this process too. If process 0 is dead there is no
            # reply, and `handle_disconnect` reports its death instead.
            run.send(message)
            run.contacted.wait(GRACE)
        run.end(code, "", None if run.index else message)
        threading.Event().wait()  # another thread calls os._exit
    if run.index:
        run.send({"from": run.index, "code": 0})
        run.all_succeeded.wait()
    else:
        run.ended.add(0)
        run.finish()
        run.all_succeeded.wait()
        run.wait_for_others()

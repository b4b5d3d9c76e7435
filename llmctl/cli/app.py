"""Build the command line, with one command per stage and one per file in `llmctl/cli/commands`.

If a command raises an exception, the process ends with an exit code that depends on the exception's class.
"""

from __future__ import annotations

import difflib
import errno
import functools
import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from llmctl import __version__
from llmctl.artifacts.atomic import disk_is_full
from llmctl.config.errors import Interrupted, LlmctlError, RequestError
from llmctl.config.text_input import check_unicode
from llmctl.distributed import backend, processes
from llmctl.pipeline import registry

if TYPE_CHECKING:
    from collections.abc import Callable

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR", "ABSL_MIN_LOG_LEVEL": "2"}
"""Environment variables, with their values, that silence the logs of C++ libraries."""
_stop_requested = threading.Event()
PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ENXIO),
)
"""Operating system error numbers (errno) that mean that the user gave a wrong path. The command then ends with exit
code 2."""
RESUMABLE = ("run", "prepare", "import")
"""Commands, in addition to the stages, that resume interrupted work when the user runs them again."""


def app(chosen: str = "") -> typer.Typer:
    """Return the Typer app with all commands. Only the module of the command `chosen` is imported.

    The other commands have only a name and a summary, which `--help` lists.
    """
    made = typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # long flags do not fit into columns
        context_settings={
            "max_content_width": 100,
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda flag: flag.replace("_", "-"),
        },
    )

    @made.callback(invoke_without_command=True)
    def llmctl(
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        """Turn raw text into a small, fast, measured language model.

        Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 3 interrupted (run the same command again to
        resume).
        """
        if version:
            typer.echo(f"llmctl {__version__}")

    kinds = registry.stages()
    for name in sorted([*registry.commands(), *kinds], key=_rank):
        if name == chosen:
            resumable = name in kinds or name in RESUMABLE
            function, cls = _function(name, name in kinds)
            made.command(name, cls=cls, short_help=registry.summary(name))(_interruptible(function, resumable))
        else:
            made.command(name, short_help=registry.summary(name))(lambda: None)
    return made


def _rank(name: str) -> tuple[int, str]:
    return (registry.ORDER.index(name) if name in registry.ORDER else len(registry.ORDER), name)


def _function(name: str, stage: bool) -> tuple[Callable[..., Any], Any]:
    """Return (function, click class) with which Typer registers the command `name`. The class is None if Typer's
    default suffices.
    """
    if stage:
        from llmctl.cli import flags

        return flags.command(name)
    return getattr(importlib.import_module(registry.module(name)), registry.symbol(name)), None


def _interruptible(command: Callable[..., Any], resumable: bool) -> Callable[..., Any]:
    """Return a function that runs the command, and raises `Interrupted` if SIGTERM or Ctrl-C arrives.

    KeyboardInterrupt does not suffice, because Typer converts it to another exit code. Orbax and SentencePiece convert
    KeyboardInterrupt to other errors, which would be reported as damaged files.
    """

    @functools.wraps(command)
    def run_command(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(kwargs)
        try:
            return command(*args, **kwargs)
        except Interrupted:
            raise
        except BaseException as e:
            if not isinstance(e, KeyboardInterrupt) and not _stop_requested.is_set():
                raise
            more = "; the same command finishes it" if resumable else ""
            raise Interrupted(f"interrupted{more}") from None

    return run_command


def _check_numbers(options: dict[str, Any]) -> None:
    """Check that float options are finite float32 numbers, and that integer options fit into 64 bits.

    Raises:
      RequestError: If an option is out of range.
    """
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float):
            from llmctl.config.base import FLOAT32_MAX

            if abs(value) <= FLOAT32_MAX:
                continue
            raise RequestError(f"{flag} {value}: must be a finite number, at most {FLOAT32_MAX:.3g}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise RequestError(f"{flag} {value}: must be a whole number of 64 bits, less than 2 ** 63")


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 1 the work failed, 2 the request was wrong, 3 interrupted."""
    _prepare_process()
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. If it fails, print one line about the error to stderr."""
    try:
        _check_request(argv)
        words = argv or _completion_words()
        chosen = next((word for word in words if not word.startswith("-")), "")
        code = app(chosen)(argv or ["--help"], prog_name="llmctl", standalone_mode=False) or 0
        return processes.exit_together(code, "")
    except BaseException as e:
        code, line = error_result(e)
        if os.environ.get("LLMCTL_DEBUG") == "1":
            traceback.print_exc()
        return processes.exit_together(code, " ".join(line.split()))


def _completion_words() -> list[str]:
    """Return the words typed after `llmctl` if the shell requests completion, otherwise an empty list."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return line.split()[1:] if os.environ.get("_LLMCTL_COMPLETE") else []


def error_result(e: BaseException) -> tuple[int, str]:
    """Return (exit code, message) for an exception that ended a command. An empty message is not printed."""
    if isinstance(e, LlmctlError):
        return e.exit_code, str(e)
    if isinstance(e, (KeyboardInterrupt, typer.Abort)):
        return Interrupted.exit_code, "interrupted"
    if isinstance(e, BrokenPipeError):  # `llmctl … | head`: nothing reads the output any more
        return 1, ""
    if isinstance(e, SystemExit):
        return (e.code, "") if isinstance(e.code, int) else (1, str(e.code))
    if disk_is_full(e):
        where = f" ({e.filename})" if isinstance(e, OSError) and e.filename else ""
        return 1, f"disk full{where}: what was saved before is intact; free some space and run the same command"
    if isinstance(e, OSError) and e.errno:
        return _for_os_error(e)
    if isinstance(e, RuntimeError) and str(e).startswith("Symlink loop from"):
        return 2, f"{e}; choose another place"
    if isinstance(e, MemoryError):
        return 1, "out of memory: what was saved before is intact; take smaller sizes"
    if callable(complain := getattr(e, "format_message", None)):  # typer's exceptions for wrong requests
        unknown = hasattr(e, "possibilities")  # its formatted message lists every similar flag
        return 2, f"{getattr(e, 'message', '') if unknown else complain()}{_near(e)}"
    return 1, f"{type(e).__name__}: {e} (LLMCTL_DEBUG=1 shows where)"


def _for_os_error(e: OSError) -> tuple[int, str]:
    """Return (exit code, message) for an error of the operating system: code 2 if a path is wrong, otherwise 1."""
    where = f"{os.fsdecode(e.filename)}: " if e.filename else ""
    if e.errno in PATH_ERRORS:
        return 2, f"{where}{str(e.strerror).lower()}; choose another place"
    return 1, f"{where}{str(e.strerror).lower()}; what was saved before is intact, run the same command again"


def _check_request(argv: list[str]) -> None:
    """Check that all arguments are UTF-8 text, and that the current folder exists.

    Raises:
      RequestError: If an argument is not UTF-8, or the current folder was deleted.
    """
    for n, word in enumerate(argv, 1):
        check_unicode(word, f"argument {n}")
    try:
        Path.cwd()
    except OSError as e:
        raise RequestError(f"the current folder: {str(e.strerror).lower()}; change to another one") from None


def _near(e: Any) -> str:
    wrong = getattr(e, "option_name", "")
    if not getattr(e, "ctx", None):
        return ""
    if not wrong:
        message = str(getattr(e, "message", ""))
        lost = message.startswith("No such command") and "Did you mean" not in message
        return " `llmctl --help` lists the commands." if lost else ""
    params = e.ctx.command.params
    flags = {o: o for p in params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    named = {f"--{p.name.replace('_', '-')}": p for p in params if p.param_type_name == "argument"}
    arguments = {flag: f"{_metavar(p)}, which is written without a flag" for flag, p in named.items()}
    arguments |= {f"--{_metavar(p).lower()}": arguments[flag] for flag, p in named.items()}
    negated = re.sub(r"^--(.+\.)no-", r"--no-\1", wrong)  # the negation comes before the section
    known = flags | arguments
    near = [negated] if negated in known else difflib.get_close_matches(wrong, known, n=1)
    if near:
        return f", did you mean {known[near[0]]}?"
    if "." in wrong and "--set" in flags:
        return f"; write --set {wrong.removeprefix('--').replace('-', '_')}=VALUE"
    return ""


def _metavar(argument: Any) -> str:
    return (argument.metavar or argument.name).strip("[]").upper()


def _prepare_process() -> None:
    """Silence the logs and warnings of libraries, set up the allocator, and handle SIGTERM like Ctrl-C."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    backend.silence_libtpu()
    backend.share_arena()
    if os.environ.get("LLMCTL_DEBUG") != "1":
        warnings.simplefilter("ignore")
        for name in ("jax", "orbax", "grain"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # Orbax logs errors here with a traceback, and also raises them.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)


def _stop(*_: Any) -> None:
    """Handle a signal: record the signal, and raise KeyboardInterrupt.

    The record is needed because libraries convert KeyboardInterrupt to other errors.
    """
    _stop_requested.set()
    raise KeyboardInterrupt

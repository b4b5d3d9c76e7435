"""`llmctl`: one command a stage, one a file in `llmctl/commands`, and the one place that decides how a command ends."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer

from llmctl import __version__, commands, flags, stages
from llmctl.config import hint
from llmctl.errors import Interrupted, LlmctlError

QUIET = {"TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR", "ABSL_MIN_LOG_LEVEL": "2"}
"""What keeps the C++ libraries below us from talking."""


def app() -> typer.Typer:
    """The command line with every command that there is."""
    made = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda flag: flag.replace("_", "-"),
        },
    )

    @made.callback(invoke_without_command=True)
    def llmctl(
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    ) -> None:
        """From raw text to a small, fast, measured language model."""
        if version:
            typer.echo(f"llmctl {__version__}")
            raise typer.Exit

    names = commands.names()
    for name in [n for n in names if n == "run"]:
        made.command(name)(commands.load(name))
    for kind in stages.kinds():
        made.command(kind, rich_help_panel="Stages")(flags.command(kind))
    for name in [n for n in names if n != "run"]:
        made.command(name)(commands.load(name))
    return made


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs one command and exits: 0 done, 1 the work failed, 2 the request was wrong, 3 interrupted and resumable."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Runs one command; its exit code. Whatever went wrong is one line on stderr."""
    _be_quiet()
    try:
        return app()(argv or ["--help"], prog_name="llmctl", standalone_mode=False) or 0
    except BaseException as e:
        code, line = ending(e)
        if os.environ.get("LLMCTL_DEBUG") == "1":
            traceback.print_exc()
        sys.stderr.write(f"llmctl: {' '.join(line.split())}\n")
        return code


def ending(e: BaseException) -> tuple[int, str]:
    """The exit code and the line for people that an exception means."""
    if isinstance(e, LlmctlError):
        return e.exit_code, str(e)
    if isinstance(e, (KeyboardInterrupt, typer.Abort)):
        return Interrupted.exit_code, "interrupted; the same command goes on from the last checkpoint"
    if isinstance(e, SystemExit):
        return (e.code, "") if isinstance(e.code, int) else (1, str(e.code))
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({e.filename})" if e.filename else ""
        return 1, f"disk full{where}: the previous checkpoint is intact; free some space and run the same command"
    if callable(complain := getattr(e, "format_message", None)):  # how typer says that the request was wrong
        return 2, f"{complain()}{_near(e)}"
    return 1, f"{type(e).__name__}: {e} (LLMCTL_DEBUG=1 shows where)"


def _near(e: Any) -> str:
    wrong = getattr(e, "option_name", "")
    if not wrong or not getattr(e, "ctx", None) or getattr(e, "possibilities", None):
        return ""
    return hint(wrong, [o for p in e.ctx.command.params for o in (*p.opts, *p.secondary_opts)])


def _be_quiet() -> None:
    """Our own lines are the only ones, and a polite kill ends like Ctrl-C."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ.get("LLMCTL_DEBUG") != "1":
        warnings.simplefilter("ignore")
        for name in ("absl", "jax", "orbax", "grain"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)

"""The three ways a command ends other than well; the class decides the exit code."""


class LlmctlError(Exception):
    """One line for a person: what went wrong, where, and what to do about it."""

    exit_code = 1


class RequestError(LlmctlError):
    """The request was wrong (flag, recipe, path, data, artifact); nothing was written."""

    exit_code = 2


class WorkError(LlmctlError):
    """The work itself failed (disk full, training diverged); what was saved before is intact."""

    exit_code = 1


class Interrupted(LlmctlError):
    """SIGTERM or Ctrl-C arrived, a checkpoint was written; the same command goes on from there."""

    exit_code = 3

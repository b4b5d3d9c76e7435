"""The three ways a command ends other than well; the class decides the exit code."""


class LlmctlError(Exception):
    """One line for a person: what went wrong, where, and what to do about it."""

    exit_code = 1


class RequestError(LlmctlError):
    """The request was wrong (flag, recipe, path, data, artifact); nothing was written."""

    exit_code = 2


class WorkError(LlmctlError):
    """The work failed (disk full, training diverged). Files that were saved before are intact."""

    exit_code = 1


class Interrupted(LlmctlError):
    """SIGTERM or Ctrl-C arrived. Files that were saved before are intact; most commands finish the work when rerun."""

    exit_code = 3

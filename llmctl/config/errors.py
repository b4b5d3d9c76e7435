"""Define the errors that end a command. Each class sets the exit code."""


class LlmctlError(Exception):
    """Report a failure in one line: the cause, the location and the remedy."""

    exit_code = 1


class RequestError(LlmctlError):
    """Report an invalid request (a flag, recipe, path, data set or artifact). The command has written no output."""

    exit_code = 2


class WorkError(LlmctlError):
    """Report that the work failed, such as a full disk or diverged training. Files saved earlier are intact."""

    exit_code = 1


class Interrupted(LlmctlError):
    """Report that SIGTERM or Ctrl-C arrived.

    Files saved earlier are intact. Most commands finish the work if they are started again.
    """

    exit_code = 3

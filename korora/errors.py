"""One clear line for whatever goes wrong, and its exit code."""

import sys
from typing import Final

from proxy.errors import EXIT_BUG, exit_code_of

PREFIX: Final = "korora: error: "


def line_of(error: BaseException) -> str:
    """What went wrong and what to do about it, on one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    if exit_code_of(error) == EXIT_BUG:
        return f"{PREFIX}{type(error).__name__}: {message}: this is a bug of Kororā; --log-level debug shows where"
    remedy = str(getattr(error, "remedy", "")).rstrip(".")
    return f"{PREFIX}{message}; {remedy}" if remedy else f"{PREFIX}{message}"


def complain(error: BaseException) -> int:
    """Print that line to standard error and return the exit code."""
    print(line_of(error), file=sys.stderr, flush=True)  # noqa: T201 - for people
    return exit_code_of(error)

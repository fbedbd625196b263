"""The --report file: JSON, written whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from korora import __version__
from proxy.errors import EXIT_DONE, EXIT_SIGNAL_BASE, OUTCOMES, ConfigurationError

if TYPE_CHECKING:
    from proxy.report import SessionReport  # and with it all that moves pages; `korora xl` beside a daemon needs none


def as_dict(report: "SessionReport") -> dict[str, Any]:
    """A report as JSON's types, with the version of the program that made it."""
    built: dict[str, Any] = msgspec.to_builtins(report)
    return {"version": __version__, **built}


def conclude(report: "SessionReport", code: int, error: str | None) -> None:
    """Write how it ended into the report."""
    report.exit_code = code
    report.outcome = "interrupted" if code > EXIT_SIGNAL_BASE else OUTCOMES.get(code, "internal")
    report.error = None if code == EXIT_DONE else error


def check_writable(path: Path | None) -> None:
    """Find out before the migration, not after it, that a report cannot be written.

    Raises:
        ConfigurationError: it cannot.
    """
    if path is None:
        return
    parent = path.absolute().parent
    remedy = "give a file in a directory that you may write"
    # A path too long, or through a directory that is not ours, is an error of its own to Path.exists and its like.
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            return
        fit = parent.is_dir() and not path.is_dir() and os.access(parent, os.W_OK)
    except OSError as error:
        raise ConfigurationError(f"cannot write the report {path}: {error.strerror}", remedy) from None
    if not fit:
        raise ConfigurationError(f"cannot write the report {path}", remedy)


def write(path: Path, report: "SessionReport") -> None:
    """Write the report by a temporary file, fsync and rename; mode 0600. A pipe or device is written directly."""
    write_built(path, as_dict(report))


def write_built(path: Path, built: dict[str, Any]) -> None:
    """The same for what ``as_dict`` made, in whichever process."""
    content = msgspec.json.format(msgspec.json.encode(built), indent=2) + b"\n"
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    descriptor, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

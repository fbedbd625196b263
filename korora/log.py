"""Logs for people and machines, on standard error only; no secret ever reaches them."""

import logging
import sys
from collections.abc import MutableMapping
from enum import StrEnum, unique
from typing import Any, Final

_HIDDEN: Final = ("key", "token", "secret", "exporter", "password")


@unique
class LogFormat(StrEnum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


@unique
class LogLevel(StrEnum):
    """Which log lines are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def hide_secrets(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Second line of defence: nothing logs a secret, and a value under a name that smells of one is replaced."""
    return {name: _shown(name, value) for name, value in event.items()}


def _shown(name: str, value: Any) -> Any:
    """The value as it may be logged under this name, whatever it is made of."""
    if isinstance(value, bytes | bytearray | memoryview) or any(word in name.lower() for word in _HIDDEN):
        return "(hidden)"
    if isinstance(value, dict):
        return {key: _shown(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [_shown("", each) for each in value]
        return tuple(inner) if isinstance(value, tuple) else inner
    return value


def spare_terminals(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """No control character is written: a peer's words can be in any error's text, and a terminal may read the log."""
    return {
        name: "".join(one if one.isprintable() else "?" for one in value)
        if isinstance(value, str) and not value.isprintable()
        else value
        for name, value in event.items()
    }


def spare_rich() -> None:
    """Import structlog without rich, with which it would draw tracebacks that nobody is shown.

    That takes as long as all the rest of it, in each process of the daemon and before each migration of xl's. What
    does draw with rich imports it itself.
    """
    if "structlog" in sys.modules or "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # which the import system takes for: it is not there
    try:
        import structlog  # noqa: F401 - loaded without rich
    finally:
        del sys.modules["rich"]


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Set the process's logging up, once, before anything logs."""
    spare_rich()
    import structlog  # takes longer than the rest of `korora --help` together

    renderer: Any
    if log_format is LogFormat.JSON:
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            hide_secrets,
            spare_terminals,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # One write for a line: several processes may share the stream, and print() writes its end apart.
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )

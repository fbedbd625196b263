"""What stays of a session that is over: a line in the log, and its report in the state directory."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from korora import report as reports
from proxy.report import SessionReport

log = structlog.get_logger("korora.worker")

REPORTS_KEPT: Final = 1000  # in the state directory, some 2 KiB each; older ones are removed


def keep(folder: Path, report: SessionReport) -> None:
    """Write a report, and make room for it.

    Sources choose the ids of their sessions: one that is used again must not replace what was reported before.

    Raises:
        OSError: it cannot be written.
    """
    name = f"{report.session_id}-{report.role}"
    numbered = (f"{name}{'' if number == 1 else f'-{number}'}.json" for number in range(1, REPORTS_KEPT + 2))
    reports.write(next(path for path in (folder / name for name in numbered) if not path.exists()), report)
    ages: dict[Path, int] = {}
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):  # another worker has just made room, too
            ages[path] = path.stat().st_mtime_ns
    for path in sorted(ages, key=ages.__getitem__)[:-REPORTS_KEPT]:
        path.unlink(missing_ok=True)


async def keep_or_tell(folder: Path, report: SessionReport) -> None:
    """``keep`` in a thread; a disk that does not take it is told in the log."""
    try:
        await asyncio.to_thread(keep, folder, report)
    except OSError as error:
        log.warning("a report cannot be kept", session=report.session_id[:8], reason=error.strerror or str(error))


def tell(report: SessionReport, way: str, words: str | None) -> None:
    """The line in the log.

    Args:
        report: concluded.
        way: of the configuration, that it took; empty where it is not known.
        words: what ended it early; None if all went well.
    """
    facts = {
        "session": report.session_id[:8],
        "role": report.role,
        "way": way,
        "peer": report.peer,
        "seconds": round(report.seconds, 3),
        "bytes_forward": report.bytes_in["forward"],
        "bytes_backward": report.bytes_in["backward"],
    }
    if words is None:
        log.info("session done", **facts, cipher=report.cipher, group=report.group)
    else:
        log.info("session failed", exit_code=report.exit_code, outcome=report.outcome, reason=words, **facts)

"""The reports in the state directory."""

from contextlib import suppress
from pathlib import Path
from typing import Final

from korora import report as reports
from proxy.report import SessionReport

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

"""The process that holds xl's pipes while a daemon carries its migration: as long as it lives, xl waits to be told.

A process is known by its number and the moment it was started (proc(5), starttime): numbers are used again.
"""

from pathlib import Path
from typing import Final

_STARTTIME: Final = 22 - 3  # of /proc/PID/stat, counted behind the name in parentheses and the state


def holder_of(pid: int) -> str:
    """How a living process is written down; empty if it is gone."""
    started = _started(pid)
    return "" if started is None else f"{pid} {started}"


def holds_on(holder: str) -> bool:
    """Whether the process that was written down lives still."""
    number, _, started = holder.partition(" ")
    return number.isdecimal() and started != "" and _started(int(number)) == started


def _started(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    if len(fields) <= _STARTTIME + 1 or fields[0] in {"Z", "X"}:
        return None
    return fields[_STARTTIME]

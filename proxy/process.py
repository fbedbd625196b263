"""Whether a process that was once seen lives still, also after its number has been given to another.

A process is known by its number and the moment it was started (proc(5), starttime).
"""

from pathlib import Path
from typing import Final

_STARTTIME: Final = 22 - 3  # of /proc/PID/stat, counted behind the name in parentheses and the state


def written_down(pid: int) -> str:
    """What to keep of a living process, "NUMBER STARTTIME"; empty if it is gone."""
    started = _started(pid)
    return "" if started is None else f"{pid} {started}"


def lives(written: str) -> bool:
    """Whether the process that was ``written_down`` lives still."""
    number, _, started = written.partition(" ")
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

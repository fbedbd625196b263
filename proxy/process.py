"""Whether a process that was once seen lives still, also after its number was given to another; and who started it.

A process is known by its number and the moment it was started (proc(5), starttime).
"""

from pathlib import Path
from typing import Final

_STARTTIME: Final = 22 - 3  # of /proc/PID/stat, counted behind the name in parentheses and the state
_PARENT: Final = 4 - 3
_ANCESTORS_MAX: Final = 8  # xl starts a shell, and that may start another


def written_down(pid: int) -> str:
    """What to keep of a living process, "NUMBER STARTTIME"; empty if it is gone."""
    started = _started(pid)
    return "" if started is None else f"{pid} {started}"


def lives(written: str) -> bool:
    """Whether the process that was ``written_down`` lives still."""
    number, _, started = written.partition(" ")
    return number.isdecimal() and started != "" and _started(int(number)) == started


def sender_above(pid: int) -> str:
    """The ``xl migrate`` that has started a process as its transport, directly or by shells; empty if none has."""
    for _ in range(_ANCESTORS_MAX):
        fields = _stat(pid)
        if fields is None:
            return ""
        pid = int(fields[_PARENT])
        if pid <= 1:
            return ""
        if _migrates(pid):
            return written_down(pid)
    return ""


def _migrates(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    before = words[: words.index("migrate")] if "migrate" in words else []
    return any(Path(word).stem == "xl" for word in before)


def _started(pid: int) -> str | None:
    fields = _stat(pid)
    return None if fields is None or fields[0] in {"Z", "X"} else fields[_STARTTIME]


def _stat(pid: int) -> list[str] | None:
    """What proc(5) has of a process, from its state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields if len(fields) > _STARTTIME + 1 else None

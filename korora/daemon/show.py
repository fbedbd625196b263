"""What `korora top` shows: a table on a terminal, a line a session elsewhere."""

from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from proxy.control import printable

UNKNOWN: Final = "—"
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_COLUMNS: Final = (
    *("session", "vm", "way", "peer", "moved", "rate", "limit"),
    *("flight", "RTT", "lanes", "resumes", "work", "saved", "rounds", "ETA", "state"),
)
_LEFT: Final = frozenset({"session", "vm", "way", "peer", "work", "state"})


def size(count: float | None) -> str:
    """A number of bytes for people."""
    if count is None:
        return UNKNOWN
    value = float(count)
    for unit in _UNITS[:-1]:
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {_UNITS[-1]}"


def rate(count: float | None) -> str:
    """A number of bytes a second for people."""
    return UNKNOWN if count is None else f"{size(count)}/s"


def share(part: float, whole: float) -> str:
    """A part of something for people; below 0 where it costs more than it saves."""
    return f"{part / whole:.0%}" if whole > 0 else UNKNOWN


def span(seconds: float | None) -> str:
    """A time for people."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cells(session: dict[str, Any]) -> dict[str, str]:
    """One session's columns."""
    departs = session["role"] == "source"
    arrow, delay = ("→" if departs else "←"), session["delay_seconds"]
    moved = session["bytes_in"] + session["bytes_out"]
    return {
        "session": session["session_id"][:8],
        "vm": printable(session["vm"] or UNKNOWN),
        "way": f"{session['way']}",
        "peer": f"{arrow} {printable(session['peer'])}",
        "moved": size(moved),
        "rate": rate(session["throughput"]),
        "limit": rate(session["rate_limit"]),
        "flight": size(session["queue_bytes"]),
        "RTT": f"{delay * 1000:.1f} ms" if delay else UNKNOWN,
        "lanes": str(session["lanes"]),
        "resumes": str(session["resumes"]),
        "work": session["regime"] or UNKNOWN,
        "saved": share(session["bytes_saved"], moved) if session["paged_bytes"] else UNKNOWN,
        "rounds": UNKNOWN if session["rounds"] is None else str(session["rounds"]),
        "ETA": span(session["eta_seconds"]),
        "state": _state(session),
    }


def _state(session: dict[str, Any]) -> str:
    """The session's, and the hand-over's once that is past its first."""
    handover = session["handover"]
    return session["state"] if handover in ("unguarded", "open") else f"{session['state']}, {handover}"


def head(status: dict[str, Any]) -> str:
    """The daemon in one line."""
    workers = status["workers"]
    words = [
        f"{status['name']} {status['phase']} for {span(status['uptime_seconds'])}",
        f"{len(status['sessions'])} sessions, {status['sessions_ended']} ended",
        f"{sum(worker['ready'] for worker in workers)} of {len(workers)} workers",
        f"limit {rate(status['rate_limit'])}",
    ]
    if status["peers_refused"]:
        words.append(f"{status['peers_refused']} peers refused")
    if status["restart_needed"]:
        words.append(f"restart needed for {', '.join(status['restart_needed'])}")
    return " · ".join(words)


def table(status: dict[str, Any]) -> Group:
    """All of it for a terminal; nothing a peer has named is taken for markup."""
    made = Table(box=None, pad_edge=False, expand=False)
    for column in _COLUMNS:
        made.add_column(column, justify="left" if column in _LEFT else "right", no_wrap=True)
    for session in status["sessions"]:
        row = cells(session)
        made.add_row(*(Text(row[column]) for column in _COLUMNS))
    return Group(Text(head(status)), Text(""), made)


def lines(status: dict[str, Any]) -> list[str]:
    """All of it as plain lines: the daemon, then a line a session."""
    rows = [cells(session) for session in status["sessions"]]
    return [
        head(status),
        *(" ".join(f"{column}={row[column].replace(' ', '')}" for column in _COLUMNS) for row in rows),
    ]

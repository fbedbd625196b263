"""What `korora top` draws: on a terminal a table, elsewhere lines, and never what a peer would like drawn."""

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from korora.daemon import show
from tests.korora.daemon.test_table import STATUS


def session(**more: Any) -> dict[str, Any]:
    status: dict[str, Any] = msgspec.to_builtins(STATUS)
    extra = {"way": "vm1", "worker": 0, "priority": "normal", "throughput": 0, "limit": None, "rounds": None}
    return status | extra | {"bytes_saved": 0, "eta_seconds": None} | more


def daemon(*sessions: dict[str, Any], **more: Any) -> dict[str, Any]:
    workers = [{"ready": True}, {"ready": False}]
    facts = {"name": "alpha", "phase": "serving", "uptime_seconds": 3725.0, "workers": workers, "rate_limit": None}
    counts = {"sessions": list(sessions), "sessions_ended": 3, "peers_refused": 0, "restart_needed": []}
    return facts | counts | more


def drawn(status: dict[str, Any]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, force_terminal=False).print(show.table(status))
    return stream.getvalue()


def test_the_head() -> None:
    assert show.head(daemon()) == "alpha serving for 1:02:05 · 0 sessions, 3 ended · 1 of 2 workers · limit —"
    full = show.head(daemon(peers_refused=2, restart_needed=["workers", "state"], rate_limit=2**30))
    assert full.endswith("limit 1.0 GiB/s · 2 peers refused · restart needed for workers, state")


def test_a_row() -> None:
    departing = session(session_id="ab" * 16, bytes_in=5 * 2**20, delay_seconds=0.0123, queue_bytes=2**20, lanes=4)
    departing |= {"regime": "light", "paged_bytes": 5 * 2**20, "bytes_saved": 4 * 2**20}
    arriving = session(role="destination", throughput=3_000_000, rounds=7, eta_seconds=95.2, vm="web-1", resumes=2)
    text = drawn(daemon(departing, arriving))
    first, second = (" ".join(line.split()) for line in text.splitlines()[3:5])
    assert first == "abababab — vm1 → beta 5.0 MiB 0 B/s — 1.0 MiB 12.3 ms 4 0 light 80% — — open"
    assert second == "00 web-1 vm1 ← beta 0 B 2.9 MiB/s — 0 B — 1 2 — — 7 1:35 open"
    lines = show.lines(daemon(departing, arriving))
    assert lines[1].startswith("session=abababab vm=— way=vm1 peer=→beta moved=5.0MiB ")
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("handover", "shown"),
    [("unguarded", "open"), ("open", "open"), ("prepared", "open, prepared"), ("doubt", "open, doubt")],
)
def test_the_state_of_a_hand_over_that_has_begun(handover: str, shown: str) -> None:
    assert show.cells(session(handover=handover))["state"] == shown


@pytest.mark.parametrize(
    ("part", "whole", "shown"), [(0, 0, "—"), (0, 5, "0%"), (99, 100, "99%"), (-1, 100, "-1%"), (1, 3, "33%")]
)
def test_shares(part: int, whole: int, shown: str) -> None:
    assert show.share(part, whole) == shown


@pytest.mark.parametrize("vm", ["[red]x[/red]", "[link=http://x]", "\x1b[31mred", "two\nlines", "\x9b31m"])
def test_a_name_that_would_draw(vm: str) -> None:
    for text in (drawn(daemon(session(vm=vm))), "\n".join(show.lines(daemon(session(vm=vm))))):
        assert "\x1b" not in text
        assert "\x9b" not in text
        assert vm.partition("]")[0].replace("\x1b", "?").replace("\n", "?").replace("\x9b", "?") in text


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "—"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**60, "1048576.0 TiB"),
    ],
)
def test_sizes(count: int | None, shown: str) -> None:
    assert show.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "—"), (0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90_061, "25:01:01")]
)
def test_times(seconds: float | None, shown: str) -> None:
    assert show.span(seconds) == shown

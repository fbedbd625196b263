"""The parent's table of sessions, by messages of workers."""

from dataclasses import replace
from typing import Any

import pytest

from korora.daemon import config
from korora.daemon.messages import Begun, Ended
from korora.daemon.table import FINISHED_KEPT, Sessions
from proxy.status import SessionStatus
from tests.korora.metrics.support import IDLE

MIB = 1024 * 1024
STATUS = replace(IDLE, session_id="00", seconds=0.0, channels=1, window_bytes=4 * MIB)
TEXT = """
{limits}
[[peer]]
name = "beta"
address = "beta:8010"
[[ingress]]
name = "urgent"
from = "tcp:127.0.0.1:0"
peer = "beta"
priority = "high"
[[ingress]]
name = "bulk"
from = "tcp:127.0.0.1:0"
peer = "beta"
rate_limit = {bulk}
"""


def table(limits: str = "", bulk: int = 50 * MIB) -> Sessions:
    return Sessions(configuration(limits, bulk))


def configuration(limits: str = "", bulk: int = 50 * MIB) -> config.Config:
    return config.parse(TEXT.format(limits=limits, bulk=bulk).encode(), "test")


def begin(sessions: Sessions, number: int, way: str, worker: int = 0, **more: Any) -> SessionStatus:
    status = replace(STATUS, session_id=f"{number:032x}", **more)
    assert sessions.begun(worker, Begun(way, status))
    return status


def end(sessions: Sessions, status: SessionStatus) -> None:
    sessions.over(0, Ended(status.session_id, status.role, "bulk", status.peer, "done", 0, 1.5, None, status))


def rates(sessions: Sessions) -> dict[str, float | None]:
    return {way: rate for rates in sessions.rates().values() for way, rate in rates.items()}


def test_throughput_is_of_the_last_two_statuses() -> None:
    sessions = table()
    first = begin(sessions, 1, "urgent")
    sessions.sampled(0, replace(first, seconds=2.0, bytes_in=10 * MIB, bytes_out=2 * MIB))
    (view,) = sessions.views()
    assert view["throughput"] == 6 * MIB
    assert (view["rounds"], view["bytes_saved"], view["eta_seconds"]) == (None, 0, None)
    sessions.sampled(0, replace(first, seconds=3.0, bytes_in=11 * MIB, bytes_out=2 * MIB))
    (view,) = sessions.views()
    assert (view["throughput"], view["way"], view["priority"], view["bytes_in"]) == (MIB, "urgent", "high", 11 * MIB)
    sessions.sampled(
        0, replace(first, seconds=3.0, bytes_in=11 * MIB, bytes_out=2 * MIB)
    )  # twice the same: no division by 0
    assert sessions.views()[0]["throughput"] == MIB


def test_rounds_and_what_is_left_of_them() -> None:
    sessions = table()
    first = begin(sessions, 1, "urgent", rounds=2, rounds_ended=(16_000,), guest_pages=17_000, round_pages=1000)
    later = replace(first, seconds=1.0, rounds=3, rounds_ended=(16_000, 4000), round_pages=500, guest_pages=20_500)
    sessions.sampled(0, replace(later, paged_bytes=9 * MIB, body_bytes=MIB))
    (view,) = sessions.views()
    # 500 of 1000 are left of this round, and a third of 1000 for all that follow it, at 3500 a second.
    assert (view["rounds"], view["bytes_saved"], view["eta_seconds"]) == (3, 8 * MIB, 0.2)


def test_limits_without_a_total() -> None:
    sessions = table("[limits]\nsession_rate_limit = 83886080\n")  # 80 MiB/s
    urgent, bulk = begin(sessions, 1, "urgent"), begin(sessions, 2, "bulk", worker=1)
    assert sessions.rates() == {0: {urgent.session_id: 80.0 * MIB}, 1: {bulk.session_id: 50.0 * MIB}}
    assert sessions.rates() == {}  # nothing has changed
    sessions.limit(sessions.find(bulk.session_id), 7.0 * MIB)
    assert rates(sessions) == {bulk.session_id: 7.0 * MIB}
    sessions.limit(sessions.find(bulk.session_id), None)
    assert rates(sessions) == {bulk.session_id: None}  # the operator's word counts for more than the file's


def test_a_total_is_divided_by_priority_and_anew_when_one_ends() -> None:
    sessions = table('[limits]\nrate_limit = "100 MiB/s"\n')
    urgent, bulk = begin(sessions, 1, "urgent"), begin(sessions, 2, "bulk")
    assert rates(sessions) == {urgent.session_id: 80.0 * MIB, bulk.session_id: 20.0 * MIB}
    end(sessions, urgent)
    assert rates(sessions) == {bulk.session_id: 50.0 * MIB}  # its own limit
    sessions.total = 10.0 * MIB
    assert rates(sessions) == {bulk.session_id: 10.0 * MIB}


def test_what_a_session_sends_tells_what_it_wants_once_its_rate_has_settled() -> None:
    sessions = table('[limits]\nrate_limit = "100 MiB/s"\n')
    idle, busy = begin(sessions, 1, "urgent"), begin(sessions, 2, "urgent")
    assert rates(sessions) == {idle.session_id: 50.0 * MIB, busy.session_id: 50.0 * MIB}
    told: list[float | None] = []
    for second in range(1, 6):
        sessions.sampled(0, replace(idle, seconds=float(second)))
        sent = sum(rate or 0.0 for rate in told[-1:]) or 50.0 * MIB
        busy = replace(busy, seconds=float(second), bytes_in=busy.bytes_in + int(sent))
        sessions.sampled(0, busy)
        told.append(rates(sessions).get(busy.session_id, told[-1] if told else 50.0 * MIB))
    # For one sample nothing can be told; then the idle one keeps a tenth of its share, and the other has the rest.
    assert told[0] == 50.0 * MIB
    assert told[1:] == [95.0 * MIB] * 4
    sessions.sampled(0, replace(idle, seconds=6.0, bytes_in=5 * MIB))  # it is back, and sends all it may
    assert rates(sessions) == {idle.session_id: 50.0 * MIB, busy.session_id: 50.0 * MIB}


def test_arriving_sessions_take_no_part() -> None:
    sessions = table('[limits]\nrate_limit = "100 MiB/s"\n')
    departing = begin(sessions, 1, "urgent")
    begin(sessions, 2, "default", role="destination")
    assert rates(sessions) == {departing.session_id: 100.0 * MIB}
    with pytest.raises(ValueError, match="arrives here: limit it where it departs"):
        sessions.limit([key for key in sessions.live if key[1] == "destination"], 5.0 * MIB)
    assert (sessions.arriving(0), len(sessions.of(0)), sessions.arriving(1)) == (1, 2, 0)


def test_a_reload_counts_for_what_runs() -> None:
    sessions = table()
    bulk = begin(sessions, 2, "bulk")
    rates(sessions)
    sessions.total = 5.0 * MIB
    sessions.reconfigure(configuration(bulk=10 * MIB))
    assert sessions.total is None
    assert rates(sessions) == {bulk.session_id: 10.0 * MIB}
    gone = config.parse(TEXT.format(limits="", bulk=2048).replace('"bulk"', '"other"').encode(), "test")
    sessions.reconfigure(gone)
    assert rates(sessions) == {bulk.session_id: None}


def test_a_session_is_found_by_the_beginning_of_its_id() -> None:
    sessions = table()
    for session_id in ("aabbccdd" * 4, "aabbcc00" * 4):
        begin(sessions, int(session_id, 16), "bulk")
    begin(sessions, int("aabbccdd" * 4, 16), "default", role="destination")  # a daemon that sends to itself
    assert {role for _, role in sessions.find("AABBCCDD")} == {"source", "destination"}
    for text, words in (("aab", "at least 4"), ("ffff", "no session 'ffff' is open"), ("aabb", "2 sessions begin")):
        with pytest.raises(ValueError, match=words):
            sessions.find(text)


def test_an_id_that_is_used_twice_leaves_the_first_alone() -> None:
    """A source chooses its ids, and two workers know nothing of one another."""
    sessions = table()
    first = begin(sessions, 1, "urgent", worker=0)
    second = replace(first, bytes_in=99, seconds=9.0)
    assert not sessions.begun(1, Begun("bulk", second))
    sessions.sampled(1, second)
    sessions.over(1, Ended(second.session_id, second.role, "bulk", "beta", "refused", 3, 0.1, "cancelled", second))
    (view,) = sessions.views()
    assert (view["worker"], view["way"], view["bytes_in"]) == (0, "urgent", 0)
    sessions.over(0, Ended(first.session_id, first.role, "urgent", "beta", "done", 0, 0.1, None, first))
    assert [entry.outcome for entry in sessions.finished] == ["done", "refused"]
    assert sessions.live == {}


def test_what_a_dead_worker_carried_is_lost() -> None:
    sessions = table()
    begin(sessions, 1, "urgent", worker=0)
    other = begin(sessions, 2, "bulk", worker=1)
    assert [key[0][-1] for key in sessions.lost(0)] == ["1"]
    assert [view["session_id"] for view in sessions.views()] == [other.session_id]
    (finished,) = sessions.finished
    assert (finished.outcome, finished.exit_code, finished.peer) == ("lost", 6, "beta")


def test_finished_sessions_are_bounded() -> None:
    sessions = table()
    for number in range(FINISHED_KEPT + 10):
        end(sessions, begin(sessions, number, "bulk"))
    sessions.over(0, Ended("ff", "source", "urgent", None, "lost", 6, 0.1, "cannot reach it"))  # before it was open
    assert (len(sessions.finished), sessions.ended, sessions.live) == (FINISHED_KEPT, FINISHED_KEPT + 11, {})
    last = sessions.finished[0]
    assert (last.session_id, last.way, last.peer, last.bytes_in) == ("ff", "urgent", None, 0)


def test_what_is_said_of_no_session_changes_nothing() -> None:
    sessions = table()
    sessions.sampled(0, STATUS)
    assert (sessions.views(), sessions.rates()) == ([], {})

"""One bit turned on the control connection: in each record of the TLS handshake, and in each message after it.

Also what an attacker without keys can do besides: replay, drop and swap TLS records, and forge plaintext alerts.
"""

from collections.abc import Callable, Iterable

import pytest

from tests.attacks.mitm import Action, Attack
from tests.attacks.points import BACKWARD, FORWARD, MESSAGES, Control, FlipOnce, Which, places, tls
from tests.attacks.relays import Identities, Outcome, attacked, attacked_all, on_uvloop, shorten
from tests.attacks.wire import Kind, Unit, Way

HEADER_BITS = range(40)
LENGTH_BITS = range(24, 40)  # of a TLS record's header
MINOR_VERSION_BITS = range(16, 24)  # legacy_record_version: to be ignored in plaintext records (RFC 8446 section 5.1)
IMPATIENT = {"HANDSHAKE_SECONDS_MAX": 1.0, "HEARTBEAT_SECONDS": 0.4, "HANDOVER_SECONDS_MAX": 0.5}

Codes = set[tuple[int | None, int | None]]
AUTHENTICATION: Codes = {(4, 4)}
INTEGRITY: Codes = {(5, 5)}
STALLED: Codes = {(5, 5), (6, 6)}  # a raised length swallows what follows: it fails when complete, or is missed before


async def flip_all(
    identities: Identities, way: Way, bits: dict[Which, list[int | float]]
) -> list[tuple[Which, int | float, Outcome]]:
    """A session for each bit of some TLS records: the record, the bit, what came of it."""
    places = [(which, bit) for which, some in bits.items() for bit in some]
    attacks = [FlipOnce(way, which, bit) for which, bit in places]
    # Those that wait for a raised length to time out wait together.
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=40, verdict_seconds=2.0)
    assert all(attack.done for attack in attacks)
    for outcome in outcomes:
        outcome.check_safe()
    return [(which, bit, outcome) for (which, bit), outcome in zip(places, outcomes, strict=True)]


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_bits_of_the_handshake(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """Every record's header, and places in its body: nothing is opened, both ends know; or the bit meant nothing."""
    shorten(monkeypatch, **IMPATIENT)
    points = Control.of(await attacked(identities))
    records = points.offer if way is FORWARD else points.server_flight
    assert records >= 4
    hello = tls(0)
    bits: dict[Which, list[int | float]] = {hello: [*HEADER_BITS, -1, *places(f"{way} hello", 40)]}
    bits |= {tls(index): [*HEADER_BITS, -1, *places(f"{way}{index}", 12)] for index in range(1, records)}
    for which, bit, outcome in await flip_all(identities, way, bits):
        if outcome.codes == (0, 0):
            assert which is hello, outcome
            assert bit in MINOR_VERSION_BITS, outcome
            continue
        expected = AUTHENTICATION
        if way is FORWARD and which is hello and bit in range(8):
            expected = {(4, None)}  # the first byte: this is no TLS any more, and what is not TLS does not count
        assert outcome.codes in expected, (bit, str(outcome))
        assert outcome.there == [], (bit, str(outcome))


@on_uvloop
async def test_bits_of_the_offer_and_its_answer(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, **IMPATIENT)
    points = Control.of(await attacked(identities))
    bits = [*HEADER_BITS, -1, *places("offer", 12)]
    for _, bit, outcome in await flip_all(identities, FORWARD, {tls(points.offer): bits}):
        assert outcome.codes in AUTHENTICATION, (bit, str(outcome))
        assert outcome.there == []
    # The source has seen no ACCEPT; the destination has sent one, and for it a session breaks. Session tickets, where
    # OpenSSL sends them, stand between.
    answer = {tls(index): bits for index in range(points.server_flight, points.accept + 1)}
    for _, bit, outcome in await flip_all(identities, BACKWARD, answer):
        assert outcome.codes in {(4, 5), (4, 6)}, (bit, str(outcome))
        assert outcome.destination == 5 or bit in LENGTH_BITS, (bit, str(outcome))
        assert outcome.there == []


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_bits_of_messages_after_accept(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    clean = Control.of(await attacked(identities))
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.4, HANDOVER_SECONDS_MAX=0.5)
    messages = {clean.message(name): name for name in MESSAGES[way]}
    bits = [*HEADER_BITS, -1, *places(f"open{way}", 12)]
    for which, bit, outcome in await flip_all(identities, way, dict.fromkeys(messages, bits)):
        expected = STALLED if bit in LENGTH_BITS else INTEGRITY
        match messages[which]:
            case "the source's close_notify" | "the destination's close_notify":
                expected = {(0, 0)}
            case "FINISHED":
                # Two generals: the destination's end is final, and only the last message is lost.
                expected = {(code, 0) for code, _ in expected}
                assert outcome.there[0].received == outcome.forward
        assert outcome.codes in expected, (messages[which], bit, str(outcome))


# ---- whole records

Change = Callable[[list[bytes]], list[bytes]]


class Around:
    """Change what goes out around the control connection's record of an ordinal."""

    def __init__(self, way: Way, index: int, *, before: bytes = b"", times: int = 1, hold: bool = False) -> None:
        self._way, self._index = way, index
        self._before, self._times, self._hold = before, times, hold
        self._held = b""

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if unit.what != "tls" or unit.way is not self._way:
            return (unit.data,)
        if unit.index == self._index:
            if self._hold:
                self._held = unit.data
                return ()
            return (self._before, *(unit.data,) * self._times)
        held, self._held = self._held, b""
        return (unit.data, held)


def alert(level: int, description: int) -> bytes:
    """An alert in plaintext (RFC 8446 section 6), as anybody can make one."""
    return bytes((21, 3, 3, 0, 2, level, description))


FORGED_ALERTS = {
    "close_notify": alert(1, 0),
    "user_canceled": alert(1, 90),
    "handshake_failure": alert(2, 40),
    "internal_error": alert(2, 80),
}


@pytest.mark.parametrize("name", FORGED_ALERTS)
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_forged_alerts(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way, name: str) -> None:
    shorten(monkeypatch, **IMPATIENT)
    points = Control.of(await attacked(identities))
    offer, accept = (points.offer, points.offer + 1) if way is FORWARD else (points.server_flight, points.accept + 1)
    early = await attacked(identities, Around(way, 1, before=FORGED_ALERTS[name]))
    early.check_safe()
    if name != "user_canceled":  # which is a warning that means nothing, and anybody may say it before there are keys
        assert early.codes == (4, 4), early
        assert early.there == []
    before = await attacked(identities, Around(way, offer, before=FORGED_ALERTS[name]))
    before.check_safe()
    assert before.codes in {(4, 4), (4, 5)}, before
    assert before.there == []
    after = await attacked(identities, Around(way, accept, before=FORGED_ALERTS[name]))
    after.check_safe()
    assert after.codes == (5, 5), after


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_records_again_and_left_out(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    shorten(monkeypatch, **IMPATIENT)
    points = Control.of(await attacked(identities))
    channel = points.offer + 1 if way is FORWARD else points.accept + 1
    twice = await attacked(identities, Around(way, channel, times=2))
    twice.check_safe()
    assert twice.codes == (5, 5), twice
    never = await attacked(identities, Around(way, channel, times=0))
    never.check_safe()
    assert never.codes == (5, 5), never  # the next heartbeat is not the record that is due
    assert not never.there or never.there[0].ended == "reset"
    swapped = await attacked(identities, Around(way, channel, hold=True))
    swapped.check_safe()
    assert swapped.codes == (5, 5), swapped


@on_uvloop
async def test_a_whole_session_again(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a source once sent, sent once more: TLS answers with another hello, and nothing fits any more."""
    shorten(monkeypatch, **IMPATIENT)
    recorded = await attacked(identities)
    old = {(unit.what, unit.index): unit.data for unit in recorded.seen if unit.way is FORWARD and unit.lane < 1}

    def attack(unit: Unit) -> Iterable[Action]:
        return (old.get((unit.what, unit.index), b"") if unit.way is FORWARD else unit.data,)

    again = await attacked(identities, attack)
    again.check_safe()
    assert again.codes == (4, 4), again
    assert again.there == []
    assert not any(unit.kind is Kind.LANE for unit in again.seen)

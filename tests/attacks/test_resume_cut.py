"""Somebody on the network, against sessions that may resume: each cut delays, nothing else that he can do passes.

Cuts at every boundary and within every unit; bits turned, which stay final; recordings played back.
"""

import asyncio
import gc
import os
from collections.abc import Iterable
from contextlib import suppress

import pytest

from tests.attacks.mitm import Action, Attack, Cut, Mitm
from tests.attacks.points import (
    BACKWARD,
    FORWARD,
    Control,
    FlipOnce,
    Which,
    end,
    final,
    first_data,
    hello,
    middle_ack,
    places,
    prefix,
    tls,
)
from tests.attacks.relays import CONVERSATION, Identities, Outcome, attacked, attacked_all, on_uvloop, shorten
from tests.attacks.wire import PREFIX_BYTES, Kind, Unit, Way

DONE, INTEGRITY = (0, 0), (5, 5)
RESUME_SECONDS = 2

ACTIONS: dict[str, Cut] = {
    "one FIN": Cut(),
    "one RST": Cut(reset=True),
    "every FIN": Cut(everything=True),
    "every RST": Cut(reset=True, everything=True),
}


class CutAt:
    """Forward a part of the unit with this ordinal, counting both ways and all connections, and cut there. Once.

    Args:
        ordinal: of the unit.
        part: how much of it still goes out.
        action: what then.
    """

    def __init__(self, ordinal: int, part: float, action: Cut) -> None:
        self.ordinal, self._part, self._action = ordinal, part, action
        self._passed = 0
        self.done = False
        self.struck: Unit | None = None

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        self._passed += 1
        if self.done or self._passed <= self.ordinal:
            return (unit.data,)
        self.done, self.struck = True, unit
        return (unit.data[: int(len(unit.data) * self._part)], self._action)


@pytest.mark.parametrize("part", [0.0, 0.6])
@pytest.mark.parametrize("name", ACTIONS)
@on_uvloop
async def test_a_cut_at_every_unit(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str, part: float
) -> None:
    """A session that was accepted ends well at both ends, byte-exact; one that was not has touched no hypervisor."""
    shorten(monkeypatch, ABORT_SECONDS_MAX=0.6, DRAIN_SECONDS_MAX=0.2, HANDSHAKE_SECONDS_MAX=3.0)
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=1.0)
    clean = await attacked(identities, resume_seconds=RESUME_SECONDS)
    cuts = [CutAt(ordinal, part, ACTIONS[name]) for ordinal in range(len(clean.seen))]
    outcomes = await attacked_all(
        identities,
        list[Attack](cuts),
        at_once=8,
        resume_seconds=RESUME_SECONDS,
        verdict_seconds=RESUME_SECONDS + 2.0,
    )
    resumed = 0
    for cut, outcome in zip(cuts, outcomes, strict=True):
        where = (cut.ordinal, cut.struck, str(outcome))
        outcome.check_safe()
        kinds = {unit.kind for unit in outcome.seen}
        resumed += Kind.RESUME in kinds
        # How many acknowledgements there are depends on the timing: the last cuts may find nothing to cut.
        if kinds & {Kind.LANE, Kind.RESUME} or not cut.done:
            assert outcome.codes == DONE, where
            outcome.check_exact()
        else:
            # The source never saw ACCEPT; one that had gone out leaves the destination with a session nobody wants.
            assert outcome.source == 4, where
            assert outcome.destination in {4, 6, None}, where
            assert outcome.there == [], where
    assert resumed > (len(cuts) // 4 if ACTIONS[name].everything else 2)  # a lane alone is just replaced


class Again:
    """Cut everything at each n-th frame, as long as cuts are left."""

    def __init__(self, every: int, cuts: int) -> None:
        self._every, self._left = every, cuts
        self._frames = 0

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if unit.is_data or unit.is_end:
            self._frames += 1
            if self._left and self._frames % self._every == 0:
                self._left -= 1
                return (Cut(reset=bool(self._left % 2), everything=True),)
        return (unit.data,)


@pytest.mark.parametrize("every", [1, 2, 3])
@on_uvloop
async def test_one_cut_after_another(identities: Identities, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """However many there are, the session ends well, and leaves no descriptor and no task behind."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.2)
    await attacked(identities)
    gc.collect()
    descriptors, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    outcome = await attacked(identities, Again(every, 12), resume_seconds=RESUME_SECONDS)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == tasks
    assert len(os.listdir("/proc/self/fd")) == descriptors  # without the collector's help
    outcome.check_safe()
    assert outcome.codes == DONE, outcome
    assert sum(unit.kind is Kind.RESUME and unit.what == "prefix" for unit in outcome.seen) >= 2


# ---- bits

FLIPS: dict[str, tuple[Way, Which]] = {
    "data": (FORWARD, first_data),
    "acknowledgement": (FORWARD, middle_ack),
    "END": (FORWARD, end),
    "answer": (BACKWARD, first_data),
    "answer's END": (BACKWARD, end),
}


@pytest.mark.parametrize("name", FLIPS)
@on_uvloop
async def test_a_bit_on_a_lane_stays_final(identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.4)
    way, which = FLIPS[name]
    bits = [*range(0, 160, 9), 0.0, -1, *places(name, 6)]
    attacks = [FlipOnce(way, which, bit) for bit in bits]
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=8, resume_seconds=RESUME_SECONDS)
    assert all(attack.done for attack in attacks)
    for outcome in outcomes:
        outcome.check_safe()
        assert not any(unit.kind is Kind.RESUME for unit in outcome.seen), outcome
    assert {outcome.codes for outcome in outcomes} == {INTEGRITY}, [str(o) for o in outcomes if o.codes != INTEGRITY]


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_a_bit_on_control_stays_final(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    clean = Control.of(await attacked(identities))
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.2)
    which = clean.message("CHANNEL_OPEN" if way is FORWARD else "CHANNEL_OPENED")
    attacks = [FlipOnce(way, which, bit) for bit in (0, 20, -1, *places(f"open{way}", 6))]
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=8, resume_seconds=RESUME_SECONDS)
    assert all(attack.done for attack in attacks)
    for outcome in outcomes:
        outcome.check_safe()
        assert not any(unit.kind is Kind.RESUME for unit in outcome.seen), outcome
    assert {outcome.codes for outcome in outcomes} == {INTEGRITY}, [str(o) for o in outcomes]


@pytest.mark.parametrize("name", ["token", "HELLO", "LANE_OK", "FINAL"])
@on_uvloop
async def test_bits_that_cost_only_their_connection(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.6, DRAIN_SECONDS_MAX=0.2)
    way, which = {
        "token": (FORWARD, prefix),
        "HELLO": (FORWARD, hello),
        "LANE_OK": (BACKWARD, hello),
        "FINAL": (FORWARD, final),
    }[name]
    attacks = [FlipOnce(way, which, bit) for bit in (40, 100, 150, -1)]
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=8, resume_seconds=RESUME_SECONDS)
    assert all(attack.done for attack in attacks)
    for outcome in outcomes:
        assert outcome.codes == DONE, outcome
        outcome.check_exact()


class CutThenFlip:
    """Cut everything once, and turn a bit of a unit of the resumption that follows."""

    def __init__(self, way: Way, index: int, bit: float) -> None:
        self._flip = FlipOnce(way, lambda unit: tls(index)(unit) and unit.kind is Kind.RESUME, bit)
        self._cut = False

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if not self._cut and middle_ack(unit):
            self._cut = True
            return (Cut(reset=True, everything=True),)
        return self._flip(unit)

    @property
    def done(self) -> bool:
        """Whether the bit was turned."""
        return self._flip.done


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_a_bit_in_a_resumption(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """In each of its records: the source is not taken back (4), or the bit meant nothing, or showed afterwards (5)."""
    shorten(monkeypatch, RESUME_ATTEMPT_SECONDS_MAX=0.6, HANDSHAKE_SECONDS_MAX=0.6, DRAIN_SECONDS_MAX=0.2)
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.4)
    attacks = [CutThenFlip(way, index, bit) for index in range(7) for bit in (0.1, 0.5, 0.9, -1)]
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=10, resume_seconds=2, verdict_seconds=6.0)
    assert sum(attack.done for attack in attacks) >= 16
    for attack, outcome in zip(attacks, outcomes, strict=True):
        outcome.check_safe()
        if not attack.done:
            assert outcome.codes == DONE, outcome
            continue
        assert outcome.source in {0, 4, 5}, outcome
        assert outcome.destination in {0, 5, 6}, outcome
        assert (outcome.source == 0) == (outcome.destination == 0), outcome


# ---- recordings


async def played(port: int, recorded: bytes) -> bytes:
    """Say what was recorded to a relay, and hear all it answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = b""
    with suppress(OSError):
        writer.write(recorded)
        writer.write_eof()
        async with asyncio.timeout(3.0):
            heard = await reader.read()
    writer.close()
    return heard


@pytest.mark.parametrize("kind", [Kind.LANE, Kind.RESUME])
@on_uvloop
async def test_a_recorded_connection_played_back(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """All of a lane, or of a resumption, as the source once said it: to the same destination, in the same session."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.2, HANDSHAKE_SECONDS_MAX=1.0)
    heard: list[bytes] = []
    playing: list[asyncio.Task[None]] = []
    recorded = bytearray()
    port = 0
    cuts = Again(2, 2)

    def prepare(mitm: Mitm) -> None:
        nonlocal port
        port = mitm.target[1]

    async def play() -> None:
        heard.append(await played(port, bytes(recorded)))

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.kind is kind and unit.way is FORWARD and (kind is Kind.RESUME or unit.lane == 0):
            recorded.extend(unit.data)
        actions = list(cuts(unit))
        # The session is open again on other connections, and still has things to say.
        if recorded and not playing and unit.is_data and unit.lane >= 2:
            playing.append(asyncio.get_running_loop().create_task(play()))
        return actions

    outcome = await attacked(identities, attack, resume_seconds=RESUME_SECONDS, prepare=prepare)
    assert len(playing) == 1, outcome
    await playing[0]
    assert len(recorded) > PREFIX_BYTES
    if kind is Kind.LANE:
        assert heard == [b""]
    else:
        assert heard[0]  # its hello is answered, by a hello that makes other keys of it
    assert outcome.codes == DONE, outcome
    outcome.check_exact()


@on_uvloop
async def test_a_recorded_resumption_in_the_place_of_the_next(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source comes back a second time, and the destination is shown what it said the first time: nothing fits."""
    shorten(monkeypatch, RESUME_ATTEMPT_SECONDS_MAX=0.5, HANDSHAKE_SECONDS_MAX=0.5, DRAIN_SECONDS_MAX=0.2)
    first: dict[tuple[str, int], bytes] = {}
    conversations = 0
    cuts = Again(2, 2)

    def attack(unit: Unit) -> Iterable[Action]:
        nonlocal conversations
        if unit.kind is Kind.RESUME and unit.way is FORWARD:
            conversations += unit.what == "prefix"
            if conversations == 1:
                first.setdefault((unit.what, unit.index), unit.data)
            else:
                return (first.get((unit.what, unit.index), b""),)
        return cuts(unit)

    outcome: Outcome = await attacked(identities, attack, resume_seconds=1, verdict_seconds=5.0)
    outcome.check_safe()
    assert conversations >= 2
    assert outcome.source in {4, 6}, outcome
    assert outcome.destination == 6, outcome
    assert outcome.here.ended == "reset"
    assert outcome.there[0].ended == "reset"
    assert len(CONVERSATION) > 1

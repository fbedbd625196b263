"""One bit turned on a lane: in a record's header, ciphertext or tag, or in the hello and its answer."""

from collections.abc import Callable, Iterable
from random import Random

import pytest

from tests.attacks import wire
from tests.attacks.mitm import Action, Attack
from tests.attacks.relays import Identities, Outcome, attacked, attacked_all, on_uvloop, shorten
from tests.attacks.wire import ACK, HEADER_BYTES, TAG_BYTES, Unit, Way, flip

INTEGRITY = (5, 5)
HEADER_BITS = range(8 * HEADER_BYTES)
Which = Callable[[Unit], bool]

FORWARD, BACKWARD = Way.FORWARD, Way.BACKWARD


def first_data(unit: Unit) -> bool:
    """The first frame of the stream."""
    return unit.is_data and unit.index <= 2


def middle_ack(unit: Unit) -> bool:
    """An acknowledgement in the middle of the conversation."""
    return unit.what == "record" and unit.type == ACK and unit.index in {3, 4}


def end(unit: Unit) -> bool:
    """The END frame: the last one."""
    return unit.is_end


class FlipOnce:
    """Turn one bit of the first unit that is meant."""

    def __init__(self, way: Way, which: Which, bit: int) -> None:
        self._way, self._which, self._bit = way, which, bit
        self.done = False

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if self.done or unit.way is not self._way or not self._which(unit):
            return (unit.data,)
        self.done = True
        bits = 8 * len(unit.data)
        first = 8 * HEADER_BYTES if self._bit >= 8 * HEADER_BYTES else 0
        return (
            flip(unit.data, self._bit % bits if self._bit < bits else first + (self._bit - first) % (bits - first)),
        )


def check_all(attacks: list[FlipOnce], outcomes: list[Outcome], codes: tuple[int, int]) -> None:
    """Every attack took place, and ended with these codes."""
    assert all(attack.done for attack in attacks)
    for outcome in outcomes:
        outcome.check_safe()
    assert {outcome.codes for outcome in outcomes} == {codes}, [str(o) for o in outcomes if o.codes != codes]


@pytest.mark.parametrize("which", [first_data, middle_ack, end])
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_every_bit_of_a_record_header(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way, which: Which
) -> None:
    # A length that was raised below the limit shows at the next heartbeat, since nobody sends what it asks for.
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.3)
    attacks = [FlipOnce(way, which, bit) for bit in HEADER_BITS]
    check_all(attacks, await attacked_all(identities, list[Attack](attacks), at_once=10), INTEGRITY)


@pytest.mark.parametrize("which", [first_data, middle_ack, end])
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_bits_of_ciphertext_and_tag(identities: Identities, way: Way, which: Which) -> None:
    attacks = [FlipOnce(way, which, bit) for bit in _body_bits(seed=f"{way}{which.__name__}", count=12)]
    check_all(attacks, await attacked_all(identities, list[Attack](attacks)), INTEGRITY)


def _body_bits(seed: str, count: int) -> list[int]:
    """Bits behind the header: the ciphertext's first and the tag's last (-1), the tag's first, and some at random."""
    edge = 8 * HEADER_BYTES
    return [edge, edge + 7, -1, -8, -8 * TAG_BYTES, *(edge + Random(seed).randrange(10_000) for _ in range(count))]


def prefix(unit: Unit) -> bool:
    """Magic and token of the first lane."""
    return unit.what == "prefix" and unit.lane == 0


def hello(unit: Unit) -> bool:
    """The first record on the first lane: HELLO one way, LANE_OK the other."""
    return unit.what == "record" and unit.lane == 0 and unit.index == 0


HELLO_BITS = {
    "magic and token": (FORWARD, prefix, 160),
    "HELLO": (FORWARD, hello, 288),
    "LANE_OK": (BACKWARD, hello, 288),
}


@pytest.mark.parametrize("name", HELLO_BITS)
@on_uvloop
async def test_a_lane_hello_is_made_anew(identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Where a raised length makes an end wait for more, the other attempt begins after this.
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.3)
    way, which, bits = HELLO_BITS[name]
    attacks = [FlipOnce(way, which, bit) for bit in range(bits) if bit % 3 == 0 or bit < 160]
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=12)
    check_all(attacks, outcomes, (0, 0))
    for outcome in outcomes:
        outcome.check_exact()


@pytest.mark.parametrize("bad", [3, 9])
@on_uvloop
async def test_hellos_are_not_made_anew_for_ever(identities: Identities, bad: int) -> None:
    """Four bad hellos in a row are borne, five are not: lane ids are never given out twice."""

    def attack(unit: Unit) -> Iterable[Action]:
        return (flip(unit.data, -1 % 288),) if unit.what == "record" and 0 <= unit.lane < bad else (unit.data,)

    outcome = await attacked(identities, attack)
    outcome.check_safe()
    assert outcome.codes == ((0, 0) if bad < 5 else (6, 6)), outcome
    assert outcome.there or bad >= 5
    lanes = [
        wire.HEADER.unpack_from(unit.data)[3] for unit in outcome.seen if unit.what == "record" and unit.index == 0
    ]
    assert lanes == sorted(lanes)
    assert len({unit.data for unit in outcome.seen if unit.what == "prefix"}) == min(bad + 1, 5)


@pytest.mark.parametrize("which", [first_data, end])
@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("extra", [1, 36, 5000])
@on_uvloop
async def test_a_raised_length_with_bytes_that_nobody_sent(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, extra: int, way: Way, which: Which
) -> None:
    """More has arrived than was sent, and still a record is incomplete: no reason to wait for ever."""
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.2)
    done = []

    def attack(unit: Unit) -> Iterable[Action]:
        if done or unit.way is not way or not which(unit):
            return (unit.data,)
        done.append(unit)
        fields = list(wire.HEADER.unpack_from(unit.data))
        fields[-1] += 0x4_0000
        return (wire.HEADER.pack(*fields) + unit.data[HEADER_BYTES:] + bytes(extra),)

    outcome = await attacked(identities, attack)
    outcome.check_safe()
    assert outcome.codes == INTEGRITY, outcome

"""One bit turned on a lane: in a record's header, ciphertext or tag, or in the hello and its answer."""

from collections.abc import Iterable, Sequence

import pytest

from tests.attacks import wire
from tests.attacks.mitm import Action, Attack
from tests.attacks.points import (
    BACKWARD,
    FORWARD,
    FlipOnce,
    Which,
    end,
    final,
    first_data,
    hello,
    middle_ack,
    places,
    prefix,
)
from tests.attacks.relays import Identities, Outcome, attacked, attacked_all, on_uvloop, shorten
from tests.attacks.wire import HEADER_BYTES, TAG_BYTES, Unit, Way, flip

INTEGRITY = (5, 5)
HEADER_BITS = range(8 * HEADER_BYTES)


class RaiseLength:
    """Raise a record's length by 256 KiB, and put in some bytes that nobody sent."""

    def __init__(self, way: Way, which: Which, extra: int) -> None:
        self._way, self._which, self._extra = way, which, extra
        self.done = False

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if self.done or unit.way is not self._way or not self._which(unit):
            return (unit.data,)
        self.done = True
        fields = list(wire.HEADER.unpack_from(unit.data))
        fields[-1] += 0x4_0000
        return (wire.HEADER.pack(*fields) + unit.data[HEADER_BYTES:] + bytes(self._extra),)


def check_all(attacks: Sequence[FlipOnce | RaiseLength], outcomes: list[Outcome], codes: tuple[int, int]) -> None:
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
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.4)
    attacks = [FlipOnce(way, which, bit) for bit in HEADER_BITS]
    check_all(attacks, await attacked_all(identities, list[Attack](attacks), at_once=24), INTEGRITY)


@pytest.mark.parametrize("which", [first_data, middle_ack, end])
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_bits_of_ciphertext_and_tag(identities: Identities, way: Way, which: Which) -> None:
    edges = [0.0, -1, -8, -8 * TAG_BYTES]  # the ciphertext's first bit, the tag's last, first of its last byte, first
    bits = [*edges, *places(f"{way}{which.__name__}", 12)]
    attacks = [FlipOnce(way, which, bit) for bit in bits]
    check_all(attacks, await attacked_all(identities, list[Attack](attacks)), INTEGRITY)


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_bits_of_final(identities: Identities, way: Way) -> None:
    """Both ends have agreed by then that all is done; what breaks now breaks behind a finished session."""
    attacks = [FlipOnce(way, final, bit) for bit in range(0, 288, 7)]
    check_all(attacks, await attacked_all(identities, list[Attack](attacks)), (0, 0))


HELLO_BITS = {
    "magic and token": (FORWARD, prefix, 160),
    "HELLO": (FORWARD, hello, 288),
    "LANE_OK": (BACKWARD, hello, 288),
}


@pytest.mark.parametrize("name", HELLO_BITS)
@on_uvloop
async def test_a_lane_hello_is_made_anew(identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Where a raised length makes an end wait for more, the other attempt begins after this.
    shorten(monkeypatch, LANE_HELLO_SECONDS_MAX=0.6)
    way, which, bits = HELLO_BITS[name]
    attacks = [FlipOnce(way, which, bit) for bit in range(bits) if bit % 3 == 0 or bit in range(128, 160)]
    outcomes = await attacked_all(identities, list[Attack](attacks), at_once=24)
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


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_a_raised_length_with_bytes_that_nobody_sent(
    identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    """More has arrived than was sent, and still a record is incomplete: no reason to wait for ever."""
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.3)
    attacks = [RaiseLength(way, which, extra) for which in (first_data, end) for extra in (0, 1, 36, 5000)]
    check_all(attacks, await attacked_all(identities, list[Attack](attacks), at_once=8), INTEGRITY)

"""Records of a lane replayed, left out, swapped, and put in from elsewhere: every one of them once authentic."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

import pytest

from tests.attacks import wire
from tests.attacks.mitm import Action, Mitm
from tests.attacks.points import BACKWARD, FORWARD, Which, end, final, first_data, hello, middle_ack
from tests.attacks.relays import CONVERSATION, Identities, Outcome, Script, attacked, bulk, noise, on_uvloop, shorten
from tests.attacks.wire import HEADER, HEADER_BYTES, Unit, Way, flip

BULK = bulk(6 * 1024 * 1024)
INTEGRITY, LOST, DONE = (5, 5), (6, 6), (0, 0)


def data(ordinal: int) -> Which:
    """The record of a DATA frame in the stream's middle, whose sequence number is this or the next (an ACK may be)."""
    return lambda unit: unit.is_data and unit.index in {ordinal, ordinal + 1}


class Once:
    """Do something with the first unit that is meant, and nothing to the others.

    Args:
        way: the unit's way.
        which: tells the unit.
        change: what goes out instead of it.
    """

    def __init__(self, way: Way, which: Which, change: Callable[[Unit], Iterable[Action]]) -> None:
        self._way, self._which, self._change = way, which, change
        self.done = False

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if self.done or unit.way is not self._way or not self._which(unit):
            return (unit.data,)
        self.done = True
        return self._change(unit)


async def struck(identities: Identities, attack: Once, script: Script = CONVERSATION) -> Outcome:
    """A session under an attack that has to take place."""
    outcome = await attacked(identities, attack, script)
    assert attack.done
    outcome.check_safe()
    return outcome


# ---- again

STRIKES = {
    "first": (FORWARD, first_data, CONVERSATION),
    "acknowledgement": (FORWARD, middle_ack, CONVERSATION),
    "END": (FORWARD, end, CONVERSATION),
    "answer": (BACKWARD, first_data, CONVERSATION),
    "its acknowledgement": (BACKWARD, middle_ack, CONVERSATION),
    "END of the answer": (BACKWARD, end, CONVERSATION),
    "bulk": (FORWARD, data(3), BULK),
}


@pytest.mark.parametrize("name", STRIKES)
@on_uvloop
async def test_a_record_again(identities: Identities, name: str) -> None:
    way, which, script = STRIKES[name]
    outcome = await struck(identities, Once(way, which, lambda unit: (unit.data, unit.data)), script)
    # After the last END the session may be agreed on before the copy is looked at: it changed nothing.
    allowed = {INTEGRITY, DONE} if which is end else {INTEGRITY}
    assert outcome.codes in allowed, outcome


@on_uvloop
async def test_an_old_record_again(identities: Identities) -> None:
    """Not the last one: what passed long ago."""
    old: list[bytes] = []

    def keep(unit: Unit) -> bool:
        if first_data(unit) and unit.way is FORWARD:
            old.append(unit.data)
        return data(4)(unit)

    outcome = await struck(identities, Once(FORWARD, keep, lambda unit: (old[0], unit.data)), BULK)
    assert outcome.codes == INTEGRITY, outcome


@on_uvloop
async def test_a_hello_again(identities: Identities) -> None:
    """Prefix and HELLO as recorded, on a connection of the attacker's own: its token is spent, nobody is harmed."""
    recorded: list[bytes] = []
    replies: list[bytes] = []
    replaying: list[asyncio.Task[None]] = []
    port = 0

    def prepare(mitm: Mitm) -> None:
        nonlocal port
        port = mitm.target[1]

    async def replay() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(recorded))
        with suppress(ConnectionResetError):
            replies.append(await reader.read())
        writer.close()

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.lane == 0 and unit.way is FORWARD and unit.index == 0:
            recorded.append(unit.data)
        if first_data(unit) and unit.way is FORWARD and not replaying:
            replaying.append(asyncio.get_running_loop().create_task(replay()))
        return (unit.data,)

    outcome = await attacked(identities, attack, prepare=prepare)
    await replaying[0]
    assert len(recorded) == 2
    assert replies in ([b""], [])  # closed, or reset because nobody read on
    assert outcome.codes == DONE, outcome
    outcome.check_exact()


# ---- left out


@pytest.mark.parametrize("name", STRIKES)
@on_uvloop
async def test_a_record_left_out(identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shorten(monkeypatch, HEARTBEAT_SECONDS=0.2)
    way, which, script = STRIKES[name]
    outcome = await struck(identities, Once(way, which, lambda _: ()), script)
    # What follows it shows the gap; where nothing follows, heartbeats show that it never came.
    allowed = {INTEGRITY} if script is BULK else {INTEGRITY, LOST}
    assert outcome.codes in allowed, outcome


@on_uvloop
async def test_the_last_data_left_out(identities: Identities) -> None:
    """END stands behind it, and shows the gap."""
    held: list[bytes] = []

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is not FORWARD or not (unit.is_data or unit.is_end):
            return (unit.data,)
        if unit.is_end:
            held.clear()
            return (unit.data,)
        before, held[:] = list(held), [unit.data]
        return before

    outcome = await attacked(identities, attack, ((noise(100_000, 5), b""),))
    outcome.check_safe()
    assert outcome.codes == INTEGRITY, outcome
    assert len(outcome.there[0].received) < 100_000


@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_final_left_out(identities: Identities, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """The session was agreed on before; a lane's end matters to nobody any more."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.3)
    outcome = await struck(identities, Once(way, final, lambda _: ()))
    assert outcome.codes == DONE, outcome


# ---- swapped


@on_uvloop
async def test_two_records_swapped(identities: Identities) -> None:
    held: list[Unit] = []

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is not FORWARD or not unit.is_data or len(held) == 2:
            return (unit.data,)
        held.append(unit)
        return () if len(held) == 1 else (unit.data, held[0].data)

    outcome = await attacked(identities, attack, BULK)
    outcome.check_safe()
    assert len(held) == 2
    assert outcome.codes == INTEGRITY, outcome
    assert outcome.there[0].received == b""


@on_uvloop
async def test_numbers_swapped_too(identities: Identities) -> None:
    """Two records change places and headers: the order looks right, and the header is authenticated."""
    held: list[Unit] = []

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is not FORWARD or not unit.is_data or len(held) == 2:
            return (unit.data,)
        held.append(unit)
        if len(held) == 1:
            return ()
        first, second = held[0].data, unit.data
        return (renumbered(second, first), renumbered(first, second))

    outcome = await attacked(identities, attack, BULK)
    outcome.check_safe()
    assert len(held) == 2
    assert outcome.codes == INTEGRITY, outcome
    assert outcome.there[0].received == b""


def renumbered(record: bytes, like: bytes) -> bytes:
    """A record under another one's lane, epoch and sequence number."""
    version, kind, flags, _, _, _, length = HEADER.unpack_from(record)
    _, _, _, lane, epoch, sequence, _ = HEADER.unpack_from(like)
    return HEADER.pack(version, kind, flags, lane, epoch, sequence, length) + record[HEADER_BYTES:]


# ---- from elsewhere


@pytest.mark.parametrize("dressed", [False, True], ids=["as it is", "with the header that is due"])
@pytest.mark.parametrize("which", [first_data, middle_ack, end])
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_a_record_of_another_session(identities: Identities, way: Way, which: Which, *, dressed: bool) -> None:
    """Same hosts, same place in the stream, same plaintext even: another session, another key."""
    earlier = await attacked(identities)
    record = next(unit.data for unit in earlier.seen if unit.way is way and which(unit))

    def change(unit: Unit) -> Iterable[Action]:
        return (renumbered(record, unit.data) if dressed else record,)

    outcome = await struck(identities, Once(way, which, change))
    assert outcome.codes == INTEGRITY, outcome


@pytest.mark.parametrize("dressed", [False, True], ids=["as it is", "with the header that is due"])
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_a_record_of_the_other_direction(identities: Identities, way: Way, *, dressed: bool) -> None:
    """Sent back to where it came from."""
    latest: list[Unit] = []

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.what == "record" and unit.way is not way and unit.index > 0:
            latest[:] = [unit]
        elif strike(unit) and unit.way is way:
            return (renumbered(latest[0].data, unit.data) if dressed else latest[0].data,)
        return (unit.data,)

    def strike(unit: Unit) -> bool:
        return unit.is_data and unit.index >= 2

    outcome = await attacked(identities, attack)
    outcome.check_safe()
    assert outcome.codes == INTEGRITY, outcome


@on_uvloop
async def test_a_record_of_another_lane(identities: Identities) -> None:
    """A session's second lane (its first hello was spoilt) is given what was sealed on lane 0, in another session."""
    earlier = await attacked(identities)
    record = next(unit.data for unit in earlier.seen if unit.way is FORWARD and first_data(unit))

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is FORWARD and hello(unit):
            return (flip(unit.data, -1 % 288),)
        if unit.way is FORWARD and unit.lane == 1 and first_data(unit):
            return (renumbered(record, unit.data),)
        return (unit.data,)

    outcome = await attacked(identities, attack)
    outcome.check_safe()
    assert outcome.codes == INTEGRITY, outcome
    assert outcome.there[0].received == b""


@on_uvloop
async def test_a_hello_of_another_lane(identities: Identities) -> None:
    """The spoilt lane's own good HELLO, on the lane that replaced it: refused, made anew, and all is well."""
    good: list[bytes] = []

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is FORWARD and hello(unit):
            good.append(unit.data)
            return (flip(unit.data, -1 % 288),)
        if unit.way is FORWARD and unit.lane == 1 and unit.what == "record" and unit.index == 0:
            return (good[0],)
        return (unit.data,)

    outcome = await attacked(identities, attack)
    assert outcome.codes == DONE, outcome
    outcome.check_exact()
    assert max(unit.lane for unit in outcome.seen) == 2


@pytest.mark.parametrize("size", [1, 19, 20, 56, 4096])
@pytest.mark.parametrize("way", Way)
@on_uvloop
async def test_bytes_from_nowhere(identities: Identities, way: Way, size: int) -> None:
    """Between two records."""
    outcome = await struck(identities, Once(way, middle_ack, lambda unit: (unit.data, bytes(range(1, 2)) * size)))
    assert outcome.codes == INTEGRITY, outcome


@on_uvloop
async def test_a_record_without_its_length(identities: Identities) -> None:
    """A record of zero bytes with nothing but a tag of zeros, numbered as is due."""

    def change(unit: Unit) -> Iterable[Action]:
        empty = bytearray(unit.data[:HEADER_BYTES])
        empty[16:20] = bytes(4)
        return (bytes(empty) + bytes(wire.TAG_BYTES), unit.data)

    outcome = await struck(identities, Once(FORWARD, first_data, change))
    assert outcome.codes == INTEGRITY, outcome
    assert outcome.there[0].received == b""

"""A source with the right to its session, and with claims, frames, lanes and tokens that it must not have.

What cannot be is a violation, and ends the session (5) with a reset for the hypervisor; what is useless is dropped.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from crypto.keys import Direction, LaneId
from crypto.records import Opener, RecordType, Sealer
from proxy.limits import LANES_MAX
from proxy.wire import ChannelId
from tests.attacks import wire
from tests.attacks.relays import Identities, on_uvloop, shorten
from tests.attacks.returning import PROLOGUE, Scene, bounded, scene, until
from tests.attacks.rogue import MIB, Gone, HandLane, Stream, ack, message

INTEGRITY, LOST = 5, 6


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


# ---- claims


def state(**changes: object) -> dict[str, object]:
    """A channel's state in good order, but for the changes."""
    return {"channel": 0, "frames": 0, "credit": MIB, "opened": True} | changes


IMPOSSIBLE: dict[str, dict[str, object]] = {
    "it received a frame that was never sent": {"received": 1},
    "it received all there could be": {"received": 2**63 - 1},
    "it wrote a frame that was never sent": {"channels": [state(frames=1)]},
    "it wrote all there could be": {"channels": [state(frames=2**63 - 1)]},
    "one claim of two": {"channels": [state(), state(frames=1)]},
}


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("name", IMPOSSIBLE)
@on_uvloop
async def test_a_claim_that_cannot_be_ends_the_session(identities: Identities, name: str, away: bool) -> None:
    async with scene(identities) as made:
        if away:
            await made.away()
        answer = await made.rogue.comes_back(**IMPOSSIBLE[name])
        assert (answer["type"], answer["code"]) == ("refuse", INTEGRITY)
        await made.ends(INTEGRITY)
        assert made.receiver.runners[0].report.resumes == 0


USELESS: dict[str, dict[str, object]] = {
    "no channels": {"channels": []},
    "channels that it never announced": {"channels": [state(), state(channel=7, frames=9), state(channel=63)]},
    "less credit than before": {"channels": [state(credit=0)]},
    "a channel that it says is not open": {"channels": [state(opened=False)]},
}


@pytest.mark.parametrize("name", USELESS)
@on_uvloop
async def test_a_claim_that_says_nothing_changes_nothing(identities: Identities, name: str) -> None:
    async with scene(identities) as made:
        await made.away()
        assert (await made.back(**USELESS[name]))["type"] == "resumed"
        await made.finishes()


@on_uvloop
async def test_a_channel_again_after_a_resumption(identities: Identities) -> None:
    """The destination has said that it knows it."""
    async with scene(identities) as made:
        answer = await made.back()
        assert len(answer["channels"]) == 1
        await made.rogue.control.say(message("channel_open", channel=0, credit=MIB))
        await made.ends(INTEGRITY)
        assert len(made.hypervisor.sides) == 1


@on_uvloop
async def test_a_finish_before_its_time_after_a_resumption(
    identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, CONTROL_SECONDS_MAX=0.2)
    async with scene(identities) as made:
        await made.back()
        await made.rogue.control.say(message("finish"))
        await made.ends(INTEGRITY)


# ---- frames


@on_uvloop
async def test_frames_again_and_again_are_written_once(identities: Identities) -> None:
    """As often as it likes, on any lane, before and after a resumption; and no memory is kept for them."""
    async with scene(identities) as made:
        old = Stream().data(PROLOGUE, order=0)
        async with bounded(8 * MIB):
            inbox = made.receiver.runners[0].session.inbox
            for _ in range(200):
                await made.lane.frame(old)
            await until(lambda: inbox.repeated == 200)
            await made.back()
            for _ in range(200):
                await made.lane.frame(old)
            await until(lambda: inbox.repeated == 400)
            assert len(inbox) == 0
        await made.finishes()


@on_uvloop
async def test_a_frame_again_with_other_bytes_is_not_looked_at(identities: Identities) -> None:
    """Dropped by its place: what is written has been checked, what comes again is not even read."""
    async with scene(identities) as made:
        await made.back()
        other = Stream()
        for forged in (other.data(b"other bytes", order=0), other.data(b"and more", order=0, digest=bytes(16))):
            await made.lane.frame(forged)
        await made.finishes()


@on_uvloop
async def test_a_frame_ahead_is_judged_when_its_turn_comes(identities: Identities) -> None:
    """Held, it has been checked no more than any other: nothing of it is written, and its turn ends the session."""
    async with scene(identities) as made:
        await made.back()
        first = made.next(b"first")
        bad = made.stream.data(b"second", order=2, digest=bytes(16))
        await made.lane.frame(bad)
        await until(lambda: len(made.receiver.runners[0].session.inbox) == 1)
        assert made.delivered == PROLOGUE
        with suppress(Gone):
            await made.lane.frame(first)
        await made.ends(INTEGRITY, PROLOGUE + b"first")


@on_uvloop
async def test_a_frame_ahead_on_the_only_lane_there_ever_was(identities: Identities) -> None:
    async with scene(identities) as made:
        made.order += 1
        await made.lane.frame(made.next(b"x"))
        await made.ends(INTEGRITY)


@on_uvloop
async def test_frames_too_far_ahead(identities: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, ORDER_AHEAD_MAX=100)
    async with scene(identities) as made:
        await made.back()
        made.stream.data(b"never sent", order=1)
        async with bounded(8 * MIB):
            for order in range(2, 102):
                await made.lane.frame(made.stream.data(b"x", order=order))
            inbox = made.receiver.runners[0].session.inbox
            await until(lambda: len(inbox) == 100)
            with suppress(Gone):
                await made.lane.frame(made.stream.data(b"x", order=102))
            await made.ends(INTEGRITY)


@pytest.mark.parametrize("size", [MIB, 800 * 1024, 64 * 1024])
@on_uvloop
async def test_bytes_too_far_ahead(identities: Identities, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """What is held is bounded in bytes as they lie in memory, whatever the frames' size and the credit given."""
    most = 16 * MIB
    shorten(monkeypatch, REORDER_BYTES_MAX=most)
    async with scene(identities) as made:
        await made.back()
        made.stream.data(b"never sent", order=1)
        body = bytes(size)
        async with bounded(most * 4 // 3 + 6 * MIB):
            with suppress(Gone):
                for order in range(2, 4 * most // size):
                    await made.lane.frame(made.stream.data(body, order=order))
            await made.ends(INTEGRITY)
        assert made.stream.offset < 3 * most


@on_uvloop
async def test_held_frames_go_beyond_no_credit(identities: Identities) -> None:
    """The credit is judged when their turn comes; then they end the session, and nothing was written of them."""
    async with scene(identities, reads=False) as made:
        await made.back()
        half = made.receiver.runners[0].session.receivers[ChannelId(0)]
        with suppress(Gone):
            first = made.next(b"first")
            while made.stream.offset <= half.credit + 16 * MIB:  # more than the kernel takes off it
                await made.lane.frame(made.next(bytes(MIB)))
            await made.lane.frame(first)
        assert await made.receiver.verdict(10.0) == INTEGRITY, made.receiver.errors


ACKNOWLEDGEMENTS = {
    "of a frame that was never sent": ack(0, 1, 1, MIB),
    "of a channel that is none": ack(1, 1, 0, MIB),
    "of its own frames": ack(0, 0, 1, MIB),
}


@pytest.mark.parametrize("name", ACKNOWLEDGEMENTS)
@on_uvloop
async def test_acknowledgements_that_cannot_be(identities: Identities, name: str) -> None:
    async with scene(identities) as made:
        await made.back()
        await made.lane.record(RecordType.ACK, ACKNOWLEDGEMENTS[name])
        await made.ends(INTEGRITY)


# ---- lanes and tokens


async def hello(made: Scene, token: bytes, sealer: Sealer, opener: Opener) -> HandLane:
    """Say a lane hello."""
    opened = HandLane(await made.rogue.dial(), sealer, opener)
    await opened.raw(wire.LANE_MAGIC + token)
    await opened.record(RecordType.HELLO)
    return opened


@on_uvloop
async def test_the_old_lane_is_dead_after_a_resumption(identities: Identities) -> None:
    """Its keys were of the old connection: what is sealed with them goes nowhere, by the old socket or a new one."""
    async with scene(identities) as made:
        old = made.lane
        await made.back()
        frame = made.stream.data(b"by the old lane", order=1)
        with pytest.raises(Gone):
            await old.receive()
        # And in the new lane's stead, under the new lane's number and next sequence.
        keys = made.rogue.control.keys(made.rogue.session, 1, Direction.FORWARD)
        assert keys.key != old.sealer._keys.key
        forged = Sealer(old.sealer._keys, LaneId(1))
        while forged.records < made.lane.sealer.records:
            forged.seal(RecordType.FRAME)
        await made.lane.raw(bytes(forged.seal(RecordType.FRAME, frame, wire.WHOLE)))
        await made.ends(INTEGRITY)


@pytest.mark.parametrize("keys", ["old", "new"])
@on_uvloop
async def test_a_token_of_before_the_resumption(identities: Identities, keys: str) -> None:
    """Granted, not used, and void since; with the old keys or with the new ones."""
    async with scene(identities) as made:
        await made.rogue.control.say(message("lane_request"))
        grant = (await made.rogue.control.hear())["grant"]
        old = made.rogue.halves(grant["lane"])
        await made.back()
        halves = old if keys == "old" else made.rogue.halves(grant["lane"])
        with pytest.raises(Gone):
            await (await hello(made, grant["token"], *halves)).receive()
        await made.finishes()


@on_uvloop
async def test_a_new_token_with_the_old_connections_keys(identities: Identities) -> None:
    async with scene(identities) as made:
        old = made.rogue.control
        answer = await made.rogue.comes_back()
        assert answer["type"] == "resumed"
        grant = made.rogue.grants.pop(0)
        number = LaneId(grant["lane"])
        sealer = Sealer(old.keys(made.rogue.session, number, Direction.FORWARD), number)
        opener = Opener(old.keys(made.rogue.session, number, Direction.BACKWARD), number)
        with pytest.raises(Gone):
            await (await hello(made, grant["token"], sealer, opener)).receive()
        await made.rogue.control.say(message("lane_request"))
        made.lane = await made.rogue.lane((await made.rogue.control.hear())["grant"])
        await made.finishes()


@on_uvloop
async def test_lane_numbers_are_never_given_twice(identities: Identities) -> None:
    """Over any number of connections, used or not: a number given twice would be a key and a nonce used twice."""
    async with scene(identities) as made:
        seen = {0}
        for _ in range(5):
            answer = await made.rogue.comes_back()
            numbers = [grant["lane"] for grant in answer["lanes"]]
            await made.rogue.control.say(message("lane_request"))
            numbers.append((await made.rogue.control.hear())["grant"]["lane"])
            assert not seen & set(numbers)
            seen |= set(numbers)
        await made.back()
        await made.finishes()


@on_uvloop
async def test_tokens_cannot_be_hoarded(identities: Identities) -> None:
    """Only the last few are good, and asking for more costs no memory; the session is none the worse."""
    async with scene(identities) as made:
        runner = made.receiver.runners[0]
        grants: list[dict[str, Any]] = []
        async with bounded(8 * MIB):
            for _ in range(5):
                await made.rogue.control.say(message("lane_request") * 50)
                grants += [(await made.rogue.control.hear())["grant"] for _ in range(50)]
        assert len({grant["lane"] for grant in grants}) == 250
        assert len(runner._tokens) == LANES_MAX
        early = grants[-LANES_MAX - 1]
        with pytest.raises(Gone):
            await (await hello(made, early["token"], *made.rogue.halves(early["lane"]))).receive()
        assert grants[-LANES_MAX]["token"] in runner._tokens
        await made.finishes()


@on_uvloop
async def test_so_many_lanes_and_no_more(identities: Identities) -> None:
    async with scene(identities) as made:
        lanes = [made.lane]
        for _ in range(LANES_MAX - 1):
            await made.rogue.control.say(message("lane_request"))
            lanes.append(await made.rogue.lane((await made.rogue.control.hear())["grant"]))
        assert len(made.receiver.runners[0].lanes) == LANES_MAX
        await made.rogue.control.say(message("lane_request"))
        await made.ends(INTEGRITY)


@on_uvloop
async def test_tokens_kept_for_later_open_no_lane_too_many(identities: Identities) -> None:
    async with scene(identities) as made:
        await made.rogue.control.say(message("lane_request") * LANES_MAX)
        grants = [(await made.rogue.control.hear())["grant"] for _ in range(LANES_MAX)]
        for grant in grants[: LANES_MAX - 1]:
            await made.rogue.lane(grant)
        runner = made.receiver.runners[0]
        assert len(runner.lanes) == LANES_MAX
        late = await made.rogue.lane(grants[-1])
        with pytest.raises(Gone):
            await late.receive()
        assert len(runner.lanes) == LANES_MAX
        assert made.receiver.codes == []


# ---- lanes that are lost

Abuse = Callable[[Scene], Awaitable[None]]


async def of_lanes_that_are_none(made: Scene) -> None:
    await made.rogue.control.say(b"".join(message("lane_lost", lane=lane) for lane in range(1, 400)))


async def of_the_only_lane(made: Scene) -> None:
    """It is given up; another one takes its place."""
    await made.rogue.control.say(message("lane_lost", lane=0) * 3)
    await made.rogue.control.say(message("lane_request"))
    answer = await made.rogue.control.hear()
    while answer["type"] == "lane_lost":
        answer = await made.rogue.control.hear()
    made.lane = await made.rogue.lane(answer["grant"])


@pytest.mark.parametrize("abuse", [of_lanes_that_are_none, of_the_only_lane])
@on_uvloop
async def test_losses_that_are_told(identities: Identities, abuse: Abuse) -> None:
    async with scene(identities) as made:
        await abuse(made)
        await made.finishes()


@on_uvloop
async def test_the_last_lane_is_lost_and_none_follows(identities: Identities) -> None:
    async with scene(identities, seconds=1) as made:
        made.lane.sock.close()
        await made.ends(LOST)


@on_uvloop
async def test_a_lane_that_is_left_while_another_goes_on(identities: Identities) -> None:
    async with scene(identities) as made:
        await made.rogue.control.say(message("lane_request"))
        second = await made.rogue.lane((await made.rogue.control.hear())["grant"])
        await made.lane.record(RecordType.FINAL)
        while (await made.lane.receive())[0] is not RecordType.FINAL:
            pass
        made.lane = second
        await made.finishes()


@on_uvloop
async def test_a_lane_is_left_just_as_the_others_break(identities: Identities) -> None:
    """Its peer could not know that it was the last one: that is a loss, and waits for another lane."""
    async with scene(identities) as made:
        await made.rogue.control.say(message("lane_request"))
        second = await made.rogue.lane((await made.rogue.control.hear())["grant"])
        made.lane.sock.close()
        assert (await made.rogue.control.hear())["type"] == "lane_lost"
        await second.record(RecordType.FINAL)
        while (await second.receive())[0] is not RecordType.FINAL:
            pass
        await made.rogue.control.say(message("lane_request"))
        made.lane = await made.rogue.lane((await made.rogue.control.hear())["grant"])
        await made.finishes()


@on_uvloop
async def test_final_on_the_only_lane_is_no_way_to_leave(identities: Identities) -> None:
    async with scene(identities) as made:
        await made.back()
        await made.lane.record(RecordType.FINAL)
        await made.ends(INTEGRITY)


@on_uvloop
async def test_what_is_forged_is_no_loss(identities: Identities) -> None:
    """A record that does not authenticate ends a session that could resume, too."""
    async with scene(identities) as made:
        record = bytearray(made.lane.sealer.seal(RecordType.FRAME, made.next(b"x"), wire.WHOLE))
        record[-1] ^= 1
        await made.lane.raw(bytes(record))
        await made.ends(INTEGRITY)
        assert (await made.rogue.control.hear())["code"] == INTEGRITY
        answer = await made.rogue.comes_back()
        assert (answer["type"], answer["code"]) == ("refuse", LOST)  # it has been told: there is nothing to ask

"""A session's state: which message may come when, channel order, cache order, acknowledgements, lying lanes."""

from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.errors import RecordMalformed
from crypto.keys import Direction, SessionId
from proxy.control import (
    Abort,
    Accept,
    Attested,
    Challenge,
    ChannelOpen,
    ChannelOpened,
    Countersigned,
    Facts,
    Finish,
    Finished,
    Heartbeat,
    LaneGrant,
    LaneGranted,
    LaneLost,
    LaneProgress,
    LaneRequest,
    LogHead,
    Message,
    Offer,
    PagesGiven,
    PagesWanted,
    Recover,
    Refuse,
    Resume,
    Resumed,
    Shown,
    Statement,
    Survey,
    Surveyed,
    VtpmGiven,
    VtpmProved,
    VtpmWanted,
    Word,
)
from proxy.errors import PeerLost, ProtocolViolation, StreamCorrupt
from proxy.flow import credit_bytes
from proxy.limits import CHANNELS_MAX, HEARTBEATS_MISSED_MAX, IN_FLIGHT_BYTES_MIN
from proxy.preflight import HostFacts
from proxy.session import ACCEPTED, Role, Session, State
from proxy.wire import FRAME_HEADER_BYTES, Ack, ChannelId, FrameHeader

ID = SessionId(bytes(16))
GRANT = LaneGrant(0, bytes(16))
EXAMPLES: dict[type, Message] = {
    Offer: Offer(1, ID, (1,), (0,), "default", 1, 30),
    Accept: Accept(1, 0, (GRANT,), 30, bytes(16)),
    Refuse: Refuse(3, "no"),
    Resume: Resume(1, ID, bytes(32), 0, ()),
    Resumed: Resumed(bytes(32), 0, (), (), "open"),
    LaneRequest: LaneRequest(),
    LaneLost: LaneLost(0),
    LaneGranted: LaneGranted(GRANT),
    ChannelOpen: ChannelOpen(0, 1),
    ChannelOpened: ChannelOpened(0, 1),
    Heartbeat: Heartbeat(0, ()),
    PagesWanted: PagesWanted(0, (1,)),
    PagesGiven: PagesGiven(0, (1,), bytes(4096)),
    Shown: Shown(LogHead("", ())),
    Facts: Facts(b"{}"),
    Statement: Statement(b"{}"),
    Countersigned: Countersigned(b"{}"),
    VtpmWanted: VtpmWanted(bytes(1216)),
    VtpmGiven: VtpmGiven(b"", 0),
    VtpmProved: VtpmProved(b""),
    Finish: Finish(),
    Finished: Finished(),
    Word: Word("voted"),
    Challenge: Challenge(1, ID, bytes(32)),
    Attested: Attested(b"", more=False),
    Recover: Recover(1, ID, "voted"),
    Survey: Survey(1, "default", HostFacts()),
    Surveyed: Surveyed(None, ()),
    Abort: Abort(7, "no"),
}

# The table once more, as the documents have it: who may hear what, and where it leads.
HEARD = {
    (Role.SOURCE, State.GREETING): {Accept: State.OPEN, Refuse: State.CLOSED},
    (Role.SOURCE, State.OPEN): {
        ChannelOpened: State.OPEN,
        PagesWanted: State.OPEN,
        Facts: State.OPEN,
        Countersigned: State.OPEN,
        VtpmWanted: State.OPEN,
        VtpmProved: State.OPEN,
        LaneGranted: State.OPEN,
        LaneLost: State.OPEN,
        Heartbeat: State.OPEN,
        Word: State.OPEN,
    },
    (Role.SOURCE, State.FINISHING): {
        Finished: State.CLOSED,
        Facts: State.FINISHING,
        Countersigned: State.FINISHING,
        LaneGranted: State.FINISHING,
        LaneLost: State.FINISHING,
        Heartbeat: State.FINISHING,
        Word: State.FINISHING,
    },
    (Role.SOURCE, State.CLOSED): {LaneLost: State.CLOSED, Heartbeat: State.CLOSED, Word: State.CLOSED},
    (Role.DESTINATION, State.GREETING): {Offer: State.GREETING},
    (Role.DESTINATION, State.OPEN): {
        ChannelOpen: State.OPEN,
        PagesGiven: State.OPEN,
        Shown: State.OPEN,
        VtpmGiven: State.OPEN,
        Statement: State.OPEN,
        LaneRequest: State.OPEN,
        LaneLost: State.OPEN,
        Heartbeat: State.OPEN,
        Word: State.OPEN,
        Finish: State.FINISHING,
    },
    (Role.DESTINATION, State.FINISHING): {
        LaneRequest: State.FINISHING,
        Shown: State.FINISHING,
        Statement: State.FINISHING,
        LaneLost: State.FINISHING,
        Heartbeat: State.FINISHING,
        Word: State.FINISHING,
    },
    (Role.DESTINATION, State.CLOSED): {
        LaneRequest: State.CLOSED,
        Shown: State.CLOSED,
        LaneLost: State.CLOSED,
        Heartbeat: State.CLOSED,
        Word: State.CLOSED,
    },
}


def session(role: Role = Role.SOURCE, state: State = State.OPEN) -> Session:
    made = Session(role, ID)
    made.state = state
    return made


def opened(channels: int = 1) -> tuple[Session, Session]:
    """Both ends of an open session with some channels."""
    source, destination = session(), session(Role.DESTINATION)
    for number in range(channels):
        channel = ChannelId(number)
        backward, forward = source.reserve(channel), destination.reserve(channel)
        source.open(channel, forward)
        destination.open(channel, backward)
    return source, destination


def send(sender: Session, channel: int, data: bytes, now: float = 0.0) -> bytes:
    half = sender.senders[ChannelId(channel)]
    frame = bytearray(FRAME_HEADER_BYTES) + data
    half.data(memoryview(frame), sender.next_order())
    half.departed(sender.flight.depart(len(data), now))
    return bytes(frame)


def end(sender: Session, channel: int) -> bytes:
    half = sender.senders[ChannelId(channel)]
    frame = bytes(half.end(sender.next_order()))
    half.departed(sender.flight.depart(0, 0.0))
    return frame


def take(receiver: Session, frame: bytes) -> bytes:
    header = FrameHeader.parse(frame)
    half = receiver.expect(header)
    half.verify(header, memoryview(frame)[FRAME_HEADER_BYTES:])
    receiver.wrote(half, header.raw_bytes)
    return frame[FRAME_HEADER_BYTES:]


# ------------------------------------------------------------------ which message when


@pytest.mark.parametrize(("role", "state"), list(product(Role, State)), ids=lambda value: value.value)
def test_the_table_and_nothing_else(role: Role, state: State) -> None:
    assert {type(message) for message in EXAMPLES.values()} == set(get_args(Message))
    for kind, message in EXAMPLES.items():
        subject = session(role, state)
        if kind in HEARD[role, state]:
            subject.received(message)
            assert subject.state is HEARD[role, state][kind]
        else:
            with pytest.raises(ProtocolViolation, match=f"{kind.__name__} while {state.value}"):
                subject.received(message)
            assert subject.state is state, "a violation moves nothing"


def test_the_table_is_complete_and_cannot_be_changed() -> None:
    assert set(ACCEPTED) == set(product(Role, State))
    with pytest.raises(TypeError):
        ACCEPTED[Role.SOURCE, State.OPEN] = frozenset()  # type: ignore[index]


@pytest.mark.parametrize(
    ("state", "message", "after"),
    [
        (State.GREETING, EXAMPLES[Offer], State.GREETING),
        (State.GREETING, EXAMPLES[Accept], State.OPEN),
        (State.GREETING, EXAMPLES[Refuse], State.CLOSED),
        (State.OPEN, EXAMPLES[Finish], State.FINISHING),
        (State.FINISHING, EXAMPLES[Finished], State.CLOSED),
        (State.OPEN, EXAMPLES[Heartbeat], State.OPEN),
    ],
)
def test_what_is_sent_moves_this_side_too(state: State, message: Message, after: State) -> None:
    subject = session(state=state)
    subject.sent(message)
    assert subject.state is after


def test_an_honest_conversation_stays_in_step() -> None:
    source, destination = session(state=State.GREETING), session(Role.DESTINATION, State.GREETING)
    script = [
        (source, Offer, State.GREETING),
        (destination, Accept, State.OPEN),
        (source, ChannelOpen, State.OPEN),
        (destination, ChannelOpened, State.OPEN),
        (source, LaneRequest, State.OPEN),
        (destination, LaneGranted, State.OPEN),
        (destination, Heartbeat, State.OPEN),
        (source, Finish, State.FINISHING),
        (source, Heartbeat, State.FINISHING),
        (destination, Finished, State.CLOSED),
        (source, Heartbeat, State.CLOSED),
    ]
    for speaker, kind, state in script:
        listener = destination if speaker is source else source
        speaker.sent(EXAMPLES[kind])
        listener.received(EXAMPLES[kind])
        assert source.state is destination.state is state


def test_each_end_sends_its_own_direction() -> None:
    assert Role.SOURCE.sends is Direction.FORWARD
    assert Role.DESTINATION.sends is Direction.BACKWARD


# ------------------------------------------------------------------ channels


def test_channels_open_in_order_and_once() -> None:
    subject = session()
    assert subject.next_channel == 0
    for wrong in (1, 63):
        with pytest.raises(ProtocolViolation, match="0 expected"):
            subject.reserve(ChannelId(wrong))
    with pytest.raises(ProtocolViolation, match="out of turn"):
        subject.open(ChannelId(0), 1)
    subject.reserve(ChannelId(0))
    with pytest.raises(ProtocolViolation, match="1 expected"):
        subject.reserve(ChannelId(0))
    subject.open(ChannelId(0), 1)
    with pytest.raises(ProtocolViolation, match="out of turn"):
        subject.open(ChannelId(0), 1)


def test_a_session_has_so_many_channels_and_no_more() -> None:
    subject = session()
    for number in range(CHANNELS_MAX):
        assert subject.reserve(ChannelId(number)) == credit_bytes(number + 1)
    with pytest.raises(ProtocolViolation, match="at most 64"):
        subject.reserve(ChannelId(CHANNELS_MAX))


def test_a_session_is_finished_when_all_has_ended_both_ways_and_is_written_and_acknowledged() -> None:
    source, destination = opened(2)
    assert not session().finished, "a session without channels has not finished"
    steps = []
    for number in range(2):
        steps += [
            lambda number=number: take(destination, end(source, number)),
            lambda number=number: take(source, end(destination, number)),
        ]
    steps += [
        lambda: source.acknowledged(destination.take_acks(), 1.0),
        lambda: destination.acknowledged(source.take_acks(), 1.0),
    ]
    for step in steps:
        assert not (source.finished and destination.finished)
        step()
    assert source.finished
    assert destination.finished


def test_a_channel_reserved_and_not_open_keeps_a_session_unfinished() -> None:
    source, destination = opened(1)
    take(destination, end(source, 0))
    take(source, end(destination, 0))
    source.acknowledged(destination.take_acks(), 1.0)
    assert source.finished
    source.reserve(ChannelId(1))
    assert not source.finished


# ------------------------------------------------------------------ frames


def test_frames_of_all_channels_share_one_order() -> None:
    source, destination = opened(3)
    frames = [send(source, number, bytes([number])) for number in (2, 0, 1, 2)]
    assert [FrameHeader.parse(frame).cache_order for frame in frames] == [0, 1, 2, 3]
    for frame in frames:
        take(destination, frame)


def test_a_frame_out_of_cache_order() -> None:
    source, destination = opened(2)
    send(source, 0, b"left out")
    with pytest.raises(ProtocolViolation, match="cache order"):
        take(destination, send(source, 1, b"second"))


@pytest.mark.parametrize("change", [{"channel": 1}, {"channel": 63}, {"direction": Direction.BACKWARD}], ids=str)
def test_a_frame_for_nobody(change: dict[str, object]) -> None:
    source, destination = opened(1)
    frame = send(source, 0, b"x")
    header = FrameHeader.parse(frame)._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(ProtocolViolation, match="a frame for channel"):
        destination.expect(header)
    assert take(destination, frame) == b"x"


def test_a_corrupt_frame_is_not_counted() -> None:
    source, destination = opened(1)
    with pytest.raises(StreamCorrupt):
        take(destination, send(source, 0, b"genuine")[:-1] + b"!")
    half = destination.receivers[ChannelId(0)]
    assert not half.written
    with pytest.raises(StreamCorrupt, match="behind one that is wrong"):
        take(destination, send(source, 0, b"more"))
    assert not destination.acks_pending


# ------------------------------------------------------------------ acknowledgements


def test_acknowledgements_are_due_once_and_in_order_of_channels() -> None:
    source, destination = opened(3)
    assert destination.take_acks() == []
    for number in (2, 0, 2):
        take(destination, send(source, number, b"xy"))
    assert destination.acks_pending
    acks = destination.take_acks()
    assert [(ack.channel, ack.frames) for ack in acks] == [(0, 1), (2, 2)]
    assert not destination.acks_pending
    assert destination.take_acks() == []
    assert source.flight.in_flight_bytes == 6
    source.acknowledged(acks, 1.0)
    assert source.flight.in_flight_bytes == 0
    assert source.senders[ChannelId(2)].credit == 4 + credit_bytes(3)


@pytest.mark.parametrize(
    "ack",
    [Ack(ChannelId(1), Direction.FORWARD, 0, 2**40), Ack(ChannelId(0), Direction.BACKWARD, 0, 2**40)],
    ids=["unknown channel", "wrong direction"],
)
def test_an_acknowledgement_of_what_is_not_ours(ack: Ack) -> None:
    source, _ = opened(1)
    with pytest.raises(ProtocolViolation):
        source.acknowledged([ack], 1.0)


def test_acknowledgements_are_due_again_only_for_what_has_arrived() -> None:
    """A lane is lost while a channel is being opened: its other end knows no such channel yet, and must not be told."""
    source, destination = opened()
    take(destination, send(source, 0, b"x"))
    assert len(destination.take_acks()) == 1
    destination.reserve(ChannelId(1))
    source.reserve(ChannelId(1))
    destination.acknowledge_again()
    source.acknowledge_again()
    again = destination.take_acks()
    assert [ack.channel for ack in again] == [0]
    source.acknowledged(again, 1.0)
    destination.acknowledged(source.take_acks(), 1.0)


def test_a_channel_has_its_share_however_full_the_window_is() -> None:
    """multifd: three channels whose hypervisors wait must leave the fourth its way."""
    source, _ = opened(4)
    halves = [source.senders[ChannelId(number)] for number in range(4)]
    for number, half in enumerate(halves[:3]):
        while room := source.room_bytes(half):
            send(source, number, bytes(min(room, 1 << 20)))
    assert source.flight.room_bytes == 0
    assert source.room_bytes(halves[3]) >= IN_FLIGHT_BYTES_MIN // 4
    assert source.flight.in_flight_bytes <= 2 * IN_FLIGHT_BYTES_MIN


# ------------------------------------------------------------------ lanes


def progress(sent: int, lane: int = 0) -> LaneProgress:
    return LaneProgress(lane, sent)


def test_a_lane_between_records_is_well() -> None:
    subject = session()
    for sent in (0, 100, 100, 200):
        subject.lane_progress(progress(sent), sent, begun_bytes=0, missing_bytes=0)


def test_a_record_under_way_is_well() -> None:
    """The sender's count stands behind it: it is all sent, and the rest is on its way."""
    subject = session()
    subject.lane_progress(progress(300), 150, begun_bytes=50, missing_bytes=150)
    subject.lane_progress(progress(300), 299, begun_bytes=199, missing_bytes=1)


def test_a_record_begun_after_the_heartbeat_left_is_well() -> None:
    subject = session()
    subject.lane_progress(progress(100), 150, begun_bytes=50, missing_bytes=1000)


def test_a_record_that_claims_more_than_was_sent() -> None:
    subject = session()
    with pytest.raises(RecordMalformed):
        subject.lane_progress(progress(200), 200, begun_bytes=100, missing_bytes=1)
    with pytest.raises(RecordMalformed):
        subject.lane_progress(progress(200), 150, begun_bytes=50, missing_bytes=51)


def test_a_lane_whose_bytes_stop_arriving() -> None:
    subject = session()
    for _ in range(HEARTBEATS_MISSED_MAX):
        subject.lane_progress(progress(500), 400, begun_bytes=0, missing_bytes=0)
    with pytest.raises(PeerLost, match="100 bytes do not arrive"):
        subject.lane_progress(progress(500), 400, begun_bytes=0, missing_bytes=0)


def test_a_slow_lane_is_no_dead_lane() -> None:
    subject = session()
    for received in range(20):
        subject.lane_progress(progress(500), received, begun_bytes=0, missing_bytes=0)


def test_lanes_are_watched_apart() -> None:
    subject = session()
    for received in range(20):
        subject.lane_progress(progress(500, 0), received, begun_bytes=0, missing_bytes=0)
        if received < HEARTBEATS_MISSED_MAX:
            subject.lane_progress(progress(500, 1), 7, begun_bytes=0, missing_bytes=0)


@given(
    records=st.lists(st.integers(36, 5000), min_size=1, max_size=20),
    counted=st.integers(0, 20),
    arrived=st.integers(0, 100_000),
)
def test_no_honest_lane_is_ever_accused(records: list[int], counted: int, arrived: int) -> None:
    """Whatever has arrived of whole records, wherever between two of them the heartbeat was made."""
    ends = [0]
    for size in records:
        ends.append(ends[-1] + size)
    received = min(arrived, ends[-1])
    begin = max(mark for mark in ends if mark <= received)
    finish = min(mark for mark in ends if mark > received) if received < ends[-1] else received
    begun = received - begin
    missing = finish - received if begun else 0
    sent = ends[min(counted, len(records))]
    session().lane_progress(progress(sent), received, begun_bytes=begun, missing_bytes=missing)

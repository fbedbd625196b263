"""The two halves of a channel's direction, told as a script and as a machine that draws its own scripts."""

from collections import deque

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crypto.keys import Direction
from proxy.channel import CREDIT_MAX, ReceiveHalf, SendHalf
from proxy.errors import ProtocolViolation, StreamCorrupt
from proxy.flow import Departure
from proxy.limits import FRAMES_IN_FLIGHT_MAX
from proxy.wire import FRAME_HEADER_BYTES, Ack, ChannelId, FrameHeader, FrameKind

CHANNEL = ChannelId(3)
CREDIT = 100


def halves(credit: int = CREDIT) -> tuple[SendHalf, ReceiveHalf]:
    return SendHalf(CHANNEL, Direction.FORWARD, credit), ReceiveHalf(CHANNEL, Direction.FORWARD, credit)


def framed(sender: SendHalf, data: bytes, order: int = 0) -> bytes:
    """A frame of `data` as the pump makes it, departure remembered."""
    buffer = bytearray(FRAME_HEADER_BYTES) + data
    sender.data(memoryview(buffer), order)
    sender.departed(Departure(len(data), 0.0, 0, raw=len(data)))
    return bytes(buffer)


def ended(sender: SendHalf, order: int = 0) -> bytes:
    frame = bytes(sender.end(order))
    sender.departed(Departure(0, 0.0, 0))
    return frame


def take(receiver: ReceiveHalf, frame: bytes) -> bytes:
    """What a receiver may write onward."""
    body = memoryview(frame)[FRAME_HEADER_BYTES:]
    receiver.accept(FrameHeader.parse(frame), body)
    return bytes(body)


def altered(frame: bytes, **fields: object) -> bytes:
    """The frame under a header with other fields."""
    changed = bytearray(frame)
    FrameHeader.parse(frame)._replace(**fields).pack_into(memoryview(changed))  # type: ignore[arg-type]
    return bytes(changed)


# ------------------------------------------------------------------ scripts


def test_one_stream_from_end_to_end() -> None:
    sender, receiver = halves()
    for number, word in enumerate((b"live ", b"migration")):
        frame = framed(sender, word, order=10 + number)
        header = FrameHeader.parse(frame)
        assert (header.number, header.cache_order, header.offset) == (number, 10 + number, receiver.offset)
        assert header.digest == blake3(b"live migration"[: header.offset + len(word)]).digest(16)
        assert take(receiver, frame) == word
        receiver.wrote(len(word), CREDIT)
    (first, second) = sender.acknowledge(receiver.acknowledgement())
    assert (first.size, second.size) == (5, 9)
    assert sender.credit == receiver.credit == 14 + CREDIT
    assert not sender.finished
    take(receiver, ended(sender))
    assert receiver.ended
    assert not receiver.finished, "END has not been passed on yet"
    receiver.wrote(0, CREDIT)
    assert receiver.finished
    sender.acknowledge(receiver.acknowledgement())
    assert sender.finished
    assert sender.digest == receiver.digest == blake3(b"live migration").digest()
    assert sender.acknowledged_bytes == receiver.written_bytes == sender.offset == receiver.offset == 14


def test_an_empty_stream_has_an_end_too() -> None:
    sender, receiver = halves()
    frame = ended(sender)
    header = FrameHeader.parse(frame)
    assert (header.kind, header.offset, header.raw_bytes, header.body_bytes) == (FrameKind.END, 0, 0, 32)
    assert frame[FRAME_HEADER_BYTES:] == blake3(b"").digest()
    take(receiver, frame)
    receiver.wrote(0, CREDIT)
    assert receiver.finished


def test_end_carries_the_byte_count_and_the_digest_of_b3sum() -> None:
    sender, _ = halves()
    framed(sender, b"abc")
    frame = ended(sender)
    # b3sum of "abc", from the BLAKE3 team's test vectors' tool
    assert frame[FRAME_HEADER_BYTES:].hex() == "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    assert FrameHeader.parse(frame).offset == 3


# ------------------------------------------------------------------ a sender keeps to its credit


def test_a_sender_never_exceeds_its_credit() -> None:
    sender, _ = halves(credit=10)
    assert sender.credit_room == 10
    framed(sender, bytes(10))
    assert sender.credit_room == 0
    with pytest.raises(ProtocolViolation):
        framed(sender, b"x")
    sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, 0, 11))
    assert sender.credit_room == 1
    framed(sender, b"x")


def test_a_sender_frames_nothing_after_end_and_nothing_empty() -> None:
    sender, _ = halves()
    with pytest.raises(ProtocolViolation):
        framed(sender, b"")
    ended(sender)
    with pytest.raises(ProtocolViolation):
        framed(sender, b"x")


def test_the_number_of_unacknowledged_frames_is_bounded() -> None:
    sender, receiver = halves(credit=10_000)
    for _ in range(FRAMES_IN_FLIGHT_MAX):
        take(receiver, framed(sender, b"x"))
    assert sender.credit_room == 0
    with pytest.raises(ProtocolViolation):
        framed(sender, b"x")
    receiver.wrote(1, 10_000)
    sender.acknowledge(receiver.acknowledgement())
    assert sender.credit_room > 0


def test_end_may_follow_as_many_frames_as_there_may_be() -> None:
    """The bound is for frames that hold bytes: a stream whose last bytes fill it must still be able to end."""
    sender, receiver = halves(credit=10_000)
    for _ in range(FRAMES_IN_FLIGHT_MAX):
        take(receiver, framed(sender, b"x"))
    take(receiver, ended(sender))
    assert receiver.ended


def test_a_receiver_refuses_one_frame_too_many() -> None:
    sender, receiver = halves(credit=10_000)
    for _ in range(FRAMES_IN_FLIGHT_MAX):
        take(receiver, framed(sender, b"x"))
    sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, 1, 10_000))
    with pytest.raises(ProtocolViolation, match="credit"):
        take(receiver, framed(sender, b"x"))


def test_a_receiver_refuses_what_goes_beyond_its_credit() -> None:
    sender, receiver = SendHalf(CHANNEL, Direction.FORWARD, 11), ReceiveHalf(CHANNEL, Direction.FORWARD, 10)
    frame = framed(sender, bytes(11))
    with pytest.raises(ProtocolViolation, match="credit"):
        take(receiver, frame)
    assert receiver.offset == 0


def test_credit_never_shrinks() -> None:
    sender, receiver = halves(credit=100)
    take(receiver, framed(sender, bytes(10)))
    receiver.wrote(10, window=1)
    assert receiver.credit == 100
    sender.acknowledge(receiver.acknowledgement())
    take(receiver, framed(sender, bytes(90)))
    receiver.wrote(90, window=1)
    assert receiver.credit == 101


def test_credit_stops_at_the_last_offset() -> None:
    sender, receiver = halves(credit=1)
    take(receiver, framed(sender, b"x"))
    receiver.wrote(1, window=2**64)
    assert receiver.credit == CREDIT_MAX == 2**63 - 1
    sender.acknowledge(receiver.acknowledgement())


# ------------------------------------------------------------------ a receiver believes nothing


@pytest.mark.parametrize(
    "fields", [{"number": 0}, {"number": 2}, {"number": 2**64 - 1}, {"offset": 0}, {"offset": 4}, {"offset": 2**64 - 1}]
)
def test_a_frame_out_of_place(fields: dict[str, int]) -> None:
    sender, receiver = halves()
    take(receiver, framed(sender, b"abc"))
    second = framed(sender, b"def")
    with pytest.raises(ProtocolViolation):
        take(receiver, altered(second, **fields))
    assert (receiver.offset, receiver.frames) == (3, 1)


def refuses_all_else(receiver: ReceiveHalf) -> None:
    """Nothing behind a frame that was wrong is taken, however right it looks: made here to fit what was received."""
    twin = SendHalf(CHANNEL, Direction.FORWARD, CREDIT)
    twin.offset, twin.frames, twin._hasher = receiver.offset, receiver.frames, receiver._hasher.copy()
    receiver.ended = False
    good = framed(twin, b"ghi")
    with pytest.raises(StreamCorrupt, match="behind one that is wrong"):
        take(receiver, good)
    with pytest.raises(StreamCorrupt, match="behind one that is wrong"):
        receiver.verify(FrameHeader.parse(good), memoryview(good)[FRAME_HEADER_BYTES:])
    assert not receiver.finished


def test_a_running_digest_that_disagrees() -> None:
    """A changed body, a changed digest, or bytes lost before: all show before one byte of the frame goes on."""
    for change in (lambda frame: frame[:-1] + b"!", lambda frame: altered(frame, digest=bytes(16))):
        sender, receiver = halves()
        take(receiver, framed(sender, b"abc"))
        with pytest.raises(StreamCorrupt):
            take(receiver, change(framed(sender, b"def")))
        refuses_all_else(receiver)


def test_an_end_that_disagrees() -> None:
    for change, error in (
        (lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]), StreamCorrupt),
        (lambda frame: altered(frame, digest=bytes(16)), StreamCorrupt),
        (lambda frame: altered(frame, offset=2), ProtocolViolation),
        (lambda frame: altered(frame, offset=4), ProtocolViolation),
    ):
        sender, receiver = halves()
        take(receiver, framed(sender, b"abc"))
        with pytest.raises(error):
            take(receiver, change(ended(sender)))
        if error is StreamCorrupt:
            refuses_all_else(receiver)
        else:
            assert not receiver.ended


def test_an_end_that_comes_too_early() -> None:
    """Cut off: the END of a longer stream after only a part of it, or an honest END for the part."""
    sender, receiver = halves()
    take(receiver, framed(sender, b"abc"))
    framed(sender, b"def")
    with pytest.raises(ProtocolViolation):
        take(receiver, ended(sender))


def test_nothing_follows_end() -> None:
    sender, receiver = halves()
    twin, _ = halves()
    take(receiver, ended(sender))
    framed(twin, b"abc")
    with pytest.raises(ProtocolViolation):
        take(receiver, framed(twin, b"def"))
    with pytest.raises(ProtocolViolation):
        take(receiver, ended(twin))


@pytest.mark.parametrize(
    ("frames", "credit"),
    [(3, CREDIT), (2**64 - 1, CREDIT), (2, 2**63), (2, 2**64 - 1)],
    ids=["never sent", "far", "credit over its limit", "credit far"],
)
def test_an_impossible_acknowledgement(frames: int, credit: int) -> None:
    sender, _ = halves()
    framed(sender, b"abc")
    framed(sender, b"def")
    sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, 1, CREDIT))
    with pytest.raises(ProtocolViolation):
        sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, frames, credit))
    assert (sender.acknowledged, sender.credit, sender.acknowledged_bytes) == (1, CREDIT, 3)


@pytest.mark.parametrize(("frames", "credit"), [(0, CREDIT), (1, CREDIT - 1), (0, 0)])
def test_an_acknowledgement_that_was_overtaken_says_nothing(frames: int, credit: int) -> None:
    """They come by several lanes, so a newer one may be here already."""
    sender, _ = halves()
    framed(sender, b"abc")
    sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, 1, CREDIT))
    assert sender.acknowledge(Ack(CHANNEL, Direction.FORWARD, frames, credit)) == []
    assert (sender.acknowledged, sender.credit, sender.acknowledged_bytes) == (1, CREDIT, 3)


def test_an_acknowledgement_again_is_harmless() -> None:
    sender, _ = halves()
    framed(sender, b"abc")
    ack = Ack(CHANNEL, Direction.FORWARD, 1, CREDIT + 3)
    assert len(sender.acknowledge(ack)) == 1
    assert sender.acknowledge(ack) == []


# ------------------------------------------------------------------ a machine draws scripts


class Channel(RuleBasedStateMachine):
    """A sender, a line that keeps order, a receiver, a hypervisor that writes when it likes, acknowledgements."""

    @initialize(credit=st.integers(1, 300), window=st.integers(1, 300))
    def begin(self, credit: int, window: int) -> None:
        self.sender, self.receiver = halves(credit)
        self.window = window
        self.line: deque[bytes] = deque()
        self.waiting: deque[int] = deque()
        self.stream = self.written = b""

    @rule(data=st.binary(min_size=1, max_size=200))
    def send(self, data: bytes) -> None:
        room = 0 if self.sender.ended else self.sender.credit_room
        if len(data) > room:
            with pytest.raises(ProtocolViolation):
                framed(self.sender, data)
            data = data[:room]
        if data:
            self.line.append(framed(self.sender, data))
            self.stream += data

    @precondition(lambda self: not self.sender.ended)
    @rule()
    def end(self) -> None:
        self.line.append(ended(self.sender))

    @precondition(lambda self: self.line)
    @rule()
    def arrive(self) -> None:
        frame = self.line.popleft()
        header = FrameHeader.parse(frame)
        body = take(self.receiver, frame)
        self.waiting.append(header.raw_bytes)
        if header.kind is FrameKind.DATA:
            self.written += body

    @precondition(lambda self: self.line)
    @rule(bit=st.integers(0, 10_000))
    def arrive_damaged(self, bit: int) -> None:
        """A copy of what is on the line, with one bit changed, is refused and leaves no trace but its hash."""
        frame = bytearray(self.line[0])
        frame[bit // 8 % len(frame)] ^= 1 << bit % 8
        before = (self.receiver.offset, self.receiver.frames, self.receiver.ended)
        twin = ReceiveHalf(CHANNEL, Direction.FORWARD, self.receiver.credit)
        twin.offset, twin.frames, twin.written = self.receiver.offset, self.receiver.frames, self.receiver.written
        twin._hasher = self.receiver._hasher.copy()
        header_changed = bit // 8 % len(frame) < FRAME_HEADER_BYTES
        try:
            take(twin, bytes(frame))
        except (ProtocolViolation, StreamCorrupt):
            pass
        else:
            # Channel, direction and cache order are the session's to check, above the halves.
            assert header_changed
            changed, genuine = FrameHeader.parse(frame), FrameHeader.parse(self.line[0])
            kept = {"channel": 0, "direction": Direction.FORWARD, "cache_order": 0}
            assert changed._replace(**kept) == genuine._replace(**kept)
        assert before == (self.receiver.offset, self.receiver.frames, self.receiver.ended)

    @precondition(lambda self: self.waiting)
    @rule()
    def write(self) -> None:
        self.receiver.wrote(self.waiting.popleft(), self.window)

    @rule()
    def acknowledge(self) -> None:
        self.sender.acknowledge(self.receiver.acknowledgement())

    @invariant()
    def credit_is_never_exceeded(self) -> None:
        if not hasattr(self, "sender"):
            return
        assert self.sender.offset <= self.sender.credit <= self.receiver.credit
        assert self.receiver.offset <= self.receiver.credit
        assert 0 <= self.sender.in_flight <= FRAMES_IN_FLIGHT_MAX + 1
        assert self.receiver.written <= self.receiver.frames <= self.sender.frames

    @invariant()
    def digests_are_those_of_the_stream(self) -> None:
        if not hasattr(self, "sender"):
            return
        assert self.sender.digest == blake3(self.stream).digest()
        assert self.receiver.digest == blake3(self.written).digest()
        assert self.stream.startswith(self.written)
        assert len(self.written) == self.receiver.offset
        if self.receiver.ended:
            assert self.written == self.stream


TestChannel = Channel.TestCase
TestChannel.settings = settings(max_examples=40, stateful_step_count=40)


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=20))
def test_any_stream_in_any_frames_arrives(frames: list[bytes]) -> None:
    sender, receiver = halves(credit=10_000)
    got = b"".join(take(receiver, framed(sender, frame)) for frame in frames)
    take(receiver, ended(sender))
    assert got == b"".join(frames)
    assert receiver.digest == sender.digest == blake3(got).digest()

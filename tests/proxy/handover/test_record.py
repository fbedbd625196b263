"""What is kept of a hand-over: comes back as written, a torn end is no harm, and no changed byte goes unnoticed."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import JournalDamaged
from proxy.handover.record import Entry, Head, Record, line, read
from proxy.handover.table import WRITTEN, Side, State
from proxy.hypervisors.base import Vm
from proxy.limits import JOURNAL_BYTES_MAX, REASON_CHARACTERS_MAX, VM_NAME_CHARACTERS_MAX

HEAD = Head("0123456789abcdef" * 2, "source", "xl", "beta", "2026-01-02T03:04:05.678+00:00", address="b:8010")
ENTRIES = (
    Entry("open", "2026-01-02T03:04:05.700+00:00"),
    Entry("open", "2026-01-02T03:04:06.000+00:00", "named", "café one", "0f9c2f1e-0000-4000-8000-00000000abcd"),
    Entry("prepared", "2026-01-02T03:04:07.000+00:00", "approved", "café one"),
    Entry("committed", "2026-01-02T03:04:08.000+00:00", 'the peer said "yes"\n', "café one", settled=True),
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=REASON_CHARACTERS_MAX)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=VM_NAME_CHARACTERS_MAX)
HEADS = st.builds(
    Head,
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    st.sampled_from(["source", "destination"]),
    st.sampled_from(["xl", "qmp"]),
    *[TEXTS] * 5,
    st.booleans(),
)
STATES = st.sampled_from([state.value for state in WRITTEN])
LISTS = st.lists(st.builds(Entry, STATES, TEXTS, TEXTS, NAMES, NAMES, NAMES, st.booleans()), max_size=5)


def written(head: Head, entries: tuple[Entry, ...] | list[Entry]) -> bytes:
    return b"".join(line(item) for item in (head, *entries))


WRITTEN = written(HEAD, ENTRIES)
ENDS = [0, *(at + 1 for at, byte in enumerate(WRITTEN) if byte == ord("\n"))]


@given(HEADS, LISTS)
def test_what_is_written_is_read(head: Head, entries: list[Entry]) -> None:
    content = written(head, entries)
    record, good = read(content)
    assert (record.head, record.entries, good) == (head, entries, len(content))
    assert content.count(b"\n") == 1 + len(entries), "a line is a line, whatever its words are"
    assert record.side is Side(head.side)
    assert record.state is (State(entries[-1].state) if entries else State.OPEN)
    assert record.settled is bool(entries and entries[-1].settled)


def test_a_record_knows_what_its_entries_told() -> None:
    record, _ = read(WRITTEN)
    assert record.state is State.COMMITTED
    assert record.settled
    assert record.vm == Vm("café one", ""), "the last that had a name"
    assert record.why == 'the peer said "yes"\n'
    assert Record(HEAD).vm == Vm("", "")
    assert (Record(HEAD).state, Record(HEAD).why, Record(HEAD).settled) == (State.OPEN, "", False)


def test_the_bytes_of_a_line() -> None:
    """Frozen: files of one version are read by the next."""
    assert line(Entry("voted", "2026-01-02T03:04:05+00:00", "gave_up", "vm1", "")) == (
        b'{"state":"voted","at":"2026-01-02T03:04:05+00:00","why":"gave_up","name":"vm1","uuid":"","copy":"",'
        b'"settled":false,"paused":false,"tool":""} 885b9106\n'
    )
    assert line(Head("00" * 16, "destination", "qmp", "alpha", "2026", monitor="unix:/q")) == (
        b'{"session":"00000000000000000000000000000000","side":"destination","kind":"qmp","peer":"alpha",'
        b'"began":"2026","address":"","monitor":"unix:/q","holder":"","paused":false,"route":"","version":1} 6eb4eb48\n'
    )


def test_what_was_written_before_xl_was_known_is_read() -> None:
    """Frozen as well: of the first version."""
    entry = Entry("voted", "2026-01-02T03:04:05+00:00", "gave_up", "vm1", "")
    old = (
        b'{"state":"voted","at":"2026-01-02T03:04:05+00:00","why":"gave_up","name":"vm1","uuid":"","copy":"",'
        b'"settled":false,"paused":false} 8264f9e1\n'
    )
    record, _ = read(line(HEAD) + old)
    assert record.entries == [entry]
    assert record.tool == ""


def test_the_xl_at_work_is_the_last_that_was_told() -> None:
    entries = [Entry("open", "2026", tool=tool) for tool in ("", "7 100", "8 200", "")]
    assert Record(HEAD, entries).tool == "8 200"


# ------------------------------------------------------------------ torn


@pytest.mark.parametrize("size", range(ENDS[1], len(WRITTEN)))
def test_a_torn_last_line_is_left_out(size: int) -> None:
    record, good = read(WRITTEN[:size])
    whole = max(end for end in ENDS if end <= size)
    assert good == whole
    assert len(record.entries) == ENDS.index(whole) - 1


@pytest.mark.parametrize("size", range(ENDS[1]))
def test_without_a_whole_head_there_is_no_record(size: int) -> None:
    with pytest.raises(JournalDamaged):
        read(WRITTEN[:size])


@pytest.mark.parametrize("sector", [16, 64, 512])
def test_sectors_of_the_last_line_that_were_never_written(sector: int) -> None:
    """They read as zeros, in whatever order the disk took the others."""
    start, end = ENDS[-2], ENDS[-1]
    for at in range(start - start % sector, end, sector):
        content = bytearray(WRITTEN)
        for hole in range(max(at, start), min(at + sector, end)):
            content[hole] = 0
        record, good = read(bytes(content))
        assert (good, record.state) == (start, State.PREPARED)


def test_a_file_that_was_lengthened_and_not_written() -> None:
    for zeros in (1, 100, 4096):
        record, good = read(WRITTEN + bytes(zeros))
        assert (good, record.state) == (len(WRITTEN), State.COMMITTED)


# ------------------------------------------------------------------ damaged


@pytest.mark.parametrize("bit", range(8))
def test_every_changed_bit_is_noticed(bit: int) -> None:
    """In the last line too: COMMITTED must not become PREPARED because a disk forgets."""
    for at in range(len(WRITTEN)):
        content = bytearray(WRITTEN)
        content[at] ^= 1 << bit
        if content[at] == 0:
            continue  # looks like a sector that was never written; see above
        with pytest.raises(JournalDamaged):
            read(bytes(content))


@given(st.integers(0, len(WRITTEN) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, value: int) -> None:
    content = bytearray(WRITTEN)
    if content[at] == value:
        return
    content[at] = value
    with pytest.raises(JournalDamaged):
        read(bytes(content))


@pytest.mark.parametrize("number", range(1, len(ENTRIES)))
def test_a_line_before_the_last_that_was_zeroed(number: int) -> None:
    start, end = ENDS[number], ENDS[number + 1]
    for hole in (range(start, end - 1), range(start, end)):
        content = bytearray(WRITTEN)
        for at in hole:
            content[at] = 0
        with pytest.raises(JournalDamaged):
            read(bytes(content))


def test_a_line_that_is_missing_twice_or_elsewhere() -> None:
    lines = [WRITTEN[start:end] for start, end in pairwise(ENDS)]
    head, *entries = lines
    for content in (
        b"".join(entries),
        head + head,
        entries[0] + head,
        b"\n" + WRITTEN,
        WRITTEN + b"\n",
        WRITTEN + head,
    ):
        with pytest.raises(JournalDamaged):
            read(content)


@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_are_a_record_or_damage(content: bytes, headed: bool) -> None:
    try:
        record, good = read((written(HEAD, ()) if headed else b"") + content)
    except JournalDamaged:
        return
    assert headed
    assert (record.entries, good) == ([], ENDS[1]), "no sum is right by chance"


@pytest.mark.parametrize(
    "item",
    [
        b'{"session":"00","side":"source","kind":"xl","peer":"b","began":""}',
        b'{"session":"' + b"0" * 32 + b'","side":"both","kind":"xl","peer":"b","began":""}',
        b'{"session":"' + b"0" * 32 + b'","side":"source","kind":"kvm","peer":"b","began":""}',
        b'{"session":"' + b"0" * 32 + b'","side":"source","kind":"xl","peer":"b","began":"","version":2}',
        b'{"session":"' + b"0" * 32 + b'","side":"source","kind":"xl","peer":"b","began":"","more":1}',
        b"[" * 100_000,
        b"\xff",
        b"",
    ],
)
def test_a_right_sum_makes_no_head_of_what_is_none(item: bytes) -> None:
    with pytest.raises(JournalDamaged):
        read(summed(item))


@pytest.mark.parametrize(
    "item",
    [
        b'{"state":"undone","at":""}',
        b'{"state":"unknown","at":""}',
        b'{"state":"asked","at":""}',
        b'{"state":"open","at":"","why":"' + b"x" * (REASON_CHARACTERS_MAX + 1) + b'"}',
        b'{"state":"open","at":"","name":"' + b"x" * (VM_NAME_CHARACTERS_MAX + 1) + b'"}',
        b'{"state":"open","at":"","later":true}',
        b'{"state":"open"}',
    ],
)
def test_a_right_sum_makes_no_state_of_what_is_none(item: bytes) -> None:
    with pytest.raises(JournalDamaged):
        read(written(HEAD, ()) + summed(item))


def summed(body: bytes) -> bytes:
    """Any line with a right sum."""
    probe = line(Entry("open", ""))
    text, _, _ = probe.rpartition(b" ")
    assert probe.endswith(b" %08x\n" % crc(text))
    return body + b" %08x\n" % crc(body)


def crc(body: bytes) -> int:
    """CRC-32 of IEEE 802.3, by its definition."""
    value = 0xFFFFFFFF
    for byte in body:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


# ------------------------------------------------------------------ bounds


def test_a_file_beyond_its_limit_is_not_read() -> None:
    content = written(HEAD, ENTRIES[:1] * (JOURNAL_BYTES_MAX // len(line(ENTRIES[0])) + 1))
    with pytest.raises(JournalDamaged, match="allowed"):
        read(content)


def test_the_largest_line_that_there_may_be_fits_many_times() -> None:
    largest = Entry("committed", "x" * 512, "\U0001f427" * REASON_CHARACTERS_MAX, "\U0001f427" * VM_NAME_CHARACTERS_MAX)
    assert len(line(largest)) * 64 <= JOURNAL_BYTES_MAX


# ------------------------------------------------------------------ how long it took


@pytest.mark.parametrize(
    ("since", "until", "seconds"),
    [
        (State.OPEN, State.COMMITTED, 2.3),
        (State.PREPARED, State.COMMITTED, 1.0),
        (State.PREPARED, State.PREPARED, 0.0),
        (State.COMMITTED, State.PREPARED, 0.0),  # as where the clock was set back
        (State.VOTED, State.COMMITTED, None),
        (State.PREPARED, State.DONE, None),
    ],
)
def test_from_one_state_to_another(since: State, until: State, seconds: float | None) -> None:
    """Of a state that was written more than once (its machine was named, it was settled) the first counts."""
    assert Record(HEAD, list(ENTRIES)).seconds(since, until) == seconds

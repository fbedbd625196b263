"""What the journal keeps of one side of a hand-over: a head, then a line for each state, every line with its sum.

A line is JSON, a space, and the CRC-32 of the JSON in 8 hexadecimal digits. A crash can leave the last line torn: its
end is missing, or sectors of it were never written and read as zeros. It was never acted upon, for nothing follows from
a line before it is on the disk. Anything else that is wrong is damage, in the last line too: that one says where a side
stands, and to take the line before it for the last would be to forget a promise.
"""

import zlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from proxy.errors import JournalDamaged
from proxy.handover.table import Side, State
from proxy.hypervisors.base import Vm
from proxy.limits import JOURNAL_BYTES_MAX, REASON_CHARACTERS_MAX, VM_NAME_CHARACTERS_MAX

VERSION: Final = 1
UNREADABLE: Final = "unreadable"  # in place of a state: the journal cannot be read, so nobody knows

Kind = Literal["xl", "qmp"]
"""Of hypervisors whose hand-over can be guarded."""

_Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
_Name = Annotated[str, msgspec.Meta(max_length=VM_NAME_CHARACTERS_MAX)]
_Text = Annotated[str, msgspec.Meta(max_length=REASON_CHARACTERS_MAX)]
_State = Literal["open", "prepared", "voted", "committed", "done", "undoing", "aborted", "doubt"]


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is certain from the start.

    Args:
        session: its id, 32 hexadecimal digits.
        side: which copy this end has.
        kind: the hypervisor's, as ``Hypervisor.kind``.
        peer: the name in the other relay's certificate.
        address: where the other relay listens; empty at a destination, whom its source calls.
        monitor: where the hypervisor is asked, if it is not known from ``kind``.
        holder: the process that holds xl's pipes at a source, if it is not the relay's; see ``proxy.process``.
        paused: whether the machine is to stay paused where it arrives.
        route: of ACCEPT, in hexadecimal: leads to the process that had the session; empty at a destination.
        began: ISO 8601, UTC.
    """

    session: _Hex
    side: Literal["source", "destination"]
    kind: Kind
    peer: _Text
    began: _Text
    address: _Text = ""
    monitor: _Text = ""
    holder: _Text = ""
    paused: bool = False
    route: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")] = ""
    version: Literal[1] = 1


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One state.

    Args:
        state: reached.
        at: ISO 8601, UTC.
        why: in words for people.
        name, uuid: of the machine, as far as the stream has told by then.
        copy: which copy here is meant; see ``Hypervisor.pin``.
        settled: nothing is left to be done about it.
        tool: the xl process that sends the machine, or receives it, as ``proxy.process`` writes it down; empty if
            that is not known.
        paused: whether its operator had paused it before it left; see ``Vm``.
    """

    state: _State
    at: _Text
    why: _Text = ""
    name: _Name = ""
    uuid: _Name = ""
    copy: _Name = ""
    settled: bool = False
    paused: bool = False
    tool: _Text = ""


@dataclass(slots=True)
class Record:
    """A journal file, read."""

    head: Head
    entries: list[Entry] = field(default_factory=list)

    @property
    def side(self) -> Side:
        """Which copy this end has."""
        return Side(self.head.side)

    @property
    def state(self) -> State:
        """Where this side stands."""
        return State(self.entries[-1].state) if self.entries else State.OPEN

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be done about it here."""
        return bool(self.entries) and self.entries[-1].settled

    @property
    def vm(self) -> Vm:
        """The machine; its name is empty if the stream had not told it, or a QEMU has none."""
        named = next((entry for entry in reversed(self.entries) if entry.name or entry.copy), None)
        return Vm("", "") if named is None else Vm(named.name, named.uuid, named.copy, named.paused)

    @property
    def begun(self) -> bool:
        """Whether there is a copy here that the hand-over is about; before that nothing has happened anywhere.

        xl is known by what its stream tells, a QEMU by its monitor, as soon as it is guarded.
        """
        return bool(self.vm.name if self.head.kind == "xl" else self.vm.copy)

    @property
    def tool(self) -> str:
        """The xl process that sends the machine, or receives it; empty if that is not known."""
        return next((entry.tool for entry in reversed(self.entries) if entry.tool), "")

    @property
    def why(self) -> str:
        """Of the last state."""
        return self.entries[-1].why if self.entries else ""

    def seconds(self, since: State, until: State) -> float | None:
        """From when this side first stood at ``since`` until it first stood at ``until``; None if it never did.

        By the host's clock: where that was set back meanwhile, 0.
        """
        first: dict[str, str] = {}
        for entry in self.entries:
            first.setdefault(entry.state, entry.at)
        if since.value not in first or until.value not in first:
            return None
        passed = datetime.fromisoformat(first[until.value]) - datetime.fromisoformat(first[since.value])
        return max(0.0, passed.total_seconds())


def line(item: Head | Entry) -> bytes:
    """One line of the file."""
    body = msgspec.json.encode(item)
    return body + f" {zlib.crc32(body):08x}\n".encode()


def read(content: bytes) -> tuple[Record, int]:
    """A file's record, and how many of its bytes are good.

    Raises:
        JournalDamaged: it has no head, or a line before the last is wrong.
    """
    if len(content) > JOURNAL_BYTES_MAX:
        raise JournalDamaged(f"{len(content)} bytes, {JOURNAL_BYTES_MAX} allowed")
    record: Record | None = None
    good = 0
    *lines, tail = content.split(b"\n")
    for number, text in enumerate(lines, 1):
        try:
            body = _checked(text)
            if record is None:
                record = Record(msgspec.json.decode(body, type=Head))
            else:
                record.entries.append(msgspec.json.decode(body, type=Entry))
        except (ValueError, msgspec.DecodeError) as error:
            _, hole, rest = text.rpartition(b"\0")
            if number == len(lines) and not tail and hole and not _is_whole(rest) and record is not None:
                break  # torn, although its newline is there: sectors are written in any order
            raise JournalDamaged(f"line {number}: {error}") from None
        good += len(text) + 1
    if record is None:
        raise JournalDamaged("it has no first line")
    if _is_whole(tail[:-1]):
        raise JournalDamaged("the last line's end is not what was written")
    return record, good


def _is_whole(text: bytes) -> bool:
    try:
        _checked(text)
    except ValueError:
        return False
    return True


def _checked(text: bytes) -> bytes:
    body, _, crc = text.rpartition(b" ")
    if crc != b"%08x" % zlib.crc32(body):
        raise ValueError("its sum is wrong")
    return body

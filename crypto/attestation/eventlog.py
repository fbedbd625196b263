"""The firmware's log of what it has measured, and the PCRs that it leads to.

Layout: TCG PC Client Platform Firmware Profile, revision 1.05, §10. The first event is in TCG 1.2's layout and says,
as "Spec ID Event03", which digests those after it have (TCG_EfiSpecIDEvent, TCG_PCR_EVENT2); without it all events are
in the old layout, with a SHA-1 (TCG_PCClientPCREvent). Here numbers are little-endian.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from crypto.attestation.limits import EVENT_BYTES_MAX, EVENT_LOG_BYTES_MAX, EVENTS_MAX, PCR_COUNT
from crypto.attestation.structures import BANK_NAMES, DIGEST_BYTES
from crypto.errors import EvidenceMalformed

EV_NO_ACTION: Final = 0x00000003  # told, and not measured
_SIGNATURE: Final = b"Spec ID Event03\0"
_STARTUP_LOCALITY: Final = b"StartupLocality\0"
_OLD: Final = struct.Struct("<II20sI")
_SPEC: Final = struct.Struct("<16sIBBBBI")


@dataclass(frozen=True, slots=True)
class Event:
    """One measurement.

    Attributes:
        pcr: which PCR it went into.
        kind: its type.
        digests: what was measured, by bank.
        data: about it; what it says is not proven unless its digest is that of a digest.
    """

    pcr: int
    kind: int
    digests: Mapping[str, bytes]
    data: bytes


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self._data):
            raise EvidenceMalformed(f"the firmware's log ends within an event, at {self.at}")
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def event_data(self, size: int) -> bytes:
        if size > EVENT_BYTES_MAX:
            raise EvidenceMalformed(f"an event of {size} bytes in the firmware's log, {EVENT_BYTES_MAX} allowed")
        return self.take(size)

    @property
    def done(self) -> bool:
        return self.at == len(self._data)


def parse(log: bytes) -> tuple[Event, ...]:
    """The events of a log, in their order.

    Raises:
        EvidenceMalformed: it is none, or out of bounds.
    """
    if len(log) > EVENT_LOG_BYTES_MAX:
        raise EvidenceMalformed(f"a firmware's log of {len(log)} bytes, {EVENT_LOG_BYTES_MAX} allowed")
    cursor = _Cursor(log)
    first = _old_event(cursor)
    sizes = _spec_id(first)
    events = [first]
    while not cursor.done:
        if len(events) >= EVENTS_MAX:
            raise EvidenceMalformed(f"over {EVENTS_MAX} events in the firmware's log")
        events.append(_event(cursor, sizes) if sizes else _old_event(cursor))
    return tuple(events)


def _pcr(index: int) -> int:
    if index >= PCR_COUNT and index != 0xFFFFFFFF:  # which some firmware gives to what it measures nowhere
        raise EvidenceMalformed(f"the firmware's log has an event of PCR {index}")
    return index


def _old_event(cursor: _Cursor) -> Event:
    index, kind, digest, size = _OLD.unpack(cursor.take(_OLD.size))
    return Event(_pcr(index), kind, {"sha1": digest}, cursor.event_data(size))


def _spec_id(first: Event) -> dict[int, int]:
    """Digest sizes by algorithm, as TCG_EfiSpecIDEvent tells; none of a log in the old layout."""
    if first.kind != EV_NO_ACTION or not first.data.startswith(_SIGNATURE):
        return {}
    cursor = _Cursor(first.data)
    count = _SPEC.unpack(cursor.take(_SPEC.size))[-1]
    if not 1 <= count <= 16:
        raise EvidenceMalformed(f"the firmware's log has {count} digests an event")
    sizes = {cursor.u16(): cursor.u16() for _ in range(count)}
    if len(sizes) != count or any(not 1 <= size <= 64 for size in sizes.values()):
        raise EvidenceMalformed("the firmware's log names a digest twice, or of no length")
    for algorithm, size in sizes.items():
        name = BANK_NAMES.get(algorithm)
        if name is not None and DIGEST_BYTES[name] != size:
            raise EvidenceMalformed(f"the firmware's log has a {name} of {size} bytes")
    cursor.take(int.from_bytes(cursor.take(1), "little"))  # the vendor's own
    if not cursor.done:
        raise EvidenceMalformed("the firmware's log has bytes too many in its first event")
    return sizes


def _event(cursor: _Cursor, sizes: Mapping[int, int]) -> Event:
    index, kind, count = cursor.u32(), cursor.u32(), cursor.u32()
    if count > len(sizes):
        raise EvidenceMalformed(f"an event with {count} digests in the firmware's log, {len(sizes)} were told")
    digests: dict[str, bytes] = {}
    for _ in range(count):
        algorithm = cursor.u16()
        if algorithm not in sizes:
            raise EvidenceMalformed(f"an event with a digest of algorithm {algorithm:#06x}, which was not told")
        digest = cursor.take(sizes[algorithm])
        name = BANK_NAMES.get(algorithm)
        if name in digests:
            raise EvidenceMalformed("an event of the firmware's log has a digest twice")
        if name is not None:
            digests[name] = digest
    return Event(_pcr(index), kind, digests, cursor.event_data(cursor.u32()))


def replay(events: tuple[Event, ...], bank: str) -> dict[int, bytes]:
    """What the PCRs of a bank hold after these events; of PCRs without any nothing is said.

    A PCR is extended by an event: PCR = H(PCR | digest). PCR 0 begins with the locality in which the TPM was started.

    Raises:
        EvidenceMalformed: an event has no digest of that bank.
    """
    size = DIGEST_BYTES[bank]
    pcrs: dict[int, bytes] = {}
    for event in events:
        if event.kind == EV_NO_ACTION:
            if event.data.startswith(_STARTUP_LOCALITY) and len(event.data) == len(_STARTUP_LOCALITY) + 1:
                if 0 in pcrs:
                    raise EvidenceMalformed("the firmware's log tells of the TPM's start after PCR 0 was extended")
                pcrs[0] = event.data[-1:].rjust(size, b"\0")
            continue
        if event.pcr >= PCR_COUNT:
            continue
        digest = event.digests.get(bank)
        if digest is None:
            raise EvidenceMalformed(f"an event of PCR {event.pcr} has no {bank} digest in the firmware's log")
        pcrs[event.pcr] = extend(bank, pcrs.get(event.pcr, bytes(size)), digest)
    return pcrs


def extend(bank: str, value: bytes, digest: bytes) -> bytes:
    """A PCR's value after TPM2_PCR_Extend (Part 3 §22.2)."""
    return hashlib.new(bank, value + digest, usedforsecurity=False).digest()

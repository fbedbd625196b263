"""The CA's memory: what was issued and revoked, one JSON event a line.

Lines are only ever appended. What stands after the last newline was never acknowledged and does not count.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum, unique
from pathlib import Path
from typing import TypeAlias

import msgspec

from crypto.certificates import Usage
from crypto.errors import PkiCorrupt


@unique
class Status(StrEnum):
    """Where a certificate stands at a given time; revoked wins over expired."""

    VALID = "valid"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Entry:
    """One certificate that the CA has issued.

    Attributes:
        name: the host's NAME.
        usage: host (TLS) or signing.
        serial: the certificate's serial number.
        not_before, not_after: aware datetimes, UTC.
        status: at the time that was asked for.
        revoked_at: when it was revoked, or None.
        directory: where its identity was written.
    """

    name: str
    usage: Usage
    serial: int
    not_before: datetime
    not_after: datetime
    status: Status
    revoked_at: datetime | None
    directory: Path


class IssuedEvent(msgspec.Struct, tag="issued", tag_field="event", frozen=True, forbid_unknown_fields=True):
    """A certificate, before any file of it exists."""

    serial: str  # hexadecimal: 160 bits would not survive a JSON reader that knows only doubles
    name: str
    usage: Usage
    not_before: datetime
    not_after: datetime
    directory: str


class RevokedEvent(msgspec.Struct, tag="revoked", tag_field="event", frozen=True, forbid_unknown_fields=True):
    """A revocation, before the CRL that says so."""

    serial: str
    at: datetime


class CrlEvent(msgspec.Struct, tag="crl", tag_field="event", frozen=True, forbid_unknown_fields=True):
    """A CRL number, spent before the CRL exists."""

    number: int
    at: datetime


Event: TypeAlias = IssuedEvent | RevokedEvent | CrlEvent


class Index:
    """The index, read.

    Attributes:
        issued: by serial number, in the order of issue.
        revoked: when, by serial number.
        crl_number: the highest one spent; 0 before the first.
    """

    def __init__(self) -> None:
        self.issued: dict[int, IssuedEvent] = {}
        self.revoked: dict[int, datetime] = {}
        self.crl_number = 0

    @classmethod
    def parse(cls, content: bytes, path: Path) -> "Index":
        """Read the whole file.

        Args:
            content: its bytes.
            path: for the message only.

        Raises:
            PkiCorrupt: a finished line is no event.
        """
        index = cls()
        decoder = msgspec.json.Decoder(Event)
        # After the last newline there is nothing, or a line that was never finished.
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                index._apply(decoder.decode(line))
            except (msgspec.DecodeError, ValueError) as error:
                raise PkiCorrupt(
                    f"line {number} of {path} cannot be read: {error}", "restore the CA's directory from a backup"
                ) from None
        return index

    def _apply(self, event: Event) -> None:
        match event:
            case IssuedEvent():
                self.issued[int(event.serial, 16)] = event
            case RevokedEvent():
                self.revoked.setdefault(int(event.serial, 16), event.at)
            case CrlEvent():
                self.crl_number = max(self.crl_number, event.number)

    def entries(self, now: datetime) -> Iterator[Entry]:
        """Every certificate, in order of issue, with its status at `now` (aware)."""
        for serial, event in self.issued.items():
            revoked_at = self.revoked.get(serial)
            status = Status.VALID
            if revoked_at is not None:
                status = Status.REVOKED
            elif now > event.not_after:
                status = Status.EXPIRED
            yield Entry(
                name=event.name,
                usage=event.usage,
                serial=serial,
                not_before=event.not_before,
                not_after=event.not_after,
                status=status,
                revoked_at=revoked_at,
                directory=Path(event.directory),
            )


def append_events(path: Path, events: Sequence[Event]) -> None:
    """Append whole lines and make them durable; what a crash left of an unfinished line goes first.

    Raises:
        OSError: the file cannot be written.
    """
    lines = b"".join(msgspec.json.encode(event) + b"\n" for event in events)
    with path.open("r+b") as file:
        whole_bytes = file.read().rfind(b"\n") + 1
        file.truncate(whole_bytes)
        file.seek(whole_bytes)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())

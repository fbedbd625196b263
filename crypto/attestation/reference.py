"""What a host is allowed to be, as a file of its peer's says, and the judgement over what it shows.

One file a host, NAME.toml in a folder that only its owner writes; made by `korora attest enrol` and `golden`:

    version = 1
    host = "beta"
    ak = "…"                      # TPMT_PUBLIC of its attestation key, in hexadecimal
    endorsement = "…"             # SHA-256 of the public area of the endorsement key that it was enrolled by
    endorsed_by = ["CN=…"]        # who has certified that key, from its issuer to its root; empty: nobody
    enrolled = "2026-11-26T09:00:00Z"

    [pcrs.sha256]
    0 = ["…"]                     # the values that this PCR may have

    [events.sha256]
    4 = ["…"]                     # instead of a value: every event in this PCR has one of these digests

    [files]                       # the kernel's list of measured files is wanted, and leads to PCR 10
    bank = "sha256"
    allow = ["sha256:…"]          # every file measured is one of these; left out: whatever it lists
    violations = false            # whether files may have been open to writing while they were measured
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from crypto.attestation import eventlog, ima
from crypto.attestation.binding import Binding
from crypto.attestation.evidence import Evidence
from crypto.attestation.limits import PCR_COUNT, REFERENCE_BYTES_MAX, REFERENCE_DIGESTS_MAX, VALUES_MAX
from crypto.attestation.quote import Quoted, check_clock, verify_quote
from crypto.attestation.structures import DIGEST_BYTES, Clock, Public, Selection
from crypto.errors import (
    AttestationError,
    AttestationMissing,
    EvidenceMalformed,
    PlatformChanged,
    PlatformUnknown,
    ReferenceInvalid,
)

VERSION: Final = 1
SUFFIX: Final = ".toml"

_Bank = Literal["sha1", "sha256", "sha384", "sha512"]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})+\Z", max_length=4096)]
_Index = Annotated[str, msgspec.Meta(pattern=r"^(1?[0-9]|2[0-3])\Z")]
_Values = Annotated[tuple[_Hex, ...], msgspec.Meta(min_length=1, max_length=VALUES_MAX)]
_Events = Annotated[tuple[_Hex, ...], msgspec.Meta(min_length=1, max_length=REFERENCE_DIGESTS_MAX)]
_File = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]{1,16}:([0-9a-f]{2})+\Z", max_length=160)]
_Host = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")]


class Files(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is demanded of the list of measured files."""

    bank: _Bank = "sha256"
    allow: Annotated[tuple[_File, ...], msgspec.Meta(max_length=REFERENCE_DIGESTS_MAX)] | None = None
    violations: bool = False


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    host: _Host
    ak: _Hex
    endorsement: _Hex
    endorsed_by: tuple[Annotated[str, msgspec.Meta(max_length=512)], ...] = ()
    enrolled: Annotated[str, msgspec.Meta(max_length=40)] = ""
    pcrs: dict[_Bank, dict[_Index, _Values]] = {}
    events: dict[_Bank, dict[_Index, _Events]] = {}
    files: Files | None = None


Table = Mapping[str, Mapping[int, frozenset[bytes]]]


@dataclass(frozen=True, slots=True)
class Reference:
    """What one host may be.

    Attributes:
        host: NAME of its certificate.
        ak: TPMT_PUBLIC of its attestation key.
        endorsement: SHA-256 of its endorsement key's TPMT_PUBLIC, in hexadecimal.
        endorsed_by: who has certified that one; empty for nobody.
        enrolled: when; ISO 8601.
        pcrs: the values that a PCR may have, by bank and index.
        events: the digests that the events of a PCR may have.
        files: what is demanded of measured files; None: nothing.
    """

    host: str
    ak: bytes
    endorsement: str
    endorsed_by: tuple[str, ...] = ()
    enrolled: str = ""
    pcrs: Table = field(default_factory=dict)
    events: Table = field(default_factory=dict)
    files: Files | None = None

    @property
    def selection(self) -> Selection:
        """The PCRs to be quoted.

        Raises:
            ReferenceInvalid: it demands nothing.
        """
        wanted: dict[str, set[int]] = {}
        for table in (self.pcrs, self.events):
            for bank, entries in table.items():
                wanted.setdefault(bank, set()).update(entries)
        if self.files is not None:
            wanted.setdefault(self.files.bank, set()).add(ima.PCR)
        try:
            return Selection.of(wanted)
        except EvidenceMalformed:
            raise ReferenceInvalid(
                f"the reference of {self.host!r} demands no PCR", "write what it has into it: korora attest golden"
            ) from None


def parse(text: str, where: str) -> Reference:
    """Read a file's contents; ``where`` is its name, for messages.

    Raises:
        ReferenceInvalid: it is none.
    """
    remedy = "write it anew: korora attest enrol and golden"
    try:
        document = msgspec.convert(tomllib.loads(text), _Document)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ReferenceInvalid(f"{where}: {error}", remedy) from None
    try:
        Public.parse(bytes.fromhex(document.ak))
    except AttestationError as error:
        raise ReferenceInvalid(f"{where}: ak: {error.told}", remedy) from None
    reference = Reference(
        host=document.host,
        ak=bytes.fromhex(document.ak),
        endorsement=document.endorsement,
        endorsed_by=document.endorsed_by,
        enrolled=document.enrolled,
        pcrs=_table(document.pcrs, where),
        events=_table(document.events, where),
        files=document.files,
    )
    for bank, entries in reference.events.items():
        if both := sorted(set(entries) & set(reference.pcrs.get(bank, {}))):
            raise ReferenceInvalid(f"{where}: PCR {both[0]} of {bank} has values and events", "leave one of them")
    return reference


def _table(entries: Mapping[_Bank, Mapping[str, tuple[str, ...]]], where: str) -> Table:
    table: dict[str, dict[int, frozenset[bytes]]] = {
        bank: {int(index): frozenset(bytes.fromhex(value) for value in values) for index, values in held.items()}
        for bank, held in entries.items()
        if held
    }
    for bank, held in table.items():
        for index, values in held.items():
            if any(len(value) != DIGEST_BYTES[bank] for value in values):
                raise ReferenceInvalid(
                    f"{where}: a value of PCR {index} has not the {DIGEST_BYTES[bank]} bytes of {bank}", "correct it"
                )
    return table


def load(folder: Path, host: str) -> Reference:
    """The reference of a host.

    Raises:
        PlatformUnknown: there is none.
        ReferenceInvalid: there is one, and it cannot be read or is another's.
    """
    path = folder / f"{host}{SUFFIX}"
    try:
        with path.open("rb") as file:
            data = file.read(REFERENCE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise PlatformUnknown(f"{host!r} is not enrolled here: there is no {path}") from None
    except OSError as error:
        raise ReferenceInvalid(f"cannot read {path}: {error.strerror}", "let it be read") from None
    if len(data) > REFERENCE_BYTES_MAX:
        raise ReferenceInvalid(f"{path} is over {REFERENCE_BYTES_MAX} bytes", "list fewer files or events")
    reference = parse(data.decode("utf-8", "replace"), str(path))
    if reference.host != host:
        raise ReferenceInvalid(f"{path} is the reference of {reference.host!r}", "name it after its host")
    return reference


def render(reference: Reference) -> str:
    """A file's contents, as ``parse`` reads them."""
    lines = [
        f"# What {reference.host} may be. Written by korora attest; read at every session with it.",
        f"version = {VERSION}",
        f'host = "{reference.host}"',
        f'ak = "{reference.ak.hex()}"',
        f'endorsement = "{reference.endorsement}"',
        f"endorsed_by = [{', '.join(map(_quoted, reference.endorsed_by))}]",
        f"enrolled = {_quoted(reference.enrolled)}",
    ]
    for name, table in (("pcrs", reference.pcrs), ("events", reference.events)):
        for bank, held in table.items():
            lines += ["", f"[{name}.{bank}]"]
            for index in sorted(held):
                lines.append(f"{index} = [{', '.join(_quoted(value.hex()) for value in sorted(held[index]))}]")
    if reference.files is not None:
        lines += ["", "[files]", f'bank = "{reference.files.bank}"']
        if reference.files.allow is not None:
            lines.append(f"allow = [{', '.join(map(_quoted, reference.files.allow))}]")
        lines.append(f"violations = {str(reference.files.violations).lower()}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in text) + '"'


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What a host has proved.

    Attributes:
        host: its name.
        ak_name: of the key that has signed, in hexadecimal.
        quoted: the PCRs and the TPM's clock.
        hpke_public: a key that its TPM has vouched for in this session; empty for none.
        files: how many measured files were checked.
    """

    host: str
    ak_name: str
    quoted: Quoted
    hpke_public: bytes
    files: int = 0

    @property
    def proved(self) -> str:
        """In one line, for records: which key, over which PCRs."""
        pcrs = " ".join(f"{bank}:{','.join(map(str, sorted(held)))}" for bank, held in self.quoted.pcrs.items())
        return f"tpm2 ak {self.ak_name} pcrs {pcrs}" + (f" files {self.files}" if self.files else "")


def appraise(evidence: Evidence, *, expected: Reference, binding: Binding, earlier: Clock | None = None) -> Appraisal:
    """Judge what a host shows.

    Args:
        evidence: it.
        expected: of that host.
        binding: what the quote had to be made for; the key that comes with the evidence is put in here.
        earlier: the TPM's clock when it was last seen.

    Raises:
        AttestationMissing: it shows nothing.
        PlatformUnknown: its key was not enrolled.
        EvidenceMalformed, QuoteInvalid: it proves nothing.
        PlatformChanged: it is not what it may be; ``told`` has the PCR, the value expected and the value seen.
        ReferenceInvalid: nothing is demanded of it.
    """
    if evidence.backend == "none":
        raise AttestationMissing(f"{expected.host!r} has nothing to attest with")
    if evidence.ak_public != expected.ak:
        seen = Public.parse(evidence.ak_public).name.hex()
        raise PlatformUnknown(
            f"{expected.host!r} has attested by the key {seen}; enrolled is {Public.parse(expected.ak).name.hex()}"
        )
    quoted = verify_quote(
        evidence.quote,
        evidence.signature,
        evidence.ak_public,
        qualifying=replace(binding, hpke_public=evidence.hpke_public).qualifying(),
        selection=expected.selection,
        pcrs={bank: dict(held) for bank, held in evidence.pcrs.items()},
    )
    if earlier is not None:
        check_clock(earlier, quoted.clock)
    _check_values(expected, quoted)
    if expected.events:
        _check_events(expected, quoted, evidence.event_log)
    files = _check_files(expected, quoted, evidence.ima) if expected.files is not None else 0
    return Appraisal(expected.host, quoted.name.hex(), quoted, evidence.hpke_public, files)


def _check_values(expected: Reference, quoted: Quoted) -> None:
    wrong = [
        f"PCR {index} of {bank}: expected {' or '.join(value.hex() for value in sorted(values))}, "
        f"seen {quoted.pcrs[bank][index].hex()}"
        for bank, held in expected.pcrs.items()
        for index, values in sorted(held.items())
        if quoted.pcrs[bank][index] not in values
    ]
    if wrong:
        raise PlatformChanged(f"{expected.host!r} is not what it was: {'; '.join(wrong[:PCR_COUNT])}")


def _check_events(expected: Reference, quoted: Quoted, log: bytes) -> None:
    if not log:
        raise AttestationMissing(f"{expected.host!r} shows no firmware log, and its events are demanded")
    events = eventlog.parse(log)
    for bank, held in expected.events.items():
        replayed = eventlog.replay(events, bank)
        for index, allowed in sorted(held.items()):
            led = replayed.get(index, bytes(DIGEST_BYTES[bank]))
            if led != quoted.pcrs[bank][index]:
                raise PlatformChanged(
                    f"{expected.host!r}: its firmware's log leads PCR {index} of {bank} to {led.hex()}, seen "
                    f"{quoted.pcrs[bank][index].hex()}"
                )
            for number, event in enumerate(events):
                if event.pcr == index and event.kind != eventlog.EV_NO_ACTION and event.digests[bank] not in allowed:
                    raise PlatformChanged(
                        f"{expected.host!r}: event {number} of its firmware's log, in PCR {index}, of type "
                        f"{event.kind:#010x}: {event.digests[bank].hex()} is none of those expected"
                    )


def _check_files(expected: Reference, quoted: Quoted, listed: bytes) -> int:
    files = expected.files or Files()
    if not listed:
        raise AttestationMissing(f"{expected.host!r} shows no list of measured files, and it is demanded")
    seen = quoted.pcrs[files.bank][ima.PCR]
    entries = ima.covered(ima.parse(listed), files.bank, seen)
    if entries is None:
        raise PlatformChanged(
            f"{expected.host!r}: its list of measured files does not lead to PCR {ima.PCR} of {files.bank}, seen "
            f"{seen.hex()}"
        )
    allowed = None if files.allow is None else frozenset(files.allow)
    for entry in entries:
        path = entry.path.decode("utf-8", "backslashreplace")[:256]
        if entry.violation:
            if not files.violations:
                raise PlatformChanged(f"{expected.host!r}: {path} was open to writing while it was measured")
        elif allowed is not None and entry.label not in allowed:
            raise PlatformChanged(f"{expected.host!r}: measured {path} is {entry.label}, which is not allowed")
    return len(entries)

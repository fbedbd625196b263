"""How a host is enrolled: its attestation key is bound to its TPM, and what it is now becomes what it may be.

Three files cross between the two hosts, or none where one command reaches both:

    attested host                                   host that judges
      request   (korora attest show --request)   ─▶  korora attest challenge
      korora attest answer                       ◀─  challenge
      answer                                     ─▶  korora attest enrol

An answer proves that the TPM has opened the challenge, and quotes its PCRs for it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec
from cryptography import x509

from crypto.attestation import eventlog, evidence, ima, reference
from crypto.attestation.endorsement import Challenge, challenge, check_answer, check_certificate
from crypto.attestation.evidence import Evidence
from crypto.attestation.limits import EVIDENCE_BYTES_MAX
from crypto.attestation.quote import Quoted, verify_quote
from crypto.attestation.reference import Files, Reference
from crypto.attestation.structures import Public, Selection
from crypto.errors import AttestationError, EnrolmentFailed, EvidenceMalformed, ReferenceInvalid
from korora.agents.vtpm.tcti import Shown, Tpm

PCRS_DEFAULT: Final = "sha256:0,1,2,3,4,5,6,7"
"""What firmware measures of itself, its settings, the boot loader and secure boot (TCG PC Client PFP §3.3.4)."""
PENDING: Final = ".pending"
_TAG: Final = b"korora-enrol-v1"
_ROOTS_MAX: Final = 4096  # files of manufacturers' certificates

_T = TypeVar("_T")
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})*\Z", max_length=4 * EVIDENCE_BYTES_MAX)]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a host shows to be enrolled by."""

    ak: _Hex
    endorsement: _Hex
    certificate: _Hex = ""


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it is asked: to open ``blob`` by ``seed``, and to quote ``pcrs`` for what it finds."""

    blob: _Hex
    seed: _Hex
    pcrs: str


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it has found, and the quote for it."""

    secret: _Hex
    evidence: _Hex


class Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the judging host keeps meanwhile: nobody else may read it."""

    request: Request
    secret: _Hex
    pcrs: str
    endorsed_by: tuple[str, ...] = ()


def selection_of(text: str) -> Selection:
    """``sha256:0,1,7+sha1:0``, as tpm2-tools write it.

    Raises:
        ReferenceInvalid: it is none.
    """
    banks: dict[str, list[int]] = {}
    try:
        for part in text.split("+"):
            bank, _, indices = part.partition(":")
            banks.setdefault(bank, []).extend(int(index) for index in indices.split(","))
        return Selection.of(banks)
    except (ValueError, EvidenceMalformed):
        raise ReferenceInvalid(f"{text!r} names no PCRs", f"write them like {PCRS_DEFAULT}") from None


def read(path: Path, kind: type[_T]) -> _T:
    """One of the files that cross.

    Raises:
        EnrolmentFailed: it cannot be read, or is none.
    """
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data, type=kind)
    except OSError as error:
        raise EnrolmentFailed(f"cannot read {path}: {error.strerror}", "see that it was copied here") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EnrolmentFailed(
            f"{path} is no {kind.__name__.lower()} of an enrolment: {error}", "copy it anew"
        ) from None


def write(path: Path, what: object, mode: int = 0o644) -> None:
    """The same, written; with no more than ``mode``.

    Raises:
        ReferenceInvalid: it cannot be written.
    """
    put(path, json.dumps(msgspec.to_builtins(what), indent=1).encode() + b"\n", mode)


def put(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file as a whole: a session may read it meanwhile.

    Raises:
        ReferenceInvalid: it cannot be written.
    """
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise ReferenceInvalid(f"cannot write {path}: {error.strerror}", "let this user write there") from None


# ---------------------------------------------------------------- the host that is enrolled


def request(tpm: Tpm) -> Request:
    """What it shows.

    Raises:
        TpmUnusable: the TPM does not answer.
    """
    shown: Shown = tpm.show()
    return Request(shown.ak.hex(), shown.endorsement.hex(), shown.certificate.hex())


def answer(tpm: Tpm, asked: Asked) -> Answer:
    """Open the challenge, and quote for it.

    Raises:
        TpmUnusable: it is not for this TPM, or that does not answer.
    """
    secret = tpm.answer(bytes.fromhex(asked.blob), bytes.fromhex(asked.seed))
    shown = tpm.attest(_qualifying(secret), selection_of(asked.pcrs), event_log=True, ima=True)
    return Answer(secret.hex(), evidence.encode(shown).hex())


def _qualifying(secret: bytes) -> bytes:
    return hashlib.sha256(_TAG + secret).digest()


# ---------------------------------------------------------------- the host that judges


def ask(shown: Request, pcrs: str, roots: Sequence[x509.Certificate] | None, now: datetime) -> tuple[Asked, Pending]:
    """A challenge, and what is kept until it is answered.

    Args:
        shown: by the host.
        pcrs: which it is to quote.
        roots: manufacturers' certificates that one of must lead to its endorsement key; None: nobody is asked.
        now: for their validity.

    Raises:
        EnrolmentFailed: its keys are not such, or not certified.
    """
    selection_of(pcrs)
    try:
        endorsement, attestation = (Public.parse(bytes.fromhex(each)) for each in (shown.endorsement, shown.ak))
    except AttestationError as error:
        raise EnrolmentFailed(error.told, "read what the host shows again: korora attest show") from None
    endorsed_by: tuple[str, ...] = ()
    if roots is not None:
        endorsed_by = check_certificate(endorsement, bytes.fromhex(shown.certificate), roots, now)
    made: Challenge = challenge(endorsement, attestation)
    asked = Asked(made.blob.hex(), made.seed.hex(), pcrs)
    return asked, Pending(shown, made.secret.hex(), pcrs, endorsed_by)


def conclude(host: str, pending: Pending, answered: Answer, now: datetime) -> Reference:
    """The answer is right: what the host is from now on held to.

    Raises:
        EnrolmentFailed: it is not.
    """
    secret = bytes.fromhex(pending.secret)
    check_answer(secret, bytes.fromhex(answered.secret))
    ak = bytes.fromhex(pending.request.ak)
    try:
        shown = evidence.decode(bytes.fromhex(answered.evidence))
        quoted = _quoted(shown, ak, _qualifying(secret), selection_of(pending.pcrs))
    except AttestationError as error:
        raise EnrolmentFailed(f"{host!r}: {error.told}", "let it answer the challenge again") from None
    return Reference(
        host=host,
        ak=ak,
        endorsement=hashlib.sha256(bytes.fromhex(pending.request.endorsement)).hexdigest(),
        endorsed_by=pending.endorsed_by,
        enrolled=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        pcrs={bank: {index: frozenset({value}) for index, value in held.items()} for bank, held in quoted.pcrs.items()},
    )


def _quoted(shown: Evidence, ak: bytes, qualifying: bytes, selection: Selection) -> Quoted:
    pcrs: dict[str, dict[int, bytes]] = {bank: dict(held) for bank, held in shown.pcrs.items()}
    return verify_quote(shown.quote, shown.signature, ak, qualifying=qualifying, selection=selection, pcrs=pcrs)


def golden(shown: Evidence, *, events: bool, files: bool) -> Reference:
    """What a host is now, as a part of a reference: values, or its events and files one by one.

    Args:
        shown: by it.
        events: whether PCRs that its firmware's log leads to are held to the log's events instead of to values.
        files: whether measured files are held to those on its list; PCR 10 has to be among the PCRs.

    Raises:
        EvidenceMalformed: a log is none.
        EnrolmentFailed: a log is not there.
    """
    pcrs = {bank: {index: frozenset({value}) for index, value in held.items()} for bank, held in shown.pcrs.items()}
    allowed: dict[str, dict[int, frozenset[bytes]]] = {}
    if events:
        if not shown.event_log:
            raise EnrolmentFailed("there is no firmware log", "leave --events out, or let it be read")
        log = eventlog.parse(shown.event_log)
        for bank, held in pcrs.items():
            for index, value in eventlog.replay(log, bank).items():
                if index in held and held[index] == frozenset({value}):
                    del held[index]
                    known = (each for each in log if each.pcr == index and each.kind != eventlog.EV_NO_ACTION)
                    allowed.setdefault(bank, {})[index] = frozenset(each.digests[bank] for each in known)
    listed = None
    if files:
        banks = [bank for bank, held in pcrs.items() if ima.PCR in held]
        if not banks or not shown.ima:
            raise EnrolmentFailed("there is no list of measured files, or PCR 10 is not asked for", "leave --files out")
        del pcrs[banks[0]][ima.PCR]
        labels = {entry.label for entry in ima.parse(shown.ima) if not entry.violation}
        listed = Files(bank=banks[0], allow=tuple(sorted(labels)))
    return Reference("", b"", "", pcrs={b: h for b, h in pcrs.items() if h}, events=allowed, files=listed)


def tables(part: Reference) -> str:
    """What of a reference is about values, events and files: the rest of its file stays as it is."""
    text = reference.render(part)
    return text[text.index("\n\n") + 2 :] if "\n\n" in text else ""


def certificates(folder: Path) -> tuple[x509.Certificate, ...]:
    """Manufacturers' certificates, in PEM or DER.

    Raises:
        EnrolmentFailed: one of the files is none, or there is none.
    """
    found: list[x509.Certificate] = []
    try:
        for path in sorted(folder.iterdir())[:_ROOTS_MAX]:
            data = path.read_bytes()
            try:
                if b"-----BEGIN" in data:
                    found += x509.load_pem_x509_certificates(data)
                else:
                    found.append(x509.load_der_x509_certificate(data))
            except ValueError as error:
                raise EnrolmentFailed(f"{path} is no certificate: {error}", "take it out of that folder") from None
    except OSError as error:
        raise EnrolmentFailed(f"cannot read {folder}: {error.strerror}", "name the right folder") from None
    if not found:
        raise EnrolmentFailed(f"there is no certificate in {folder}", "put the manufacturers' there")
    return tuple(found)

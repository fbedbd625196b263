"""This host's TPM 2.0, hardware or swtpm, through its TCTI and tpm2-pytss; the only place that meets a TPM.

The attestation key is a primary key of the endorsement hierarchy, by the fixed template below: the TPM derives it from
its own seed whenever it is asked, so there is nothing to keep. Where deriving is slow, enrolment may leave it at
``AK_HANDLE``. A key of that hierarchy sees the TPM's true counts of resets (TPM 2.0 Library, Part 1 §36.7).
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crypto.attestation.evidence import Evidence
from crypto.attestation.limits import CERTIFICATE_BYTES_MAX, EVENT_LOG_BYTES_MAX, IMA_BYTES_MAX
from crypto.attestation.structures import Alg, Attributes, Curve, Public, Quote, Selection, sized
from crypto.errors import AttestationError, TpmUnusable

AK_HANDLE: Final = 0x81010A4B  # of the range that is the owner's to give (TCG Registry of reserved handles)
EVENT_LOG: Final = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
IMA_LIST: Final = Path("/sys/kernel/security/ima/binary_runtime_measurements")
TURN_SECONDS_MAX: Final = (
    8.0  # for those before us: a handshake may take 10, and a TPM that hangs shall hold one thread
)
_QUOTE_TRIES_MAX: Final = 5  # a PCR may be extended between reading it and quoting it
_PCRS_A_READ: Final = 8  # TPM2_PCR_Read returns no more digests at once
_NV_CHUNK_BYTES: Final = 512
_CERTIFICATES: Final = {Alg.RSA: 0x01C00002, Alg.ECC: 0x01C0000A}  # TCG EK Credential Profile §2.2.1.4
_KEY: Final = Attributes.FIXED_TPM | Attributes.FIXED_PARENT | Attributes.SENSITIVE_DATA_ORIGIN | Attributes.RESTRICTED
_UNIQUE: Final = hashlib.sha256(b"korora attestation key v1").digest()
_NONE: Final = int(Alg.NULL).to_bytes(2, "big")


def _words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(2, "big") for number in numbers)


def _head(kind: Alg, attributes: Attributes, policy: bytes) -> bytes:
    return _words(kind, Alg.SHA256) + int(attributes).to_bytes(4, "big") + sized(policy)


# PolicySecret of the endorsement hierarchy (TCG EK Credential Profile B.6.2)
_POLICY_A: Final = bytes.fromhex("837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa")
_EK: Final = _KEY | Attributes.ADMIN_WITH_POLICY | Attributes.DECRYPT
_AES: Final = _words(Alg.AES, 128, Alg.CFB)
_TEMPLATES: Final = {
    # L-1 and L-2 of the same (B.3.3, B.3.4)
    Alg.RSA: _head(Alg.RSA, _EK, _POLICY_A) + _AES + _NONE + _words(2048) + bytes(4) + sized(bytes(256)),
    Alg.ECC: _head(Alg.ECC, _EK, _POLICY_A) + _AES + _NONE + _words(Curve.P256, Alg.NULL) + sized(bytes(32)) * 2,
}
_AK_TEMPLATE: Final = (
    _head(Alg.ECC, _KEY | Attributes.USER_WITH_AUTH | Attributes.SIGN, b"")
    + _NONE
    + _words(Alg.ECDSA, Alg.SHA256, Curve.P256, Alg.NULL)
    + sized(_UNIQUE)
    + sized(bytes(32))
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a host shows to be enrolled by: TPMT_PUBLIC of both keys, and the endorsement key's certificate or b""."""

    ak: bytes
    endorsement: bytes
    certificate: bytes


def _refused(what: str, error: Exception) -> TpmUnusable:
    words = " ".join(str(error).split())
    return TpmUnusable(f"the TPM does not {what}: {words}", "see that it runs and that nothing else holds it")


class Tpm:
    """An attester by a TPM. Each call opens it, cleans up and closes it: a swtpm serves one client at a time.

    Args:
        tcti: ``device:/dev/tpmrm0``, ``swtpm:host=127.0.0.1,port=2321``, or what else tpm2-tss knows.
        event_log: where the firmware's log is.
        ima: where the kernel's list of measured files is.
    """

    def __init__(self, tcti: str, *, event_log: Path = EVENT_LOG, ima: Path = IMA_LIST) -> None:
        self._tcti, self._event_log, self._ima = tcti, event_log, ima
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Load the bindings now, so that the first session does not wait for it.

        Raises:
            TpmUnusable: they are not installed.
        """
        os.environ.setdefault("TSS2_LOG", "all+none")  # its libraries write to standard error by themselves
        try:
            import tpm2_pytss.ESAPI  # noqa: F401 - only whether it is there
        except ImportError as error:
            raise TpmUnusable(
                f"the bindings to TPMs are not installed: {error}", "install korora[tpm], and libtss2 with it"
            ) from None

    @contextmanager
    def _open(self) -> Iterator[Any]:
        self.prepare()
        from tpm2_pytss.ESAPI import ESAPI
        from tpm2_pytss.TSS2_Exception import TSS2_Exception

        if not self._lock.acquire(timeout=TURN_SECONDS_MAX):
            raise TpmUnusable(
                f"the TPM at {self._tcti!r} has not answered another session",
                "see that it runs and nobody else holds it",
            )
        with ExitStack() as stack:
            stack.callback(self._lock.release)
            try:
                tpm = ESAPI(self._tcti)
            except (TSS2_Exception, RuntimeError, ValueError) as error:
                raise _refused(f"answer at {self._tcti!r}", error) from None
            stack.callback(tpm.close)
            try:
                yield tpm
            except (TSS2_Exception, ValueError) as error:
                raise _refused("do what was asked", error) from None

    def attest(
        self,
        qualifying: bytes,
        selection: Selection,
        *,
        event_log: bool = False,
        ima: bool = False,
        hpke_public: bytes = b"",
    ) -> Evidence:
        """See ``Attester.attest``."""
        with self._open() as tpm, _attestation_key(tpm) as (handle, public):
            for _ in range(_QUOTE_TRIES_MAX):
                pcrs = _read_pcrs(tpm, selection)
                signed, signature = tpm.quote(handle, _tpm_selection(selection), qualifying)
                quote = bytes(signed)
                if Quote.parse(quote).digest == selection.digest(pcrs, "sha256"):
                    break
            else:
                raise TpmUnusable("its PCRs change faster than they are read", "quote others, without PCR 10")
        return Evidence(
            backend="tpm2",
            ak_public=public,
            quote=quote,
            signature=signature.marshal(),
            pcrs=pcrs,  # type: ignore[arg-type]  # names of banks, as the selection has them
            event_log=_log(self._event_log, EVENT_LOG_BYTES_MAX) if event_log else b"",
            ima=_log(self._ima, IMA_BYTES_MAX) if ima else b"",
            hpke_public=hpke_public,
        )

    def show(self) -> Shown:
        """What to enrol this host by.

        Raises:
            TpmUnusable: the TPM does not answer, or refuses.
        """
        with self._open() as tpm:
            with _attestation_key(tpm) as (_, ak):
                pass
            kind, certificate = _endorsement(tpm)
            with _primary(tpm, _TEMPLATES[kind]) as (_, endorsement):
                return Shown(ak, endorsement, certificate)

    def answer(self, blob: bytes, seed: bytes) -> bytes:
        """Open a challenge of enrolment (TPM2_ActivateCredential).

        Raises:
            TpmUnusable: it is not for the keys of this TPM, or the TPM does not answer.
        """
        from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE
        from tpm2_pytss.types import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT, TPMT_SYM_DEF

        with self._open() as tpm:
            kind, _ = _endorsement(tpm)
            with _primary(tpm, _TEMPLATES[kind]) as (endorsement, _), _attestation_key(tpm) as (handle, _):
                session = tpm.start_auth_session(
                    ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL), TPM2_ALG.SHA256
                )
                try:
                    tpm.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
                    secret = tpm.activate_credential(
                        handle,
                        endorsement,
                        TPM2B_ID_OBJECT(credential=blob),
                        TPM2B_ENCRYPTED_SECRET(secret=seed),
                        session2=session,
                    )
                finally:
                    with suppress(Exception):  # a session that was used up is gone already
                        tpm.flush_context(session)
                return bytes(secret)

    def keep(self) -> None:
        """Leave the attestation key at ``AK_HANDLE``, where deriving it is slow.

        Raises:
            TpmUnusable: the owner has a password, or the TPM does not answer.
        """
        from tpm2_pytss.constants import ESYS_TR

        with self._open() as tpm, _primary(tpm, _AK_TEMPLATE) as (handle, public):
            if _kept(tpm) != public:
                tpm.evict_control(ESYS_TR.OWNER, handle, AK_HANDLE)

    def extend(self, index: int, digest: bytes) -> None:
        """Extend a PCR of the SHA-256 bank; for rehearsals.

        Raises:
            TpmUnusable: the TPM does not answer, or refuses.
        """
        from tpm2_pytss.types import TPML_DIGEST_VALUES

        with self._open() as tpm:
            values, _ = TPML_DIGEST_VALUES.unmarshal((1).to_bytes(4, "big") + _words(Alg.SHA256) + digest)
            tpm.pcr_extend(_pcr(index), values)


def _pcr(index: int) -> Any:
    from tpm2_pytss.constants import ESYS_TR

    return ESYS_TR(index)


def _log(path: Path, limit: int) -> bytes:
    """A log of the kernel's; empty where there is none: who demands it says so."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise TpmUnusable(f"cannot read {path}: {error.strerror}", "let the relay read it") from None
    if len(data) > limit:
        raise TpmUnusable(f"{path} has over {limit} bytes", "measure less, or do not demand this log")
    return data


def _tpm_selection(selection: Selection) -> Any:
    from tpm2_pytss.types import TPML_PCR_SELECTION

    return TPML_PCR_SELECTION.unmarshal(selection.encode())[0]


def _read_pcrs(tpm: Any, selection: Selection) -> dict[str, dict[int, bytes]]:
    values: dict[str, dict[int, bytes]] = {}
    for bank, indices in selection.banks:
        for at in range(0, len(indices), _PCRS_A_READ):
            some = indices[at : at + _PCRS_A_READ]
            _, answered, digests = tpm.pcr_read(_tpm_selection(Selection(((bank, some),))))
            if Selection(((bank, some),)).encode() != answered.marshal() or len(digests) != len(some):
                raise TpmUnusable(f"the TPM has no bank {bank}", "demand the PCRs of another bank: sha256")
            values.setdefault(bank, {}).update(zip(some, (bytes(digest) for digest in digests), strict=True))
    return values


@contextmanager
def _primary(tpm: Any, template: bytes) -> Iterator[tuple[Any, bytes]]:
    """A primary key of the endorsement hierarchy, and its TPMT_PUBLIC; flushed afterwards."""
    from tpm2_pytss.constants import ESYS_TR
    from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE

    wanted, _ = TPM2B_PUBLIC.unmarshal(sized(template))
    handle, public, *_ = tpm.create_primary(TPM2B_SENSITIVE_CREATE(), wanted, ESYS_TR.ENDORSEMENT)
    try:
        yield handle, public.publicArea.marshal()
    finally:
        tpm.flush_context(handle)


@contextmanager
def _attestation_key(tpm: Any) -> Iterator[tuple[Any, bytes]]:
    """The attestation key: where it was left, or derived anew."""
    public = _kept(tpm)
    if public is None:
        with _primary(tpm, _AK_TEMPLATE) as key:
            yield key
        return
    handle = tpm.tr_from_tpmpublic(AK_HANDLE)
    try:
        yield handle, public
    finally:
        tpm.tr_close(handle)


def _handles(tpm: Any, first: int) -> Mapping[int, None]:
    """Whether there is something at that handle: the TPM is asked for handles from there on."""
    from tpm2_pytss.constants import TPM2_CAP

    _, found = tpm.get_capability(TPM2_CAP.HANDLES, first, 1)
    return dict.fromkeys(int(handle) for handle in found.data.handles)


def _kept(tpm: Any) -> bytes | None:
    """TPMT_PUBLIC of our key at ``AK_HANDLE``; None where none of ours is there."""
    if AK_HANDLE not in _handles(tpm, AK_HANDLE):
        return None
    handle = tpm.tr_from_tpmpublic(AK_HANDLE)
    try:
        public, _, _ = tpm.read_public(handle)
    finally:
        tpm.tr_close(handle)
    found = bytes(public.publicArea.marshal())
    try:
        ours = Public.parse(found).raw[: -2 * len(sized(bytes(32)))] == _AK_TEMPLATE[: -2 * len(sized(bytes(32)))]
    except AttestationError:
        return None
    return found if ours else None


def _endorsement(tpm: Any) -> tuple[Alg, bytes]:
    """Which endorsement key is certified, and its certificate; without any the ECC key, which is derived sooner."""
    from tpm2_pytss.constants import ESYS_TR

    for kind, index in _CERTIFICATES.items():
        if index not in _handles(tpm, index):
            continue
        handle = tpm.tr_from_tpmpublic(index)
        try:
            public, _ = tpm.nv_read_public(handle)
            size = min(int(public.nvPublic.dataSize), CERTIFICATE_BYTES_MAX)
            parts = [
                bytes(tpm.nv_read(handle, min(_NV_CHUNK_BYTES, size - at), at, ESYS_TR.OWNER))
                for at in range(0, size, _NV_CHUNK_BYTES)
            ]
        finally:
            tpm.tr_close(handle)
        return kind, b"".join(parts)
    return Alg.ECC, b""

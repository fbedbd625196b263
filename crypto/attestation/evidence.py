"""All that a host shows of its platform, as one message. Made by an ``Attester``, judged by ``reference.appraise``."""

from typing import Annotated, Final, Literal, Protocol

import msgspec

from crypto.attestation.limits import (
    DIGEST_BYTES_MAX,
    EVENT_LOG_BYTES_MAX,
    EVIDENCE_BYTES_MAX,
    IMA_BYTES_MAX,
    PCR_BANKS_MAX,
    PCR_COUNT,
    STRUCTURE_BYTES_MAX,
)
from crypto.attestation.structures import Selection
from crypto.errors import EvidenceMalformed

_Structure = Annotated[bytes, msgspec.Meta(max_length=STRUCTURE_BYTES_MAX)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=PCR_COUNT)]
_Digest = Annotated[bytes, msgspec.Meta(min_length=20, max_length=DIGEST_BYTES_MAX)]
_Bank = Literal["sha1", "sha256", "sha384", "sha512"]
_Values = Annotated[dict[_Index, _Digest], msgspec.Meta(min_length=1, max_length=PCR_COUNT)]


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host shows.

    Attributes:
        backend: ``tpm2``, or ``none`` of a host that has nothing to show.
        ak_public: TPMT_PUBLIC of its attestation key.
        quote: TPMS_ATTEST.
        signature: TPMT_SIGNATURE over it.
        pcrs: the values quoted, by bank and index.
        event_log: the firmware's, as it wrote it; empty where it was not asked for, or is not there.
        ima: the kernel's binary list of measured files; the same.
        hpke_public: the key that a vTPM's state is to be wrapped to; empty where none is to come.
    """

    backend: Literal["tpm2", "none"]
    ak_public: _Structure = b""
    quote: _Structure = b""
    signature: _Structure = b""
    pcrs: Annotated[dict[_Bank, _Values], msgspec.Meta(max_length=PCR_BANKS_MAX)] = {}
    event_log: Annotated[bytes, msgspec.Meta(max_length=EVENT_LOG_BYTES_MAX)] = b""
    ima: Annotated[bytes, msgspec.Meta(max_length=IMA_BYTES_MAX)] = b""
    hpke_public: Annotated[bytes, msgspec.Meta(max_length=4096)] = b""


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Evidence)


def encode(evidence: Evidence) -> bytes:
    """Its bytes (MessagePack)."""
    return _ENCODER.encode(evidence)


def decode(data: bytes) -> Evidence:
    """Read evidence.

    Raises:
        EvidenceMalformed: it is none, or a part of it is out of bounds.
    """
    if len(data) > EVIDENCE_BYTES_MAX:
        raise EvidenceMalformed(f"evidence of {len(data)} bytes, {EVIDENCE_BYTES_MAX} allowed")
    try:
        return _DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EvidenceMalformed(f"evidence that is none: {error}") from None


class Attester(Protocol):
    """Shows what this host is."""

    def attest(
        self,
        qualifying: bytes,
        selection: Selection,
        *,
        event_log: bool = False,
        ima: bool = False,
        hpke_public: bytes = b"",
    ) -> Evidence:
        """Evidence, now; may take some time: not for an event loop.

        Args:
            qualifying: what the quote is made for (``Binding.qualifying``), 32 bytes.
            selection: which PCRs.
            event_log: whether the firmware's log is wanted, too.
            ima: whether the kernel's list is.
            hpke_public: goes along; ``qualifying`` has its digest.

        Raises:
            TpmUnusable: the TPM does not answer, or refuses.
        """


class NoAttester:
    """For a host without a TPM: it says so, and whoever requires more refuses."""

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
        return Evidence("none", hpke_public=hpke_public)

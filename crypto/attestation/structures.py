"""What a TPM 2.0 says and signs, read strictly: every length within bounds, and no byte too many.

Names and layouts are those of the TPM 2.0 Library, Part 2 (Structures), revision 1.59. All numbers are big-endian. Only
what attestation needs is known here: a structure with anything else in it is refused, not skipped.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag, unique
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from crypto.attestation.limits import DIGEST_BYTES_MAX, PCR_BANKS_MAX, PCR_COUNT, STRUCTURE_BYTES_MAX
from crypto.errors import EvidenceMalformed

GENERATED: Final = 0xFF544347  # TPM_GENERATED_VALUE (§6.2): a TPM signs nothing with it that it has not made itself
ST_ATTEST_QUOTE: Final = 0x8018  # TPM_ST (§6.9)


@unique
class Alg(IntEnum):
    """TPM_ALG_ID (§6.3), as far as attestation goes."""

    RSA = 0x0001
    SHA1 = 0x0004
    AES = 0x0006
    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D
    NULL = 0x0010
    RSASSA = 0x0014
    RSAPSS = 0x0016
    ECDSA = 0x0018
    ECC = 0x0023
    CFB = 0x0043


@unique
class Curve(IntEnum):
    """TPM_ECC_CURVE (§6.4)."""

    P256 = 0x0003
    P384 = 0x0004
    P521 = 0x0005


class Attributes(IntFlag):
    """TPMA_OBJECT (§8.3)."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    ENCRYPTED_DUPLICATION = 1 << 11
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


BANKS: Final[Mapping[str, Alg]] = {"sha1": Alg.SHA1, "sha256": Alg.SHA256, "sha384": Alg.SHA384, "sha512": Alg.SHA512}
BANK_NAMES: Final[Mapping[int, str]] = {int(alg): name for name, alg in BANKS.items()}
DIGEST_BYTES: Final[Mapping[str, int]] = {name: hashlib.new(name, usedforsecurity=False).digest_size for name in BANKS}

_CURVES: Final[Mapping[Curve, type[ec.EllipticCurve]]] = {
    Curve.P256: ec.SECP256R1,
    Curve.P384: ec.SECP384R1,
    Curve.P521: ec.SECP521R1,
}
_HASHES: Final[Mapping[str, type[hashes.HashAlgorithm]]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}


class Reader:
    """Takes numbers and bytes off the front; what is not there, or left over, is an error.

    Args:
        data: the whole structure.
        what: its name, for messages.
        limit: bytes it may have at most.

    Raises:
        EvidenceMalformed: by every method, too: it is longer, shorter, or has a part out of bounds.
    """

    def __init__(self, data: bytes, what: str, limit: int = STRUCTURE_BYTES_MAX) -> None:
        self._data, self._at, self.what = data, 0, what
        if len(data) > limit:
            raise EvidenceMalformed(f"{what} of {len(data)} bytes, {limit} allowed")

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self._at + count
        if count < 0 or end > len(self._data):
            raise EvidenceMalformed(f"{self.what} ends within a field: {count} bytes wanted at {self._at}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def u8(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """The next two bytes, a number."""
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        """The next four bytes, a number."""
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        """The next eight bytes, a number."""
        return int.from_bytes(self.take(8), "big")

    def sized(self, limit: int) -> bytes:
        """A TPM2B: two bytes of length, and as many bytes; at most ``limit``."""
        size = self.u16()
        if size > limit:
            raise EvidenceMalformed(f"{self.what} has a field of {size} bytes, {limit} allowed")
        return self.take(size)

    def refuse(self, why: str) -> EvidenceMalformed:
        """The error for a value that cannot be right."""
        return EvidenceMalformed(f"{self.what}: {why}")

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return self._at == len(self._data)

    def end(self) -> None:
        """Nothing is left."""
        if not self.done:
            raise EvidenceMalformed(f"{self.what} has {len(self._data) - self._at} bytes too many")


def sized(data: bytes) -> bytes:
    """A TPM2B around ``data``."""
    return struct.pack(">H", len(data)) + data


def hash_named(reader: Reader, alg: int) -> str:
    """The name of a hash that signatures and names may be of: SHA-256 and longer."""
    name = BANK_NAMES.get(alg, "")
    if name not in _HASHES:
        raise reader.refuse(f"hash algorithm {alg:#06x} is not accepted")
    return name


def hash_of(name: str) -> hashes.HashAlgorithm:
    """That of ``sha256``, ``sha384`` or ``sha512``."""
    return _HASHES[name]()


# ---------------------------------------------------------------- PCRs


@dataclass(frozen=True, slots=True)
class Selection:
    """Which PCRs: TPML_PCR_SELECTION (§10.9.7), in the one spelling that is sent and accepted.

    Attributes:
        banks: name of the bank and the PCRs' indices, ascending; no bank twice, none without a PCR.
    """

    banks: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, banks: Mapping[str, Iterable[int]]) -> "Selection":
        """The selection of these PCRs.

        Raises:
            EvidenceMalformed: there is no such bank or PCR, or none at all.
        """
        selection = cls(tuple((bank, tuple(sorted(set(banks[bank])))) for bank in BANKS if banks.get(bank)))
        if not selection.banks or set(banks) - {bank for bank, _ in selection.banks}:
            raise EvidenceMalformed("a selection of no PCR, or of an unknown bank")
        if any(not 0 <= index < PCR_COUNT for _, indices in selection.banks for index in indices):
            raise EvidenceMalformed(f"a selection of a PCR that is none of 0 to {PCR_COUNT - 1}")
        return selection

    @classmethod
    def read(cls, reader: Reader) -> "Selection":
        """Take one off the front of ``reader``.

        Raises:
            EvidenceMalformed: it is none, or in another spelling.
        """
        count = reader.u32()
        if not 1 <= count <= PCR_BANKS_MAX:
            raise reader.refuse(f"{count} PCR banks")
        banks: list[tuple[str, tuple[int, ...]]] = []
        for _ in range(count):
            name = BANK_NAMES.get(reader.u16())
            if name is None or any(name == known for known, _ in banks):
                raise reader.refuse("an unknown PCR bank, or one twice")
            if reader.u8() != PCR_COUNT // 8:
                raise reader.refuse("a PCR bitmap that is not of 24 bits")
            bitmap = int.from_bytes(reader.take(PCR_COUNT // 8), "little")
            indices = tuple(index for index in range(PCR_COUNT) if bitmap >> index & 1)
            if not indices:
                raise reader.refuse(f"no PCR of bank {name}")
            banks.append((name, indices))
        return cls(tuple(banks))

    def encode(self) -> bytes:
        """Its bytes."""
        parts = [struct.pack(">I", len(self.banks))]
        for name, indices in self.banks:
            bitmap = sum(2**index for index in indices)
            parts.append(struct.pack(">HB", BANKS[name], PCR_COUNT // 8) + bitmap.to_bytes(PCR_COUNT // 8, "little"))
        return b"".join(parts)

    def digest(self, values: Mapping[str, Mapping[int, bytes]], algorithm: str) -> bytes:
        """What a quote has of these values: their digest, in the selection's order (Part 3 §18.4).

        Args:
            values: by bank and index; exactly those selected.
            algorithm: ``sha256`` or longer.

        Raises:
            EvidenceMalformed: a value is missing, one too many, or of another length than its bank's.
        """
        if {bank: set(held) for bank, held in values.items()} != {bank: set(chosen) for bank, chosen in self.banks}:
            raise EvidenceMalformed("the PCR values told are not those that were asked for")
        running = hashlib.new(algorithm)
        for bank, indices in self.banks:
            for index in indices:
                if len(values[bank][index]) != DIGEST_BYTES[bank]:
                    raise EvidenceMalformed(f"PCR {index} of bank {bank} has {len(values[bank][index])} bytes")
                running.update(values[bank][index])
        return running.digest()


# ---------------------------------------------------------------- keys


@dataclass(frozen=True, slots=True)
class Public:
    """A key's public area: TPMT_PUBLIC (§12.2.4), of RSA or of one of NIST's curves.

    Attributes:
        raw: its bytes.
        kind: RSA or ECC.
        name_algorithm: of its name: ``sha256``, ``sha384`` or ``sha512``.
        attributes: what it may do.
        policy: authPolicy, a digest, or empty.
        symmetric_bits: of AES in CFB, of a storage key; 0 of others.
        scheme: how it signs: RSASSA, RSAPSS or ECDSA; NULL of a storage key.
        hash: what it signs with; empty of a storage key.
        key: for `cryptography`.
    """

    raw: bytes
    kind: Alg
    name_algorithm: str
    attributes: Attributes
    policy: bytes
    symmetric_bits: int
    scheme: Alg
    hash: str
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey

    @property
    def name(self) -> bytes:
        """TPM2B_NAME without its length (Part 1 §16): the algorithm's number and the public area's digest."""
        return struct.pack(">H", BANKS[self.name_algorithm]) + hashlib.new(self.name_algorithm, self.raw).digest()

    @classmethod
    def parse(cls, data: bytes) -> "Public":
        """Read a whole TPMT_PUBLIC.

        Raises:
            EvidenceMalformed: it is none, or of a kind that is not known here.
        """
        reader = Reader(data, "a TPM key")
        kind = reader.u16()
        name_algorithm = hash_named(reader, reader.u16())
        bits = reader.u32()
        attributes = Attributes(bits)
        if bits & ~sum(Attributes):
            raise reader.refuse(f"reserved attributes are set: {bits:#010x}")
        policy = reader.sized(DIGEST_BYTES_MAX)
        if kind not in (Alg.RSA, Alg.ECC):
            raise reader.refuse(f"algorithm {kind:#06x} is neither RSA nor ECC")
        symmetric_bits = _symmetric(reader)
        scheme, hash_name = _scheme(reader, Alg.ECDSA if kind == Alg.ECC else Alg.NULL)
        key = _ecc_key(reader) if kind == Alg.ECC else _rsa_key(reader)
        reader.end()
        return cls(data, Alg(kind), name_algorithm, attributes, policy, symmetric_bits, scheme, hash_name, key)


def _symmetric(reader: Reader) -> int:
    """TPMT_SYM_DEF_OBJECT (§11.1.7): none, or AES in CFB; its bits."""
    algorithm = reader.u16()
    if algorithm == Alg.NULL:
        return 0
    bits, mode = reader.u16(), reader.u16()
    if algorithm != Alg.AES or bits not in (128, 192, 256) or mode != Alg.CFB:
        raise reader.refuse("its symmetric algorithm is not AES in CFB")
    return bits


def _scheme(reader: Reader, ecc: Alg) -> tuple[Alg, str]:
    """TPMT_ASYM_SCHEME (§11.2.3.6): how the key signs, if it is bound to one way."""
    scheme = reader.u16()
    if scheme == Alg.NULL:
        return Alg.NULL, ""
    if scheme not in ((ecc,) if ecc is Alg.ECDSA else (Alg.RSASSA, Alg.RSAPSS)):
        raise reader.refuse(f"signing scheme {scheme:#06x} is not accepted")
    return Alg(scheme), hash_named(reader, reader.u16())


def _rsa_key(reader: Reader) -> rsa.RSAPublicKey:
    bits, exponent = reader.u16(), reader.u32() or 65537  # 0 stands for the usual exponent (§12.2.3.5)
    modulus = reader.sized(512)
    number = int.from_bytes(modulus, "big")
    if bits not in (2048, 3072, 4096) or number.bit_length() != bits or len(modulus) != bits // 8:
        raise reader.refuse("its RSA modulus is not of 2048, 3072 or 4096 bits, or not of as many as it says")
    try:
        return rsa.RSAPublicNumbers(exponent, number).public_key()
    except ValueError:
        raise reader.refuse("its RSA modulus or exponent cannot be one") from None


def _ecc_key(reader: Reader) -> ec.EllipticCurvePublicKey:
    number = reader.u16()
    if number not in set(Curve):
        raise reader.refuse(f"curve {number:#06x} is not accepted")
    if reader.u16() != Alg.NULL:
        raise reader.refuse("it has a key derivation of its own")
    curve = _CURVES[Curve(number)]()
    x, y = (int.from_bytes(reader.sized((curve.key_size + 7) // 8), "big") for _ in range(2))
    try:
        return ec.EllipticCurvePublicNumbers(x, y, curve).public_key()
    except ValueError:
        raise reader.refuse("its point is not on the curve") from None


# ---------------------------------------------------------------- what a TPM signs


@dataclass(frozen=True, slots=True)
class Clock:
    """TPMS_CLOCK_INFO (§10.11.1).

    Attributes:
        milliseconds: while the TPM was powered, in all its life.
        resets: how often it was, or its host, restarted for good.
        restarts: resumptions from sleep since the last of these.
        safe: whether no greater time was told before.
    """

    milliseconds: int
    resets: int
    restarts: int
    safe: bool

    @property
    def counts(self) -> tuple[int, int, int]:
        """Resets, restarts, milliseconds: what only grows."""
        return self.resets, self.restarts, self.milliseconds


@dataclass(frozen=True, slots=True)
class Quote:
    """TPMS_ATTEST (§10.12.12) of a quote (§10.12.4).

    Attributes:
        signer: the qualified name of the key that signs.
        qualifying: what the verifier had said.
        clock: the TPM's.
        firmware: its version.
        selection: which PCRs.
        digest: of their values.
    """

    signer: bytes
    qualifying: bytes
    clock: Clock
    firmware: int
    selection: Selection
    digest: bytes

    @classmethod
    def parse(cls, data: bytes) -> "Quote":
        """Read a whole TPMS_ATTEST.

        Raises:
            EvidenceMalformed: it is none, of something else than PCRs, or not made by a TPM.
        """
        reader = Reader(data, "a quote")
        if reader.u32() != GENERATED:
            raise reader.refuse("it does not begin as what a TPM has made")
        if reader.u16() != ST_ATTEST_QUOTE:
            raise reader.refuse("it is of something else than PCRs")
        signer = reader.sized(2 + DIGEST_BYTES_MAX)
        qualifying = reader.sized(DIGEST_BYTES_MAX)
        milliseconds, resets, restarts, safe = reader.u64(), reader.u32(), reader.u32(), reader.u8()
        if safe > 1:
            raise reader.refuse("its clock is neither safe nor not")
        clock = Clock(milliseconds, resets, restarts, bool(safe))
        firmware = reader.u64()
        selection = Selection.read(reader)
        digest = reader.sized(DIGEST_BYTES_MAX)
        reader.end()
        return cls(signer, qualifying, clock, firmware, selection, digest)


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE (§11.3.4).

    Attributes:
        scheme: RSASSA, RSAPSS or ECDSA.
        hash: ``sha256`` or longer.
        parts: the signature of RSA, or r and s of ECDSA.
    """

    scheme: Alg
    hash: str
    parts: tuple[bytes, ...]

    @classmethod
    def parse(cls, data: bytes) -> "Signature":
        """Read a whole TPMT_SIGNATURE.

        Raises:
            EvidenceMalformed: it is none, or of a scheme that is not known here.
        """
        reader = Reader(data, "a TPM's signature")
        scheme = reader.u16()
        if scheme not in (Alg.RSASSA, Alg.RSAPSS, Alg.ECDSA):
            raise reader.refuse(f"scheme {scheme:#06x} is not accepted")
        name = hash_named(reader, reader.u16())
        if scheme == Alg.ECDSA:
            parts: tuple[bytes, ...] = (reader.sized(66), reader.sized(66))
        else:
            parts = (reader.sized(512),)
        reader.end()
        return cls(Alg(scheme), name, parts)

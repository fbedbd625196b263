"""The few commands that a TPM 2.0 is asked about its identity with, sans-IO (TPM 2.0 Library, Part 3, revision 1.59).

Written out here because a hand-over wants six of them, at once, on a socket of its own: the TPM software stack would be
one more thing to install on every host.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Final

from proxy.errors import VtpmFailed

RESPONSE_BYTES_MAX: Final = 4096  # TPM2_PT_MAX_RESPONSE_SIZE of swtpm
HEAD_BYTES: Final = 10
PCRS: Final = 24
PCR_BYTES: Final = 32

_SESSIONS: Final = 0x8002  # TPM_ST_SESSIONS (Part 2 §6.9)
_NO_SESSIONS: Final = 0x8001
_HEAD: Final = struct.Struct(">HII")
_PASSWORD: Final = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)  # TPM_RS_PW with an empty password (Part 1 §19.4)
_SHA256: Final = 0x000B
_NULL: Final = 0x0010
NOT_STARTED: Final = 0x100  # TPM_RC_INITIALIZE (Part 2 §6.6.3)
_TRANSIENT_FIRST: Final = 0x80000000
_CAP_HANDLES: Final = 1
_HANDLES_MAX: Final = 64  # swtpm has three slots for transient objects
_PCRS_READ: Final = 8  # digests in one TPML_DIGEST (Part 2 §10.9.1)


@unique
class Code(IntEnum):
    """TPM_CC (Part 2 §6.5.2)."""

    CREATE_PRIMARY = 0x131
    STARTUP = 0x144
    QUOTE = 0x158
    FLUSH_CONTEXT = 0x165
    GET_CAPABILITY = 0x17A
    PCR_READ = 0x17E


@unique
class Hierarchy(IntEnum):
    """Whose seed a key is derived from (Part 1 §14): the same template gives the same key as long as the seed is.

    The endorsement seed is the TPM's for good. The null seed is drawn at each reset of the TPM and kept in its volatile
    state, and nobody can set a password before it: its key tells one run of a TPM from every other.
    """

    ENDORSEMENT = 0x4000000B
    NULL = 0x40000007


# TPMA_OBJECT (Part 2 §8.3): fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, restricted, sign.
_ATTRIBUTES: Final = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10 | 1 << 16 | 1 << 18
# TPMT_PUBLIC (Part 2 §12.2.4): ECC, named by SHA-256, no policy, no symmetric cipher, ECDSA with SHA-256 on P-256.
TEMPLATE: Final = (
    struct.pack(">HHIH", 0x0023, _SHA256, _ATTRIBUTES, 0)
    + struct.pack(">HHHHH", _NULL, 0x0018, _SHA256, 0x0003, _NULL)
    + struct.pack(">HH", 0, 0)
)


def startup() -> bytes:
    """TPM2_Startup(CLEAR) (§9.3)."""
    return _command(Code.STARTUP, b"\0\0")


def create_primary(hierarchy: Hierarchy) -> bytes:
    """TPM2_CreatePrimary (§24.1) of that hierarchy's identity key."""
    sensitive = struct.pack(">HHH", 4, 0, 0)
    parameters = sensitive + struct.pack(">H", len(TEMPLATE)) + TEMPLATE + struct.pack(">HI", 0, 0)
    return _command(Code.CREATE_PRIMARY, struct.pack(">I", hierarchy) + _PASSWORD + parameters, tag=_SESSIONS)


def quote(key: int, qualifying: bytes) -> bytes:
    """TPM2_Quote (§18.4) over all SHA-256 PCRs."""
    parameters = struct.pack(">H", len(qualifying)) + qualifying + struct.pack(">H", _NULL)
    selection = struct.pack(">IHB", 1, _SHA256, PCRS // 8) + b"\xff" * (PCRS // 8)
    return _command(Code.QUOTE, struct.pack(">I", key) + _PASSWORD + parameters + selection, tag=_SESSIONS)


def flush(handle: int) -> bytes:
    """TPM2_FlushContext (§28.4)."""
    return _command(Code.FLUSH_CONTEXT, struct.pack(">I", handle))


def transient_handles() -> bytes:
    """TPM2_GetCapability (§30.2): which transient objects are loaded."""
    return _command(Code.GET_CAPABILITY, struct.pack(">III", _CAP_HANDLES, _TRANSIENT_FIRST, _HANDLES_MAX))


def pcr_read(first: int) -> bytes:
    """TPM2_PCR_Read (§22.4) of eight SHA-256 PCRs; ``first`` is a multiple of eight."""
    bitmap = bytes(0xFF if byte == first // 8 else 0 for byte in range(PCRS // 8))
    return _command(Code.PCR_READ, struct.pack(">IHB", 1, _SHA256, PCRS // 8) + bitmap)


def _command(code: Code, rest: bytes, *, tag: int = _NO_SESSIONS) -> bytes:
    return _HEAD.pack(tag, HEAD_BYTES + len(rest), code) + rest


def response_bytes(begun: bytes) -> int:
    """How long a response is in all, by what of it is there.

    Raises:
        VtpmFailed: a length out of bounds.
    """
    if len(begun) < HEAD_BYTES:
        return HEAD_BYTES
    size = int(_HEAD.unpack_from(begun)[1])
    if not HEAD_BYTES <= size <= RESPONSE_BYTES_MAX:
        raise VtpmFailed(f"a TPM's response of {size} bytes, {RESPONSE_BYTES_MAX} allowed")
    return size


@dataclass(frozen=True, slots=True)
class Response:
    """A response without its head; ``code`` 0 is success (Part 2 §6.6)."""

    code: int
    body: bytes

    @classmethod
    def parse(cls, raw: bytes) -> "Response":
        """That response.

        Raises:
            VtpmFailed: it is none.
        """
        if response_bytes(raw) != len(raw):
            raise VtpmFailed("a TPM's response is cut short")
        return cls(int(_HEAD.unpack_from(raw)[2]), raw[HEAD_BYTES:])

    def require(self, what: str) -> "Response":
        """That it is success.

        Raises:
            VtpmFailed: it is not.
        """
        if self.code:
            raise VtpmFailed(f"the vTPM refuses {what} (0x{self.code:x})")
        return self


def created(response: Response) -> tuple[int, bytes]:
    """A new primary key's handle, and its TPMT_PUBLIC.

    Raises:
        VtpmFailed: the response ends too early.
    """
    body = _Body(response.body)
    handle = body.number(4)
    body.number(4)  # bytes of the parameters
    return handle, body.sized()


def quoted(response: Response) -> tuple[bytes, bytes]:
    """TPMS_ATTEST, and the TPMT_SIGNATURE over it.

    Raises:
        VtpmFailed: the response ends too early.
    """
    body = _Body(response.body)
    parameters = _Body(body.take(body.number(4)))
    return parameters.sized(), parameters.rest()


def handles(response: Response) -> tuple[int, ...]:
    """Those that TPM2_GetCapability tells.

    Raises:
        VtpmFailed: the response ends too early.
    """
    body = _Body(response.body)
    body.take(5)  # whether there are more, and the capability again
    return tuple(body.number(4) for _ in range(min(body.number(4), _HANDLES_MAX)))


def digests(response: Response) -> tuple[bytes, ...]:
    """The PCRs' values.

    Raises:
        VtpmFailed: not eight, or not of 32 bytes.
    """
    body = _Body(response.body)
    body.take(4)  # the count of updates
    for _ in range(body.number(4)):
        body.take(2)
        body.take(body.number(1))
    values = tuple(body.sized() for _ in range(min(body.number(4), _PCRS_READ)))
    if len(values) != _PCRS_READ or any(len(value) != PCR_BYTES for value in values):
        raise VtpmFailed("the vTPM has no SHA-256 PCRs")
    return values


class _Body:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise VtpmFailed("a TPM's response ends within a field")
        taken, self._at = self._data[self._at : end], end
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def sized(self) -> bytes:
        return self.take(self.number(2))

    def rest(self) -> bytes:
        return self._data[self._at :]

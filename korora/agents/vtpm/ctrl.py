"""The control channel of swtpm, sans-IO: commands to bytes, answers to what they say.

All integers are big-endian. A command is its number and its fields; an answer begins with a TPM result, and one that
refuses may end there (swtpm: include/swtpm/tpm_ioctl.h, src/swtpm/ctrlchannel.c).
"""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag, unique
from typing import Final

from proxy.errors import VtpmFailed

BLOB_BYTES_MAX: Final = 512 * 1024  # what swtpm itself takes in one SET; a TPM's volatile state has some 9 KiB
TPM_SUCCESS: Final = 0
RESULT_BYTES: Final = 4
STATE_HEAD_BYTES: Final = 16

_WORD: Final = struct.Struct(">I")
_TWO: Final = struct.Struct(">II")
_FOUR: Final = struct.Struct(">IIII")
_BLOB_HEAD: Final = struct.Struct(">BBHHI")  # version, least version, bytes of this, flags, bytes in all


@unique
class Command(IntEnum):
    """Those in use here; ``CMD_*`` of tpm_ioctl.h."""

    INIT = 2
    SHUTDOWN = 3
    GET_TPMESTABLISHED = 4
    STORE_VOLATILE = 10
    GET_STATEBLOB = 12
    SET_STATEBLOB = 13
    STOP = 14
    GET_CONFIG = 15


@unique
class Blob(IntEnum):
    """Parts of a TPM's state; ``PTM_BLOB_TYPE_*``. A TPM 2.0 has no third one (SAVESTATE is a TPM 1.2's)."""

    PERMANENT = 1
    VOLATILE = 2


class StateFlag(IntFlag):
    """``PTM_STATE_FLAG_*``: what SET has to be told is what GET has said."""

    DECRYPTED = 1  # asked of GET: without the emulator's own key
    ENCRYPTED = 2  # said by GET: under the emulator's own key, which the other one must have, too


class Config(IntFlag):
    """``PTM_CONFIG_FLAG_*``."""

    FILE_KEY = 1
    MIGRATION_KEY = 2


class BlobFlag(IntFlag):
    """Flags in a blob's own head (swtpm: src/swtpm/swtpm_nvstore.c)."""

    ENCRYPTED = 0x01
    MIGRATION_ENCRYPTED = 0x02
    MIGRATION_256BIT_KEY = 0x10


INIT_DELETE_VOLATILE: Final = 1  # PTM_INIT_FLAG_DELETE_VOLATILE: read the stored volatile state, then remove it


@dataclass(frozen=True, slots=True)
class StateBlob:
    """One part of a TPM's state as GET gave it: ``flags`` go back with it."""

    type: Blob
    flags: int
    data: bytes

    @property
    def protection(self) -> BlobFlag:
        """What it is encrypted under, by its own head.

        Raises:
            VtpmFailed: it is no blob.
        """
        if len(self.data) >= _BLOB_HEAD.size:
            _, _, head_bytes, flags, total = _BLOB_HEAD.unpack_from(self.data)
            if head_bytes == _BLOB_HEAD.size and total == len(self.data):
                return BlobFlag(flags)
        raise VtpmFailed(f"the {self.type.name.lower()} state of the vTPM is no blob of swtpm's")

    def require_sealed(self) -> None:
        """That nobody without the migration key can read it.

        By its own head, and not only by what the emulator says of itself: an export in clear would be a copy of every
        key that the vTPM keeps.

        Raises:
            VtpmFailed: it is in clear, under a key of 128 bits, or no blob.
        """
        flags = self.protection
        if not flags & BlobFlag.MIGRATION_ENCRYPTED or not flags & BlobFlag.MIGRATION_256BIT_KEY:
            raise VtpmFailed(f"the {self.type.name.lower()} state of the vTPM is not encrypted", KEY_REMEDY)


KEY_REMEDY: Final = "start swtpm with --migration-key file=…,mode=aes-256-cbc, the same key on both hosts"


def request(command: Command) -> bytes:
    """A command without fields."""
    return _WORD.pack(command)


def init(flags: int = 0) -> bytes:
    """INIT: start the TPM with the state that was SET, or else with what is stored."""
    return _TWO.pack(Command.INIT, flags)


def get_state(blob: Blob) -> bytes:
    """GET_STATEBLOB from its beginning, under whatever keys the emulator has."""
    return _FOUR.pack(Command.GET_STATEBLOB, 0, blob, 0)


def set_state(blob: StateBlob) -> bytes:
    """SET_STATEBLOB, whole.

    Raises:
        VtpmFailed: it is larger than swtpm takes.
    """
    if len(blob.data) > BLOB_BYTES_MAX:
        raise VtpmFailed(f"a vTPM's state of {len(blob.data)} bytes, {BLOB_BYTES_MAX} allowed")
    return _FOUR.pack(Command.SET_STATEBLOB, blob.flags, blob.type, len(blob.data)) + blob.data


def result(answer: bytes) -> int:
    """An answer's TPM result.

    Raises:
        VtpmFailed: there is none.
    """
    if len(answer) < RESULT_BYTES:
        raise VtpmFailed("swtpm's answer is cut short")
    return int(_WORD.unpack_from(answer)[0])


def answer_bytes(command: Command, begun: bytes) -> int:
    """How long an answer is in all, by what of it is there: as soon as nothing is missing, its own length.

    Raises:
        VtpmFailed: a length over the limit.
    """
    if len(begun) < RESULT_BYTES:
        return RESULT_BYTES
    if result(begun) != TPM_SUCCESS:
        return RESULT_BYTES  # whatever else comes says nothing, and the connection is closed
    match command:
        case Command.GET_CONFIG:
            return 2 * RESULT_BYTES
        case Command.GET_TPMESTABLISHED:
            return 2 * RESULT_BYTES
        case Command.GET_STATEBLOB:
            if len(begun) < STATE_HEAD_BYTES:
                return STATE_HEAD_BYTES
            length = int(_FOUR.unpack_from(begun)[3])
            if length > BLOB_BYTES_MAX:
                raise VtpmFailed(f"swtpm gives {length} bytes of state, {BLOB_BYTES_MAX} allowed")
            return STATE_HEAD_BYTES + length
        case _:
            return RESULT_BYTES


def require(command: Command, answer: bytes) -> bytes:
    """An answer that says yes, without its result.

    A refused SET is followed by an INIT that succeeds, with a TPM that is new: so every result counts.

    Raises:
        VtpmFailed: it says no.
    """
    code = result(answer)
    if code != TPM_SUCCESS:
        raise VtpmFailed(f"swtpm refuses {command.name}: {_meaning(code)}", _remedy(command, code))
    return answer[RESULT_BYTES:]


def state_of(blob: Blob, body: bytes) -> StateBlob:
    """What GET_STATEBLOB has given, by its answer without the result.

    Raises:
        VtpmFailed: not all of it, or nothing.
    """
    flags, total, length = struct.unpack_from(">III", body)
    data = body[STATE_HEAD_BYTES - RESULT_BYTES :]
    if not data or total != length or length != len(data):
        raise VtpmFailed(f"swtpm gives {len(data)} of {total} bytes of {blob.name.lower()} state")
    return StateBlob(blob, flags, data)


def config_of(body: bytes) -> Config:
    """Which keys the emulator has, by GET_CONFIG's answer without the result."""
    return Config(int(_WORD.unpack_from(body)[0]) & (Config.FILE_KEY | Config.MIGRATION_KEY))


# TPM 1.2's result codes, which swtpm uses for its own answers.
_MEANINGS: Final = {
    0x03: "a parameter is wrong",
    0x09: "it fails",
    0x0A: "not while the TPM is in that state (running, or not running)",
    0x0D: "it lacks the key",
    0x11: "it has no room",
    0x1F: "it cannot read or write",
    0x21: "what is encrypted was altered, or under another key",
    0x800: "there is none",
}


def _meaning(code: int) -> str:
    return f"{_MEANINGS.get(code, 'error')} (0x{code:x})"


def _remedy(command: Command, code: int) -> str:
    if code in (0x0D, 0x21):
        return KEY_REMEDY
    if command is Command.SET_STATEBLOB and code == 0x0A:
        return "start the swtpm of the arriving machine, and leave it uninitialised"
    return "swtpm's own log says more"

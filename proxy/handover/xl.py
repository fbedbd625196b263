"""What xl says at the end of a migration (tools/xl/xl_migrate.c, Xen 4.5 to 4.20), cut into its parts. Sans-IO.

destination → source   BANNER, READY, then REPORT and a status of one byte; after a status other than 0, GO back
source → destination   the stream, then GO: from here on its copy is given up
"""

from enum import Enum, unique
from typing import Final

from proxy.errors import HypervisorFailed
from proxy.streams.formats import XL_GO

BANNER: Final = b"xl migration receiver ready, send binary domain data.\n"
READY: Final = b"domain received, ready to unpause\0"
GO: Final = XL_GO
REPORT: Final = b"my copy unpause results are as follows\0"
STATUS_BYTES: Final = 1

SUCCEEDED: Final = REPORT + b"\0"
"""To the source: the machine runs there; it destroys its copy."""

FAILED: Final = REPORT + b"\x01" + GO
"""To the source: it runs nowhere, and is the source's again; it resumes its copy."""

READY_END: Final = len(BANNER) + len(READY)  # offset in what the destination says


@unique
class Part(Enum):
    """What the destination's xl has said."""

    BANNER = "banner"
    READY = "ready"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Answers:
    """Follows what the destination's xl says, byte for byte."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._parts = 0

    @property
    def whole(self) -> bool:
        """Whether it stands between two parts."""
        return len(self._said) in _ENDS

    def feed(self, piece: bytes | memoryview) -> list[Part]:
        """The parts that ``piece`` completes.

        Raises:
            HypervisorFailed: xl says nothing of the kind.
        """
        room = _SAID_MAX - len(self._said)
        if len(piece) > room:
            raise HypervisorFailed("xl migrate-receive says more than it ever should")
        self._said += piece
        text = bytes(self._said)
        if text[: len(_SCRIPT)] != _SCRIPT[: len(text)]:
            raise HypervisorFailed(f"xl migrate-receive says what is not understood: {text[-64:]!r}")
        if len(text) > _STATUS_END and text[_STATUS_END:] != GO[: len(text) - _STATUS_END]:
            raise HypervisorFailed("xl migrate-receive says what is not understood after its report")
        reached = sum(len(text) >= end for end in _ENDS)
        fresh = [self._part(number) for number in range(self._parts, min(reached, len(_PARTS)))]
        self._parts = reached
        return fresh

    def _part(self, number: int) -> Part:
        if number < len(_PARTS) - 1:
            return _PARTS[number]
        return Part.SUCCEEDED if self._said[_STATUS_END - 1] == 0 else Part.FAILED


_SCRIPT: Final = BANNER + READY + REPORT
_STATUS_END: Final = len(_SCRIPT) + STATUS_BYTES
_SAID_MAX: Final = _STATUS_END + len(GO)
_ENDS: Final = (len(BANNER), READY_END, _STATUS_END, _SAID_MAX)
_PARTS: Final = (Part.BANNER, Part.READY, Part.SUCCEEDED)


class Permission:
    """Follows what the source's xl says once it was told READY: GO, whole and nothing else."""

    def __init__(self) -> None:
        self._said = b""

    def feed(self, piece: bytes | memoryview) -> bool:
        """Whether ``piece`` completes it.

        Raises:
            HypervisorFailed: xl says something else.
        """
        self._said += bytes(piece[: len(GO) + 1])
        if not GO.startswith(self._said):
            raise HypervisorFailed("xl migrate says what is not understood where it gives the machine up")
        return self._said == GO

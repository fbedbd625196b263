"""What QEMU's main stream carries of the guest's vTPM (``-tpmdev emulator``), kept as it passes. Sans-IO.

Follows vmstate_tpm_emulator in backends/tpm/tpm_emulator.c of QEMU: one full section of three parts, each its flags,
its size and so many bytes. Sections do not tell their length, and what a guest may write into a device of its own can
look like one. So nothing is believed of a stream that does not end in QEMU's own description of it (vmstate_save_vmsd),
with the same sections in the same order, and each up to this one as long as the description has it: then it lies where
QEMU put it, and nowhere else.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from proxy.limits import QEMU_DESCRIPTION_BYTES_MAX, QEMU_DEVICES_MAX, VTPM_STATE_BYTES_MAX
from proxy.streams.reader import Reader, Steps

VTPM_ID: Final = b"tpm-emulator"
VTPM_VERSION: Final = 0
_PARTS: Final = 3  # permanent, volatile, savestate
_HEAD: Final = struct.Struct(">II")  # flags, size


@dataclass(frozen=True, slots=True)
class CarriedPart:
    """One part of a vTPM's state, with the flags that its emulator gave it with."""

    flags: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CarriedVtpm:
    """A vTPM's state as QEMU's stream has it; a part that the emulator does not have is empty."""

    permanent: CarriedPart
    volatile: CarriedPart
    savestate: CarriedPart


class _Field(msgspec.Struct, frozen=True):
    size: int = 0
    array_len: int = 1


class _State(msgspec.Struct, frozen=True):
    vmsd_name: str = ""
    fields: list[_Field] = []
    subsections: list["_State"] = []

    @property
    def size_bytes(self) -> int:
        """Of its content in the stream; a subsection's head is a mark, its name behind a length, and a version."""
        own = sum(one.size * one.array_len for one in self.fields)
        return own + sum(6 + len(one.vmsd_name.encode()) + one.size_bytes for one in self.subsections)


class _Device(_State, frozen=True, kw_only=True):
    name: str
    instance_id: int


class _Description(msgspec.Struct, frozen=True):
    devices: list[_Device]


class VtpmWatch:
    """What a session's main stream says of the guest's vTPM; given to the parsers of all its channels."""

    def __init__(self) -> None:
        self._begun = self._whole = False
        self._sections: list[tuple[str, int]] = []
        """Name and instance of each full section."""
        self._sizes: list[int] = []
        """Of their contents."""
        self._found: CarriedVtpm | None = None
        self._trouble = ""
        self.notify: Callable[[], None] = lambda: None
        """Called, by whoever reads the stream, when it is ``told``."""

    # ---- for whoever verifies

    @property
    def told(self) -> bool:
        """Whether it is certain what the stream carries, or that nobody will know."""
        return self._whole or bool(self._trouble)

    @property
    def trouble(self) -> str:
        """Why it cannot be told what the stream carries, in words for people; empty once it can."""
        if self.told:
            return self._trouble
        return "the stream has not come to its end" if self._begun else "no main stream of a QEMU was read"

    @property
    def carried(self) -> CarriedVtpm | None:
        """The vTPM; None where the stream has none, and while it cannot be told."""
        return None if self.trouble else self._found

    # ---- for the parser

    def begin(self) -> None:
        """A main stream begins."""
        if self._begun:
            self.lose("the migration has two main streams")
        self._begun = True

    def lose(self, why: str) -> None:
        """It can not be told any more."""
        self._trouble = self._trouble or why
        self.notify()

    def section(self, name: bytes, instance: int, version: int) -> bool:
        """A full section begins: whether its content is to be taken."""
        if len(self._sections) >= QEMU_DEVICES_MAX:
            self.lose("it has too many devices")
            return False
        self._sections.append((name.decode("utf-8", "replace"), instance))
        if name != VTPM_ID:
            return False
        if version != VTPM_VERSION:
            self.lose(f"its section {VTPM_ID.decode()} has version {version}, which is not known here")
        elif self._found is not None:
            self.lose("it has two vTPMs")
        return not self._trouble

    def take(self, reader: Reader) -> Steps[bool]:
        """Read the content of the vTPM's section; whether all of it was there."""
        parts = []
        for _ in range(_PARTS):
            flags, size = _HEAD.unpack((yield from reader.take(_HEAD.size)))
            if size > VTPM_STATE_BYTES_MAX:
                self.lose(f"a part of its vTPM has {size} bytes")
                return False
            parts.append(CarriedPart(flags, (yield from reader.take(size)) if size else b""))
        self._found = CarriedVtpm(*parts)
        return True

    def ended(self, size_bytes: int) -> None:
        """The content of that section had so many bytes."""
        if not self._trouble:
            self._sizes.append(size_bytes)

    def end(self, reader: Reader, size: int) -> Steps[None]:
        """The stream has ended but for its description, of that size."""
        if self._trouble:
            yield from reader.skip(size)
        elif size > QEMU_DESCRIPTION_BYTES_MAX:
            self.lose(f"its description has {size} bytes")
            yield from reader.skip(size)
        else:
            self._compare((yield from reader.take(size)), self._found)
        self._whole = True
        self.notify()

    def _compare(self, text: bytes, found: CarriedVtpm | None) -> None:
        try:
            devices = msgspec.json.decode(text, type=_Description).devices
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self.lose("its description is none")
            return
        if found is None:  # a guest can hide one, by a device that seems to end behind it
            if any(device.name == VTPM_ID.decode() for device in devices):
                self.lose("it has a vTPM by its description, and none was found")
            return
        if [(device.name, device.instance_id) for device in devices] != self._sections:
            self.lose("its devices are not those that its description names")
            return
        upto = 1 + next(place for place, (name, _) in enumerate(self._sections) if name == VTPM_ID.decode())
        if [device.size_bytes for device in devices[:upto]] != self._sizes[:upto]:
            self.lose("its devices are not as long as its description tells")
        elif [one.size for one in devices[upto - 1].fields] != _sizes_of(found):
            self.lose("its vTPM is not the one that its description tells of")


def _sizes_of(found: CarriedVtpm) -> list[int]:
    return [size for part in (found.permanent, found.volatile, found.savestate) for size in (4, 4, len(part.data))]

"""What the store wants of whoever holds its keys; ``crypto.at_rest.HostKeys`` is that.

Whatever does not open raises a ValueError of the implementation's.
"""

from typing import Final, Protocol

Buffer = bytes | bytearray | memoryview

SEAL_BYTES: Final = 16  # what sealing adds to a piece: the tag of AES-GCM
WRAP_BYTES: Final = 72  # what a key file adds to its note: nonce, key, tag


class Opener(Protocol):
    """Opens the parts of one segment; threads may share it."""

    def open(self, part: int, number: int, sealed: Buffer, out: Buffer) -> None:
        """Open piece ``number`` of ``part`` into ``out``.

        Raises:
            ValueError: it is not that piece; ``out`` holds nothing that may be used.
        """


class Sealer(Protocol):
    """Seals the parts of one new segment; the pieces of each part are numbered from 0 by the sealer itself."""

    def seal(self, part: int, plain: Buffer, out: Buffer) -> None:
        """Seal the next piece of ``part`` into ``out``, which is ``SEAL_BYTES`` longer."""


class StoreKeys(Protocol):
    """Keys of this host's store, by tenant."""

    def folder(self, tenant: str) -> str:
        """The name of a tenant's folder: 32 hex digits that say nothing of the tenant."""

    def page_key(self, folder: str) -> bytes:
        """The key of that tenant's page ids, 32 bytes."""

    def make(self, folder: str, segment: bytes, note: bytes) -> tuple[Sealer, bytes]:
        """A new segment's sealer, and the content of its key file, ``WRAP_BYTES`` longer than the note in it."""

    def unwrap(self, folder: str, segment: bytes, content: bytes) -> tuple[Opener, bytes]:
        """A segment's opener and note, from the content of its key file.

        Raises:
            ValueError: it is no key file of that segment made under these keys.
        """

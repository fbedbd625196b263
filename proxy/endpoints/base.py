"""The seam between a session and whatever the local hypervisor's end is made of.

A ``Connection`` is one channel's local end. Its descriptors are waited on by the session's loop; reads and writes
never block and move whole buffers. A regular file has no descriptor to wait on: it is always ready.
"""

from typing import Literal, Protocol


class Connection(Protocol):
    """One channel's local end, full duplex unless its kind is one-way."""

    label: str
    """What messages call it: the endpoint as the operator wrote it."""

    read_fd: int | None
    """Descriptor that becomes readable; None when reading never has to wait."""

    write_fd: int | None
    """Descriptor that becomes writable; None when writing never has to wait."""

    user: int | None
    """The uid of whoever is behind it, where this host's kernel can tell."""

    def read_into(self, buffer: memoryview) -> int | None:
        """Read up to ``len(buffer)`` bytes: their number, 0 at the clean end, None if it would block.

        Raises:
            OSError: the connection broke.
            HypervisorFailed: it ended in a way that is no clean end.
        """

    def write(self, data: memoryview) -> int:
        """Write what fits now: the number of bytes taken, 0 if it would block.

        Raises:
            OSError: the connection broke.
            HypervisorFailed: this end cannot be written.
        """

    def finish(self) -> None:
        """The stream towards the hypervisor has ended cleanly: pass the half-close on."""

    async def settle(self) -> None:
        """Both directions have ended: make the result final (rename the file, read the command's status).

        Raises:
            HypervisorFailed: the local end says it did not work.
        """

    async def abort(self) -> None:
        """The session failed: make sure that the hypervisor cannot take it for a clean end. Never raises."""


class Ingress(Protocol):
    """Where the local hypervisor's connections come from."""

    label: str

    single: bool
    """Whether it gives exactly one connection and then ends (stdio, file, exec)."""

    async def open(self) -> None:
        """Bind, or check what can be checked before the first session.

        Raises:
            ConfigurationError: it cannot be used.
        """

    async def accept(self) -> Connection:
        """The next connection.

        Raises:
            HypervisorFailed: it cannot be made.
        """

    async def close(self) -> None:
        """Stop accepting and remove what ``open`` left behind. Never raises."""


class Egress(Protocol):
    """Where an arriving migration is handed over."""

    label: str

    single: bool
    """Whether a session may open only one channel to it (stdio, file, exec, xl)."""

    exclusive: bool
    """Whether sessions must take turns: there is one of it, not one for each session (stdio, file, exec)."""

    handover: Literal["", "xl"]
    """The kind of hypervisor whose last handshake passes here; empty where the endpoint does not know."""

    paused: bool
    """Whether the machine is to stay paused where it arrives, whatever its source asks."""

    async def check(self) -> None:
        """Check what can be checked without touching the hypervisor.

        Raises:
            ConfigurationError: it cannot be used.
        """

    async def connect(self, xl_flags: str) -> Connection:
        """Open the next channel's local end; ``xl_flags`` are what the source asked of xl (a subset of "edp").

        Raises:
            HypervisorFailed: it cannot be opened.
        """

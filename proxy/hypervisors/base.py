"""The seam between the hand-over and a hypervisor: what can be asked of it about one virtual machine.

Every method asks the hypervisor how things stand after it has acted, and believes that alone: exit codes say little
(``xl unpause`` ends with 0 even on "Invalid argument").
"""

from dataclasses import dataclass
from enum import Enum, unique
from typing import Final, Protocol

from proxy.handover.table import Side


@dataclass(frozen=True, slots=True)
class Vm:
    """A virtual machine, as both relays read it from the stream."""

    name: str
    uuid: str
    """In lower case with dashes; empty where the stream does not tell."""

    copy: str = ""
    """What this host's hypervisor calls its copy, once ``Hypervisor.pin`` has said; never told to the peer."""

    paused: bool = False
    """Whether its operator had paused it before it left: it is to arrive, and not to run."""

    @property
    def pinned(self) -> str:
        """``copy`` without what else is noted of it: the same for whoever means the same one."""
        return self.copy.partition("+")[0]


@unique
class CopyState(Enum):
    """How one host's copy of a machine stands."""

    ABSENT = "absent"
    INCOMING = "incoming"  # arriving, or whole and paused under a name that is not its own yet
    PAUSED = "paused"  # has the machine's name, has not run here since it arrived
    RUNNING = "running"
    SUSPENDED = "suspended"  # stopped by its own hypervisor to be given away; memory is as it was


@unique
class Fate(Enum):
    """What became of a source's copy that is ABSENT."""

    AGAIN = "again"  # started anew on this host, and it runs: its guest has rebooted, or an operator did it
    ENDED = "ended"  # it has shut down by itself, or somebody has destroyed it
    LOST = "lost"  # with its host, which has come up again since


FATES: Final = {
    Fate.AGAIN: "the machine has ended, and was started anew here: it runs",
    Fate.ENDED: "the machine has shut down by itself, or its copy was destroyed: it does not run here",
    Fate.LOST: "its copy was lost with this host: it does not run here",
}
"""In words for people, what became of a copy that was to leave."""


class Hypervisor(Protocol):
    """What a relay needs of its local hypervisor at the hand-over."""

    kind: str
    """``xl`` or ``qmp``, as OFFER and the journal call it."""

    async def pin(self, vm: Vm, side: Side) -> Vm:
        """Which copy here is meant, so that no other of the same name and UUID is ever taken for it.

        There may be two: a machine may migrate within its host, and one that came back may meet what an earlier
        migration left of it. To be asked and written down as soon as that side's copy is there: at the source when the
        stream begins, at the destination when it is whole. Afterwards only that copy is asked about and acted upon.

        Returns:
            ``vm`` with ``copy``; as it is where a hypervisor has but one machine.

        Raises:
            HypervisorFailed: that side has no copy here, or it cannot be told which is meant.
        """

    def let_go(self) -> None:
        """Close what it keeps open between two questions; the next question opens it anew. Never raises."""

    async def arriving(self, vm: Vm) -> CopyState:
        """How the destination's copy stands: never SUSPENDED.

        Raises:
            HypervisorFailed: it cannot be asked.
        """

    async def departing(self, vm: Vm) -> CopyState:
        """How the source's copy stands: ABSENT, RUNNING, SUSPENDED, or PAUSED if its operator had paused it.

        Raises:
            HypervisorFailed: it cannot be asked.
        """

    async def fate(self, vm: Vm) -> Fate:
        """Source: what became of the copy that ``departing`` has called ABSENT.

        Raises:
            HypervisorFailed: it cannot be asked.
        """

    async def take(self, vm: Vm) -> None:
        """Destination: give an INCOMING copy the machine's name; nothing if it has it. It stays paused.

        Raises:
            HypervisorFailed: it has not got it; ``arriving`` says how things stand.
        """

    async def start(self, vm: Vm) -> None:
        """Destination: run a PAUSED copy; nothing if it runs.

        Raises:
            HypervisorFailed: it does not run; ``arriving`` says how things stand.
        """

    async def destroy(self, vm: Vm) -> None:
        """Destination: destroy an INCOMING or PAUSED copy until it is ABSENT; nothing if it is. Never a RUNNING one.

        Raises:
            HypervisorFailed: it is still there, or runs.
        """

    async def revive(self, vm: Vm) -> None:
        """Source: make the copy run under the machine's name, whatever state its hypervisor left it in.

        Nothing if it is ABSENT and the machine was started anew here since (``Fate.AGAIN``).

        Raises:
            HypervisorFailed: it does not run; the message says what an operator can do.
        """

    async def remove(self, vm: Vm) -> None:
        """Source: destroy a SUSPENDED copy until it is ABSENT; nothing if it is. Never a RUNNING one.

        Raises:
            HypervisorFailed: it is still there, or runs.
        """

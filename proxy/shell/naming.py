"""Which machine a session carries: its first channel is followed until it tells, and then held until it may go on.

What comes before the bytes that complete the name passes: it starts nothing, and whoever waits for its answer before it
says more would wait for ever. A stream that tells no name is held where that is certain.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from proxy.errors import HypervisorFailed
from proxy.hypervisors.base import Vm
from proxy.limits import XL_CONFIG_BYTES_MAX
from proxy.shell.waiting import Signal
from proxy.streams.formats import StreamFormat
from proxy.streams.parser import StreamParser

_IDENTITY_BYTES_MAX: Final = 4096 + XL_CONFIG_BYTES_MAX  # of a stream, within which it tells the machine's name

Serve = Callable[[Coroutine[Any, Any, None], str], object]


class Naming:
    """Follows one session's stream until it tells its machine's name.

    Args:
        serve: does something beside the session, whose failure is the session's.
        told: hears the name; None where nobody but ``ask`` needs it. Where there is somebody, a machine without a
            name that can be printed is an error.
        ask: may refuse, and take its time; is given None for a stream that tells no machine. None: nobody has a say.
    """

    def __init__(
        self,
        serve: Serve,
        *,
        told: Callable[[Vm], None] | None = None,
        ask: Callable[[Vm | None], Awaitable[None]] | None = None,
    ) -> None:
        self._serve, self._told, self._ask = serve, told, ask
        self._parser: StreamParser | None = StreamParser()
        self._seen_bytes = 0
        self._asking = False
        self._changed = Signal()

    @property
    def known(self) -> bool:
        """Whether it is certain which machine it is, or that the stream does not tell."""
        return self._parser is None

    @property
    def holds(self) -> bool:
        """Whether the machine is known and may not pass yet."""
        return self._asking

    @property
    def passed(self) -> bool:
        """Whether the machine may pass."""
        return self.known and not self._asking

    def saw(self, piece: memoryview) -> None:
        """The stream goes on with ``piece``; look at ``holds`` before it is passed on.

        Raises:
            HypervisorFailed: its name would break a hypervisor's list of machines, and with it every hand-over here.
        """
        if self._parser is None:
            return
        self._parser.feed(piece, final=False, urgent=True)
        self._seen_bytes += len(piece)
        facts = self._parser.facts
        if facts.vm_name:
            self.know(Vm(facts.vm_name, facts.vm_uuid or ""))
        elif facts.vm_told and self._told is not None:
            raise HypervisorFailed("the machine has no name, or one that cannot be printed or is too long: rename it")
        elif self._seen_bytes > _IDENTITY_BYTES_MAX or self._silent(self._parser):
            self.know(Vm("", facts.vm_uuid) if facts.vm_uuid else None)

    def ended(self) -> None:
        """The stream has ended: what it has not told it does not tell."""
        if self._parser is not None:
            self.know(None)

    def know(self, vm: Vm | None) -> None:
        """It is this machine; None where the stream does not tell."""
        self._parser = None
        if vm is not None and self._told is not None:
            self._told(vm)
        if self._ask is not None:
            self._asking = True
            self._serve(self._decide(self._ask, vm), "ask about the machine")
        self._changed.wake()

    async def released(self) -> None:
        """Wait until what has been seen may be passed on."""
        while self._asking:
            await self._changed.wait()

    async def until_passed(self) -> None:
        """Wait until the machine is known, and may pass."""
        while not self.passed:
            await self._changed.wait()

    async def _decide(self, ask: Callable[[Vm | None], Awaitable[None]], vm: Vm | None) -> None:
        await ask(vm)
        self._asking = False
        self._changed.wake()

    def _silent(self, parser: StreamParser) -> bool:
        """Whether the stream is past where it would tell a name."""
        if not parser.decided:
            return False
        facts = parser.facts
        if facts.format is StreamFormat.XL:
            return facts.vm_told or not parser.paged
        if facts.format is StreamFormat.QEMU:
            return bool(facts.blocks) or not parser.paged
        return True

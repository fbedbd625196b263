"""Keeps the QEMU that may migrate next prepared: one whose migration has begun can no longer be told to halt."""

import structlog

from proxy.errors import HypervisorFailed
from proxy.hypervisors.qmp import QemuMonitor

log = structlog.get_logger("korora.handover")


class QemuKeeper:
    """Of one ingress.

    Args:
        monitor: its QEMU's, whichever runs there; let go between two looks, as the session has one of its own.
    """

    def __init__(self, monitor: QemuMonitor) -> None:
        self._monitor = monitor
        self._said = ""

    async def prepare(self) -> None:
        """See that the next migration will halt. Where that cannot be done it is said once, and tried again later."""
        try:
            await self._monitor.guard_departure()
        except HypervisorFailed as error:
            if str(error) != self._said:
                self._said = str(error)
                log.warning("a migration that began now would be refused", reason=self._said)
        else:
            self._said = ""
        finally:
            self._monitor.let_go()

    async def let_through(self) -> None:
        """Nobody guards the migration under way: it must not wait for a word that does not come."""
        try:
            await self._monitor.let_through()
        except HypervisorFailed as error:
            log.warning("the unguarded migration is not helped on", reason=str(error))
        finally:
            self._monitor.let_go()

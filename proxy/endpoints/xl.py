"""xl: endpoint: each arriving migration gets an ``xl migrate-receive`` of its own, which outlives the relay."""

import os
import shlex
from collections.abc import Mapping
from typing import Literal

from proxy.endpoints.pipes import ProcessConnection, start
from proxy.endpoints.scope import scope


class XlEgress:
    """``xl migrate-receive -p`` as a process of its own; see docs/operations.md on winding it down.

    It is always told ``-p``: between its permission and its report xl would else start the domain by itself, and the
    hand-over has not been committed there (docs/handover.md). Who wants the domain paused says so to the hand-over.

    Under systemd it is started in a scope of its own: xl's monitor and libxl's device models come from it and have to
    live as long as the domain, where the relay's own unit is emptied whenever the relay is restarted.

    Args:
        flags: of "edp"; what the operator wants besides what a source asks for.
        label: the endpoint as the operator wrote it.
        program: xl, by name or path.
        environ: of this process; says whether systemd has started it.
    """

    single = True
    exclusive = False
    handover: Literal["", "xl"] = "xl"

    def __init__(self, flags: str, label: str, program: str = "xl", environ: Mapping[str, str] | None = None) -> None:
        self._flags, self.label, self._program = flags, label, program
        self._environ = os.environ if environ is None else environ
        self.paused = "p" in flags

    async def check(self) -> None:
        """See ``Egress.check``."""

    async def connect(self, xl_flags: str) -> ProcessConnection:
        """See ``Egress.connect``: the operator's flags, those the source asked for, and ``-p``."""
        flags = sorted({*self._flags, *xl_flags, "p"})
        command = [self._program, "migrate-receive", *(f"-{flag}" for flag in flags)]
        label = f"{self.label} ({shlex.join(command)})"
        return start([*scope("korora-xl", self._environ), *command], label, wind_down=True)

"""What makes departing sessions in a worker: an ingress makes one after another, a `korora xl` makes one."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from korora import report as reports
from korora.errors import line_of
from korora.xl.words import Verdict
from proxy.endpoints.handed import HandedPipes
from proxy.endpoints.sockets import GivenIngress
from proxy.errors import HypervisorFailed, PeerLost, RelayError, exit_code_of
from proxy.report import SessionReport
from proxy.shell.source import Source
from proxy.status import SessionStatus

log = structlog.get_logger("korora.worker")


class WayIn:
    """One ingress: a migration after another, until it is told to leave.

    Args:
        name: of the ingress.
        ingress: its listening socket.
        source: makes the sessions.
        carry: runs one session to its end, whatever happens.
        left: called when it has ended; its socket is to be closed then.
    """

    def __init__(
        self,
        name: str,
        ingress: GivenIngress,
        source: Source,
        carry: Callable[[Coroutine[Any, Any, None], SessionReport, str], Awaitable[None]],
        left: Callable[["WayIn"], None],
    ) -> None:
        self.name, self.ingress, self.source = name, ingress, source
        self._carry = carry
        self._leaving = False
        self._idle = True
        self.task = asyncio.get_running_loop().create_task(self._serve(), name=f"ingress {name}")
        self.task.add_done_callback(lambda _: left(self))  # a task that is cancelled before its first step has no end

    async def _serve(self) -> None:
        while not self._leaving:
            self._idle = True
            try:
                first = await self.source.accept()
            except HypervisorFailed as error:
                log.warning("an ingress is given up", ingress=self.name, reason=str(error))
                return
            self._idle = False
            report = self.source.new_report()
            await self._carry(self.source.session(first, report), report, self.name)

    def leave(self) -> None:
        """Take no further migration: end now where none is under way, else with that."""
        self._leaving = True
        if self._idle:
            self.task.cancel()

    def stop(self, reason: RelayError) -> None:
        """End the migration that is under way, and then."""
        self._leaving = True
        if self._idle or self.source.current is None:
            self.task.cancel()
        else:
            self.source.current.stop(reason)


class XlErrand:
    """The session of one `korora xl`; see ``korora.xl.desk.Errand``.

    Args:
        source: makes the session.
        pipes: xl's.
        carry: runs it to its end, whatever happens; the last argument says why it was stopped, if it was.
    """

    def __init__(
        self,
        source: Source,
        pipes: HandedPipes,
        carry: Callable[[Coroutine[Any, Any, None], SessionReport, Callable[[], RelayError | None]], Awaitable[None]],
    ) -> None:
        self._source, self._pipes, self._carry = source, pipes, carry
        self._report = source.new_report()
        self._work: asyncio.Future[None] | None = None
        self._reason: RelayError | None = None
        self.session_id = self._report.session_id

    async def run(self) -> Verdict | None:
        """See ``Errand.run``."""
        work = self._source.session(self._pipes, self._report)
        self._work = asyncio.ensure_future(self._carry(work, self._report, lambda: self._reason))
        try:
            await asyncio.wait({self._work})
        finally:
            self._work.cancel()  # nothing, unless it is we who are cancelled
        if not self._work.cancelled() and (bug := self._work.exception()) is not None:
            raise bug
        if self._pipes.left:
            return None
        report = self._report
        if report.ended is None:  # it was stopped before its first step
            work.close()
            await self._pipes.abort()
            reason = self._reason or PeerLost("the relay is stopping")
            return Verdict(exit_code_of(reason), line_of(reason), report.session_id)
        return Verdict(report.exit_code, report.error, report.session_id, reports.as_dict(report))

    def stop(self, reason: RelayError) -> None:
        """See ``Errand.stop``."""
        self._reason = self._reason or reason
        if self._source.current is not None:
            self._source.current.stop(reason)
        elif self._work is not None:
            self._work.cancel()

    def status(self) -> SessionStatus | None:
        """See ``Errand.status``."""
        return None if self._source.current is None else self._source.current.status()

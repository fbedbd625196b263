"""`korora receive`: one run of it, from its port to its exit code."""

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import structlog

from crypto.tls import TlsConfig, TlsRole
from korora import report as reports
from korora.authority import Office
from korora.errors import line_of
from korora.handovers import open_handovers, recover_for_ever
from korora.notary import Notary
from korora.progress import Progress
from korora.relay import (
    Common,
    Stopper,
    account,
    announce_ready,
    check_streams,
    on_record,
    open_office,
    paging_terms,
    run_loop,
    tls_config,
    write_report,
)
from proxy.endpoints.base import Egress
from proxy.endpoints.pipes import StdioEndpoint
from proxy.endpoints.sockets import listen_tcp
from proxy.errors import Interrupted, exit_code_of
from proxy.paging import PagingTerms
from proxy.report import SessionReport
from proxy.session import Role
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.handovers import Handovers

log = structlog.get_logger("korora")

_EGRESS = "default"  # what a source asks for, unless it is told otherwise


@dataclass(frozen=True, slots=True)
class ReceiveOptions:
    """`korora receive`."""

    common: Common
    listen: tuple[str, int]
    listen_text: str
    egress: Egress
    lanes: int = 1
    paging: PagingTerms = field(default_factory=PagingTerms)
    monitor: str = ""
    """Of the QEMU behind the egress, a path; empty for none."""
    guarded: bool = False
    """Whether sessions whose hand-over is not guarded are refused."""


def receive(options: ReceiveOptions) -> int:
    """Run `korora receive` until it ends; return its exit code."""
    return run_loop(lambda: _Receiver(options).run())


class _Receiver:
    """One run of `korora receive`."""

    def __init__(self, options: ReceiveOptions) -> None:
        self._options = options
        self._outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._running: set[DestinationRunner] = set()
        self._ended = asyncio.Event()
        self._stopping: Interrupted | None = None
        self._signalled = asyncio.Event()
        self._grace: asyncio.TimerHandle | None = None
        self._refusal: Exception | None = None
        self._accepted = False
        self._destination: Destination | None = None
        self._notary: Notary | None = None

    async def run(self) -> int:
        with paging_terms(self._options.common, self._options.paging) as paging:
            return await self._run(paging)

    async def _run(self, paging: PagingTerms) -> int:
        tls = tls_config(self._options.common, TlsRole.SERVER)
        self._notary = Notary(tls.identity, self._options.common.state_folder)
        async with open_office(self._options.common, tls) as office:
            return await self._serve(tls, paging, office)

    async def _serve(self, tls: TlsConfig, paging: PagingTerms, office: Office) -> int:
        options, common = self._options, self._options.common
        reports.check_writable(common.report)
        check_streams(options.egress)
        await options.egress.check()
        listener = listen_tcp(*options.listen, options.listen_text)
        handovers = open_handovers(common.state_folder, on_record(self._notary, office.custody), office.custody)
        self._destination = Destination(
            tls,
            {_EGRESS: options.egress},
            listener,
            terms=Terms(
                resume_seconds=common.resume_seconds,
                lanes=options.lanes,
                paging=paging,
                handovers=handovers,
                monitors={_EGRESS: options.monitor} if options.monitor else {},
                guarded=frozenset({_EGRESS} if options.guarded else ()),
                authority=office,
                platform=common.platform(),
                surveyor=common.surveyor(),
                notary=self._notary,
            ),
            begin=self._begin,
            failed=self._refused,
        )
        stopper = Stopper(self._stop)
        serving = asyncio.create_task(self._destination.serve())
        recovering = asyncio.create_task(recover_for_ever(handovers, common.reach))
        host, port = listener.getsockname()[:2]
        log.info("listening", address=f"{host}:{port}", to=options.egress.label)
        try:
            announce_ready(stdio=isinstance(options.egress, StdioEndpoint))
            code = await self._outcome
            if stopper.reason is not None:
                await self._drained()
            else:
                await self._told(self._destination, handovers)
            return code
        finally:
            listener.close()
            for task in (serving, recovering):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _begin(self, runner: DestinationRunner) -> None:
        common = self._options.common
        if common.once and self._destination is not None:
            self._destination.accepting = False
            self._accepted = True
            if self._grace is not None:
                self._grace.cancel()
        self._running.add(runner)
        if self._stopping is not None:
            runner.stop(self._stopping)  # it was let in just before the signal
        try:
            with Progress(lambda: runner):
                code = await account(runner.run(), runner.report, common.report, self._notary)
        finally:
            self._running.discard(runner)
            self._ended.set()
        if common.once:
            self._end(code)

    def _refused(self, failure: Exception) -> None:
        """A TLS peer was not let in: with --once, wait only so long for one that is."""
        if not self._options.common.once or self._accepted:
            return
        self._refusal = failure
        if self._grace is None:
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(self._options.common.resume_seconds, self._give_up)

    def _give_up(self) -> None:
        if self._refusal is not None and not self._accepted:
            print(line_of(self._refusal), file=sys.stderr, flush=True)  # noqa: T201 - for people
            code = exit_code_of(self._refusal)
            path = self._options.common.report
            if path is not None:
                now = datetime.now(UTC)
                report = SessionReport(role=Role.DESTINATION.value, session_id="", started=now, ended=now)
                reports.conclude(report, code, line_of(self._refusal))
                write_report(path, report)
            self._end(code)

    def _stop(self, reason: Interrupted) -> None:
        self._stopping = reason
        self._signalled.set()
        if self._destination is not None:
            self._destination.accepting = False
        for runner in self._running:
            runner.stop(reason)
        self._end(reason.code)

    async def _told(self, destination: Destination, handovers: Handovers) -> None:
        """A source that was away at the end may still come and ask how it was; a signal ends the wait."""
        seconds = self._options.common.resume_seconds
        both = asyncio.gather(destination.told(), handovers.told())
        stopped = asyncio.create_task(self._signalled.wait())
        await asyncio.sleep(0)
        if destination.untold or handovers.untold:
            log.info("the source may not know yet how it ended", seconds_max=seconds)
        waiting: tuple[asyncio.Future[Any], ...] = (both, stopped)
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(both, stopped, return_exceptions=True)

    async def _drained(self) -> None:
        while self._running:
            self._ended.clear()
            await self._ended.wait()

    def _end(self, code: int) -> None:
        if not self._outcome.done():
            self._outcome.set_result(code)

"""`korora send`: one run of it, from its endpoint to its exit code."""

import asyncio
from dataclasses import dataclass, replace

import structlog

from crypto.tls import TlsConfig, TlsRole
from korora import report as reports
from korora.authority import Office
from korora.handovers import finish_earlier, leave_behind, open_handovers, recover_for_ever
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
)
from proxy.endpoints.base import Ingress
from proxy.endpoints.pipes import StdioEndpoint
from proxy.errors import EXIT_DONE, HypervisorFailed, Interrupted
from proxy.shell.source import Peer, Source

log = structlog.get_logger("korora")


@dataclass(frozen=True, slots=True)
class SendOptions:
    """`korora send`."""

    common: Common
    ingress: Ingress
    peer: Peer
    monitor: str = ""
    """Of the QEMU that migrates, a path; empty for none."""
    transport: bool = False
    """Whether xl has started us for one migration: it reads our standard output, and waits for our end."""
    recover_seconds: int = 0
    """How long a process of its own looks after a hand-over that such a transport could not finish."""


def send(options: SendOptions) -> int:
    """Run `korora send` until it ends; return its exit code."""
    return run_loop(lambda: _Sender(options).run())


class _Sender:
    """One run of `korora send`."""

    def __init__(self, options: SendOptions) -> None:
        self._options = options
        self._source: Source | None = None
        self._task: asyncio.Task[int] | None = None
        self._stopped = False
        self._notary: Notary | None = None

    async def run(self) -> int:
        with paging_terms(self._options.common, self._options.peer.paging) as paging:
            common = self._options.common
            peer = replace(self._options.peer, paging=paging, platform=common.platform(), surveyor=common.surveyor())
            return await self._run(peer)

    async def _run(self, peer: Peer) -> int:
        tls = tls_config(self._options.common, TlsRole.CLIENT)
        self._notary = Notary(tls.identity, self._options.common.state_folder)
        async with open_office(self._options.common, tls) as office:
            return await self._serve(tls, peer, office)

    async def _serve(self, tls: TlsConfig, peer: Peer, office: Office) -> int:
        options, common = self._options, self._options.common
        reports.check_writable(common.report)
        check_streams(options.ingress)
        await options.ingress.open()
        told = on_record(self._notary, office.custody)
        handovers = self._handovers = open_handovers(common.state_folder, told, office.custody)
        self._source = Source(
            tls,
            peer,
            options.ingress,
            handovers=handovers,
            monitor=options.monitor,
            authority=office,
            notary=self._notary,
        )
        stopper = Stopper(self._stop)
        recovering: asyncio.Task[None] | None = None
        log.info("taking migrations", source=options.ingress.label, peer=options.peer.address)
        try:
            await self._source.ready()
            if not options.transport:
                announce_ready(stdio=isinstance(options.ingress, StdioEndpoint))
            self._task = asyncio.create_task(self._sessions())
            if not options.transport:
                recovering = asyncio.create_task(recover_for_ever(handovers, common.reach))
            return await self._task
        except asyncio.CancelledError:
            if stopper.reason is None:
                raise
            return stopper.reason.code
        finally:
            if recovering is not None:
                recovering.cancel()
                await asyncio.gather(recovering, return_exceptions=True)
            await options.ingress.close()

    async def _sessions(self) -> int:
        options = self._options
        source = self._source
        if options.transport:
            await finish_earlier(self._handovers, options.common.reach(), options.peer.address)
        while source is not None:
            report = source.new_report()
            try:
                first = await source.accept()
            except HypervisorFailed as error:
                return await account(_fails(error), report, options.common.report)
            with Progress(lambda: source.current):
                code = await account(source.session(first, report), report, options.common.report, self._notary)
            if options.transport and options.recover_seconds:
                common = options.common
                await asyncio.to_thread(
                    leave_behind,
                    self._handovers,
                    report.session_id,
                    identity=common.identity,
                    state=common.state_folder,
                    rules=common.rules,
                    seconds=options.recover_seconds,
                )
            if options.common.once or options.ingress.single or self._stopped:
                return code
        return EXIT_DONE

    def _stop(self, reason: Interrupted) -> None:
        self._stopped = True
        if self._source is not None and self._source.current is not None:
            self._source.current.stop(reason)
        elif self._task is not None:
            self._task.cancel()


async def _fails(error: Exception) -> None:
    raise error

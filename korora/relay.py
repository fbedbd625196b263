"""`korora send` and `korora receive`: identity, endpoints, sessions and signals put together."""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import structlog
import uvloop

from chunking.limits import STORE_BYTES_DEFAULT
from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from korora import report as reports
from korora.authority import APPROVALS, Office
from korora.custody import Custody, note_policy
from korora.errors import complain, line_of
from korora.handovers import finish_earlier, leave_behind, open_handovers, reach, recover_for_ever
from korora.host_store import open_host_store
from korora.memory import affordable, give_back
from korora.notary import Notary
from korora.policy.board import Board
from korora.policy.desk import Desk
from korora.policy.file import PolicyFile
from korora.progress import Progress
from proxy.attestation import Platform
from proxy.endpoints.base import Egress, Ingress
from proxy.endpoints.pipes import StdioEndpoint
from proxy.endpoints.sockets import listen_tcp
from proxy.errors import EXIT_BUG, EXIT_DONE, ConfigurationError, HypervisorFailed, Interrupted, exit_code_of
from proxy.handover.record import Record
from proxy.paging import PagingTerms
from proxy.preflight import Surveyor
from proxy.report import SessionReport
from proxy.session import Role
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.handovers import Handovers, Reach
from proxy.shell.source import Peer, Source

log = structlog.get_logger("korora")

_EGRESS = "default"  # what a source asks for, unless it is told otherwise
_GC_ALLOCATIONS = 10_000  # the default 700 costs 3 % of a relay's time


@dataclass(frozen=True, slots=True)
class Common:
    """What both commands are told."""

    identity: Path
    rules: PeerRules
    once: bool
    report: Path | None
    resume_seconds: int
    state: Path | None = None
    """What is kept between sessions; None: ``state`` in the identity's folder."""
    store_bytes: int = STORE_BYTES_DEFAULT
    """Of the content store; 0 for none."""
    policy: Path | None = None
    """Who may migrate what; None: whoever has authenticated, everything."""
    approvals: str | None = None
    """Path of the socket by which people approve."""

    attestation: Path | None = None
    """The folder of what peers' platforms may be; None: nothing is demanded of them."""
    tpm: str = ""
    """TCTI of this host's TPM; empty for none."""
    preflight: Literal["on", "off", "strict"] = "on"
    """Whether both hosts are looked at before each session; strict: warnings refuse, too."""

    def surveyor(self) -> Surveyor | None:
        """What knows this host, and judges others; None where preflight is off."""
        if self.preflight == "off":
            return None
        from korora.preflight.agent import open_surveyor

        return open_surveyor(self.preflight, self.state_folder, self.tpm)

    def platform(self) -> Platform | None:
        """What this host shows of itself and demands of others; None for neither.

        Raises:
            ReferenceInvalid: there is no such folder.
        """
        if self.attestation is None and not self.tpm:
            return None
        from korora.platform import open_platform

        return open_platform(self.tpm, self.attestation, state=self.state_folder)

    @property
    def state_folder(self) -> Path:
        """Where this relay keeps what outlives its sessions."""
        return self.state or self.identity / "state"

    def reach(self) -> Reach:
        """How peers of earlier sessions are reached: by the rules of today's."""
        return reach(self.identity, self.rules)


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


def receive(options: ReceiveOptions) -> int:
    """Run `korora receive` until it ends; return its exit code."""
    return _run(lambda: _Receiver(options).run())


def send(options: SendOptions) -> int:
    """Run `korora send` until it ends; return its exit code."""
    return _run(lambda: _Sender(options).run())


def _run(work: Callable[[], Coroutine[Any, Any, int]]) -> int:
    # What is loaded by now lives as long as the process, and a session makes no cycles worth looking for often.
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS)

    async def inside() -> int:
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(inside())


def _check_streams(endpoint: Egress | Ingress) -> None:
    """`stdio:` with a closed stream would write a migration nowhere, or read an empty one.

    Raises:
        ConfigurationError: standard input or output was closed when the process began.
    """
    if isinstance(endpoint, StdioEndpoint):
        for name, stream in (("standard input", sys.stdin), ("standard output", sys.stdout)):
            if stream is None:
                raise ConfigurationError(f"{endpoint.label}: {name} is closed", "give it a pipe, a file or /dev/null")


@contextmanager
def _host_store(common: Common, paging: PagingTerms) -> Iterator[PagingTerms]:
    """The terms with the content store, while it is open."""
    host_store = open_host_store(common.state_folder, common.store_bytes) if paging.wanted and paging.tenant else None
    try:
        yield replace(paging, store=host_store, cache_bytes=affordable(paging.cache_bytes))
    finally:
        if host_store is not None:
            host_store.close()


@asynccontextmanager
async def _office(common: Common, tls: TlsConfig) -> AsyncIterator[Office]:
    """Whoever has a say, while a command runs: the policy is read again on SIGHUP, and a bad one changes nothing.

    Raises:
        ConfigurationError: the policy is bad, or the socket for approvals cannot be listened on.
    """
    policy = PolicyFile(common.policy)
    note_policy(common.state_folder, policy)
    office = Office(tls.identity.name, policy, common.state_folder)

    def reload() -> None:
        with suppress(ConfigurationError):  # it has said so
            policy.reload()
            office.reload(policy)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reload)
    desk = None
    if common.approvals is not None:
        desk = Desk(common.approvals, Board(common.state_folder / APPROVALS))
        await desk.start()
    try:
        yield office
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        if desk is not None:
            await desk.close()


def _on_record(notary: Notary | None, custody: Custody) -> Callable[[Record], None]:
    """What puts the end of a hand-over on record whose session is over."""

    def settled(record: Record) -> None:
        if notary is not None and not notary.knows(record):
            # A thread has it when this returns, and the loop's end waits for threads.
            asyncio.get_running_loop().run_in_executor(None, notary.settled, record, custody.acts(record))

    return settled


def _tls(common: Common, role: TlsRole) -> TlsConfig:
    return TlsConfig(Identity.load(common.identity, now=datetime.now(UTC)), role, common.rules)


def announce_ready(*, stdio: bool) -> None:
    """The first and only line of standard output, once work can be taken.

    Raises:
        ConfigurationError: nobody can read it.
    """
    try:
        print("ready", file=sys.stderr if stdio else sys.stdout, flush=True)
    except OSError as error:
        # What could not be written is tried again when Python ends, and would fail there once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise ConfigurationError(
            f"cannot write to standard output: {error.strerror}", "give it a file, /dev/null or a pipe that is read"
        ) from None


class _Stopper:
    """Turns SIGINT and SIGTERM into one orderly stop."""

    def __init__(self, stop: Callable[[Interrupted], None]) -> None:
        self.reason: Interrupted | None = None
        self._stop = stop
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: int) -> None:
        if self.reason is None:
            self.reason = Interrupted(number)
            self._stop(self.reason)


async def _account(
    work: Coroutine[Any, Any, None], report: SessionReport, path: Path | None, notary: Notary | None = None
) -> int:
    """Run a session to its end, write its report, sign how it ended, say so in one line; return its exit code."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    code, words = EXIT_DONE, None
    try:
        await work
    except Exception as error:
        code, words = exit_code_of(error), line_of(error)
        if code == EXIT_BUG:
            log.debug("internal error", exc_info=error)
    report.ended = datetime.now(UTC)
    report.seconds = round(loop.time() - began, 6)
    await asyncio.to_thread(give_back)
    reports.conclude(report, code, words)
    if notary is not None:
        await asyncio.to_thread(notary.ended, report)
    if path is not None:
        await asyncio.to_thread(_write_report, path, report)
    facts = {
        "session": report.session_id[:8],
        "peer": report.peer,
        "seconds": round(report.seconds, 3),
        "bytes_forward": report.bytes_in["forward"],
        "bytes_backward": report.bytes_in["backward"],
    }
    if words is not None:
        log.info("session failed", exit_code=code, outcome=report.outcome, **facts)
        print(words, file=sys.stderr, flush=True)  # noqa: T201 - for people
    else:
        log.info("session done", **facts, cipher=report.cipher, group=report.group)
    return code


def _write_report(path: Path, report: SessionReport) -> None:
    """Write the report; where that fails the session still ended as it did, so its exit code stands."""
    try:
        reports.write(path, report)
    except OSError as error:
        complain(ConfigurationError(f"cannot write the report {path}: {error.strerror or error}", "free space there"))


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
        with _host_store(self._options.common, self._options.paging) as paging:
            return await self._run(paging)

    async def _run(self, paging: PagingTerms) -> int:
        tls = _tls(self._options.common, TlsRole.SERVER)
        self._notary = Notary(tls.identity, self._options.common.state_folder)
        async with _office(self._options.common, tls) as office:
            return await self._serve(tls, paging, office)

    async def _serve(self, tls: TlsConfig, paging: PagingTerms, office: Office) -> int:
        options, common = self._options, self._options.common
        reports.check_writable(common.report)
        _check_streams(options.egress)
        await options.egress.check()
        listener = listen_tcp(*options.listen, options.listen_text)
        handovers = open_handovers(common.state_folder, _on_record(self._notary, office.custody), office.custody)
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
        stopper = _Stopper(self._stop)
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
                code = await _account(runner.run(), runner.report, common.report, self._notary)
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
                _write_report(path, report)
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


class _Sender:
    """One run of `korora send`."""

    def __init__(self, options: SendOptions) -> None:
        self._options = options
        self._source: Source | None = None
        self._task: asyncio.Task[int] | None = None
        self._stopped = False
        self._notary: Notary | None = None

    async def run(self) -> int:
        with _host_store(self._options.common, self._options.peer.paging) as paging:
            common = self._options.common
            peer = replace(self._options.peer, paging=paging, platform=common.platform(), surveyor=common.surveyor())
            return await self._run(peer)

    async def _run(self, peer: Peer) -> int:
        tls = _tls(self._options.common, TlsRole.CLIENT)
        self._notary = Notary(tls.identity, self._options.common.state_folder)
        async with _office(self._options.common, tls) as office:
            return await self._serve(tls, peer, office)

    async def _serve(self, tls: TlsConfig, peer: Peer, office: Office) -> int:
        options, common = self._options, self._options.common
        reports.check_writable(common.report)
        _check_streams(options.ingress)
        await options.ingress.open()
        told = _on_record(self._notary, office.custody)
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
        stopper = _Stopper(self._stop)
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
                return await _account(_fails(error), report, options.common.report)
            with Progress(lambda: source.current):
                code = await _account(source.session(first, report), report, options.common.report, self._notary)
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

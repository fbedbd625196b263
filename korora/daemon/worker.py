"""A worker: carries the sessions that the parent hands it, and ends with the parent.

`python -m korora.daemon.worker FD INDEX FORMAT LEVEL METRICS`, FD being its end of the socket pair and METRICS the
directory to count into, or nothing. It holds the identity's
keys, the parent's configuration and nothing else; what it says goes to standard error and to the parent.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop

from crypto.errors import CryptoError
from korora import report as reports
from korora.authority import Office
from korora.custody import note_policy
from korora.daemon import build
from korora.daemon.admission import Admission
from korora.daemon.config import XL, Config
from korora.daemon.departing import WayIn, XlErrand
from korora.daemon.handing import Handing
from korora.daemon.kept import keep_or_tell, tell
from korora.daemon.messages import (
    SAMPLE_SESSIONS,
    Begun,
    Cancel,
    Configure,
    Configured,
    Drain,
    Drained,
    Ended,
    Greet,
    Greeted,
    Lanes,
    Leave,
    Left,
    Quit,
    Rates,
    Refused,
    Sample,
    Serve,
    Stop,
    Take,
    ToWorker,
)
from korora.daemon.observer import Observer, Unobserved
from korora.daemon.wire import Wire
from korora.errors import complain, line_of
from korora.host_store import HostStore
from korora.log import LogFormat, LogLevel, configure
from korora.memory import give_back_soon, prepare
from korora.notary import Notary
from korora.xl.desk import Desk
from korora.xl.words import Carry
from proxy.attestation import Platform
from proxy.endpoints.handed import HandedIngress, HandedPipes
from proxy.endpoints.sockets import GivenIngress
from proxy.errors import (
    EXIT_BUG,
    EXIT_DONE,
    Interrupted,
    PeerLost,
    PolicyRefused,
    RelayError,
    SessionCancelled,
    exit_code_of,
)
from proxy.handover.record import Record
from proxy.preflight import Surveyor
from proxy.report import SessionReport
from proxy.session import Role
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.runner import Runner
from proxy.shell.source import Peer, Source, SourceRunner
from proxy.wire import LANE_TOKEN_BYTES

log = structlog.get_logger("korora.worker")

SAMPLE_SECONDS: Final = 1.0
LAG_SECONDS: Final = 0.25  # how often the loop's lag is looked at


def tokens_of(index: int) -> Callable[[int], bytes]:
    """The source of lane tokens of one worker: the first of their bytes says whose they are, the rest is random."""

    def random(size: int) -> bytes:
        return bytes([index]) + os.urandom(size - 1) if size == LANE_TOKEN_BYTES else os.urandom(size)

    return random


class Worker:
    """One worker process.

    Args:
        sock: its end of the socket pair.
        index: its number, which its lanes' tokens begin with.
        observer: counts what happens here.
    """

    def __init__(self, sock: socket.socket, index: int, observer: Observer) -> None:
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._index = index
        self._random = tokens_of(index)
        self._over: asyncio.Future[int] = self._loop.create_future()
        self._config: Config | None = None
        self._credentials: build.Credentials | None = None
        self._admission: Admission | None = None
        self._office: Office | None = None
        self._platform: Platform | None = None
        self._surveyor: Surveyor | None = None
        self._notary: Notary | None = None
        self._host_store: HostStore | None = None
        self._destination: Destination | None = None
        self._ways: dict[str, WayIn] = {}
        self._live: dict[tuple[str, str], Runner] = {}
        self._xl_max = 0
        self._handing = Handing(observer, self._settled)
        self._desk = Desk(self._xl_session, self._handing.readopt, heard=self._greeted, idle=self._maybe_drained)
        self._carried = 0
        self._draining = self._drained = False
        self._code: int | None = None
        self._stopping: RelayError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._services: list[asyncio.Task[None]] = []
        self._lag = 0.0
        # One configuration after the other, and each before what follows it.
        # mypy knows a union as a type of things, not as a thing that can be given.
        self._wire = Wire(sock, ToWorker, take=self._hear, gone=self._orphaned)  # type: ignore[arg-type]

    async def run(self) -> int:
        """Carry sessions until the parent says so, or has gone; return the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A terminal's Ctrl-C goes to the whole group; it is the parent's to decide what follows. Not SIG_IGN, which
            # the commands of exec: would inherit.
            self._loop.add_signal_handler(number, lambda: None)
        self._services += [asyncio.create_task(self._sample()), asyncio.create_task(self._watch_lag())]
        try:
            return await self._over
        finally:
            for task in self._services:
                task.cancel()
            await self._desk.close()
            if self._destination is not None:
                await self._destination.close()
            for way in list(self._ways.values()):
                way.task.cancel()
            ways = [way.task for way in self._ways.values()]
            await asyncio.gather(*self._services, *ways, return_exceptions=True)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._host_store is not None:
                await asyncio.to_thread(self._host_store.close)
            self._wire.close()

    # ---- the parent's words

    def _hear(self, message: ToWorker, fd: int | None) -> None:
        match message:
            case Configure():
                self._task(self._configure(message))
            case Take() | Greet() | Serve():
                self._given(message, fd)
            case Leave(name):
                self._leave(name)
            case Rates(rates):
                self._change_rates(rates)
            case Cancel(session_id):
                self._cancel(session_id)
            case Lanes(session_id, count):
                self._choose_lanes(session_id, count)
            case Drain():
                self._drain()
            case Stop(number):
                self._stop(Interrupted(number))
            case Quit():
                self._end(EXIT_DONE)

    def _given(self, message: Take | Greet | Serve, fd: int | None) -> None:
        """A message that brings a socket along."""
        if fd is None:
            log.error("the parent sent a connection message without its connection")
            return
        sock = socket.socket(fileno=fd)
        match message:
            case Take(address):
                self._take(sock, address)
            case Greet(uid, pid):
                self._desk.take(sock, uid, pid)
            case Serve(name, label):
                self._serve(name, GivenIngress(sock, label))

    def _leave(self, name: str) -> None:
        if name in self._ways:
            self._ways[name].leave()
        else:
            self._wire.send(Left(name))

    def _orphaned(self) -> None:
        """The parent has gone: nobody hands us lanes any more, and nobody could stop us."""
        log.error("the daemon's parent process is gone: its sessions end")
        self._stop(PeerLost("the relay's parent process is gone"))
        self._end(EXIT_DONE)

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _configure(self, message: Configure) -> None:
        """Take a configuration over, or keep the old one and say why."""
        config = message.config
        try:
            credentials = await asyncio.to_thread(build.Credentials.load, config)
            egresses = build.egresses(config)
            policy = await asyncio.to_thread(build.policy_of, config)
            platform = await asyncio.to_thread(build.platform_of, config, self._observer)
            await asyncio.to_thread(note_policy, Path(config.state), policy)
        except (CryptoError, RelayError) as error:
            self._wire.send(Configured(message.generation, line_of(error)))
            return
        self._platform, self._surveyor = platform, build.surveyor_of(config, self._observer)
        if self._host_store is None:
            self._host_store = await asyncio.to_thread(build.open_host_store, config)
        if self._office is None:
            self._office = Office(credentials.identity.name, policy, Path(config.state), watch=self._observer)
        else:
            self._office.reload(policy)
        if self._handing.configure(config, self._office.custody) and self._index == 0:  # one of us is enough
            self._services.append(asyncio.create_task(self._handing.recover()))
        if self._notary is None:
            self._notary = Notary(credentials.identity, Path(config.state), self._observer)
        else:
            self._notary.reload(credentials.identity)
        if self._admission is None:
            self._admission = Admission(Path(config.state) / build.LOCKS, self._loop.time)
        self._admission.reconfigure(config, egresses)
        terms = Terms(
            resume_seconds=config.limits.resume_timeout,
            lanes=config.listen.lanes,
            sessions_max=message.arriving_max,
            paging=build.paging_of(config, self._host_store),
            tenants=build.tenants(config),
            handovers=self._handing.handovers,
            monitors=build.monitors(config),
            guarded=build.guarded(config),
            random=self._random,
            admit=self._admission.admit,
            allow=self._admission.allow,
            authority=self._office,
            platform=self._platform,
            surveyor=self._surveyor,
            notary=self._notary,
        )
        self._config, self._credentials, self._xl_max = config, credentials, message.xl_max
        self._observer.identity(credentials.identity)
        if self._destination is None:
            self._destination = Destination(
                credentials.server, egresses, None, terms=terms, begin=self._begin, failed=self._refused
            )
        else:
            self._destination.reconfigure(credentials.server, egresses, terms)
        for name, way in self._ways.items():
            ingress = config.ingress_named(name)
            if ingress is not None:
                where = self._of_this_host(build.destination_of(config, ingress, self._host_store))
                way.source.reconfigure(credentials.clients[ingress.peer], where, build.monitor_of(ingress))
        self._wire.send(Configured(message.generation))

    def _of_this_host(self, where: Peer) -> Peer:
        """A destination, with what this host shows it of itself and demands of it."""
        return replace(where, platform=self._platform, surveyor=self._surveyor)

    def _take(self, sock: socket.socket, address: str) -> None:
        if self._destination is None or self._stopping is not None:
            sock.close()
            return
        self._destination.take(sock, address)

    def _serve(self, name: str, given: GivenIngress) -> None:
        config, credentials = self._config, self._credentials
        ingress = None if config is None else config.ingress_named(name)
        if config is None or credentials is None or ingress is None or self._draining or name in self._ways:
            self._task(given.close())
            self._wire.send(Left(name))
            return
        where = self._of_this_host(build.destination_of(config, ingress, self._host_store))
        source = Source(
            credentials.clients[ingress.peer],
            where,
            given,
            begun=lambda runner: self._opened(runner, name),
            handovers=self._handing.handovers,
            monitor=build.monitor_of(ingress),
            authority=self._office,
            notary=self._notary,
        )
        self._ways[name] = WayIn(name, given, source, self._account, self._left)

    def _xl_session(self, ask: Carry, uid: int, pipes: HandedPipes, begun: Callable[[], None]) -> XlErrand:
        """See ``Begin``."""
        config, credentials = self._config, self._credentials
        if config is None or credentials is None or not config.xl.socket or self._draining:
            raise PolicyRefused("no further session is taken now: the daemon is coming up or going down")
        if self._desk.errands >= self._xl_max:
            raise PolicyRefused(f"{config.xl.sessions_max} sessions of korora xl run, and no more may")
        client, where = build.xl_destination(config, ask.peer, ask.names, ask.flags, self._host_store)
        where = self._of_this_host(where)

        def opened(runner: SourceRunner) -> None:
            begun()
            self._opened(runner, XL)

        source = Source(
            credentials.clients[client],
            where,
            HandedIngress(),
            begun=opened,
            handovers=self._handing.handovers,
            holder=pipes.holder,
            authority=self._office,
            notary=self._notary,
        )
        errand = XlErrand(source, pipes, lambda work, report, why: self._account(work, report, XL, why))
        log.info("xl migrates", session=errand.session_id[:8], peer=ask.peer, uid=uid)
        return errand

    def _greeted(self) -> None:
        self._wire.send(Greeted())

    def _left(self, way: WayIn) -> None:
        self._task(self._close_way(way))

    async def _close_way(self, way: WayIn) -> None:
        await way.ingress.close()
        self._ways.pop(way.name, None)
        self._wire.send(Left(way.name))
        self._maybe_drained()

    def _change_rates(self, rates: dict[str, float | None]) -> None:
        for session_id, rate in rates.items():
            live = self._live.get((session_id, Role.SOURCE.value))
            if live is not None:
                live.set_rate(rate)

    def _cancel(self, session_id: str) -> None:
        host = "" if self._credentials is None else f" of {self._credentials.identity.name}"
        for (known, _), live in list(self._live.items()):
            if known == session_id:
                live.stop(SessionCancelled(f"cancelled by an operator{host}"))

    def _choose_lanes(self, session_id: str, count: int) -> None:
        live = self._live.get((session_id, Role.SOURCE.value))
        if isinstance(live, SourceRunner):
            live.set_lanes(count)

    # ---- sessions

    async def _begin(self, runner: DestinationRunner) -> None:
        """See ``Destination.begin``."""
        admission = self._admission
        session = runner.session.id
        way = "" if admission is None else admission.begun(session)
        self._opened(runner, way)
        try:
            await self._account(runner.run(), runner.report, way)
        finally:
            if admission is not None:
                admission.ended(session)
            self._loop.call_soon(self._maybe_drained)  # the destination counts it until we have returned

    def _opened(self, runner: SourceRunner | DestinationRunner, way: str) -> None:
        """A session is open: from now on it is sampled, limited and can be cancelled."""
        report = runner.report
        self._live[report.session_id, report.role] = runner
        self._wire.send(Begun(way, runner.status()))
        self._observer.session_begun(report.role)
        if self._stopping is not None:
            runner.stop(self._stopping)  # it was agreed on just before

    async def _account(
        self,
        work: Coroutine[Any, Any, None],
        report: SessionReport,
        way: str,
        why: Callable[[], RelayError | None] = lambda: None,
    ) -> None:
        """Run a session to its end, keep its report, say how it went; `why` tells the reason of a cancellation."""
        began = self._loop.time()
        self._carried += 1
        code, words = EXIT_DONE, None
        failure: BaseException | None = None
        key = (report.session_id, report.role)
        try:
            await work
        except Exception as error:
            failure, code, words = error, exit_code_of(error), line_of(error)
            if code == EXIT_BUG:
                log.debug("internal error", exc_info=error)
        except asyncio.CancelledError:
            stopping = why() or self._stopping or PeerLost("the relay is stopping")
            code, words = exit_code_of(stopping), line_of(stopping)
            raise
        finally:
            live = self._live.pop(key, None)
            report.ended = datetime.now(UTC)
            report.seconds = round(self._loop.time() - began, 6)
            reports.conclude(report, code, words)
            status = None if live is None else live.status()
            self._wire.send(Ended(*key, way, report.peer, report.outcome, code, report.seconds, words, status))
            self._observer.session_ended(report, status, failure)
            tell(report, way, words)
            live = failure = None
            if self._notary is not None:
                self._task(asyncio.to_thread(self._notary.ended, report))
            if self._config is not None:
                self._task(keep_or_tell(Path(self._config.state) / build.REPORTS, report))
            self._carried -= 1
            self._maybe_drained()
            give_back_soon()

    def _settled(self, record: Record) -> None:
        """A hand-over is decided; where its session is over, its outcome is put on record."""
        notary = self._notary
        if notary is not None and self._office is not None and not notary.knows(record):
            self._task(asyncio.to_thread(notary.settled, record, self._office.custody.acts(record)))

    def _refused(self, failure: Exception) -> None:
        """See ``Destination.failed``."""
        self._observer.peer_refused(failure)
        self._wire.send(Refused(str(failure)))

    # ---- the end

    def _drain(self) -> None:
        self._draining = True
        if self._destination is not None:
            self._destination.accepting = False
        for way in list(self._ways.values()):
            way.leave()
        self._maybe_drained()

    def _maybe_drained(self) -> None:
        """Something has ended: was it the last?"""
        destination = self._destination
        left = (
            self._carried + self._desk.errands + len(self._ways) + (0 if destination is None else destination.sessions)
        )
        if destination is not None and self._stopping is None:
            left += destination.untold  # a source that was away at the end may still come and ask how it was
        if self._draining and not self._drained and not left:
            self._drained = True
            self._wire.send(Drained())
        if self._code is not None and not self._carried and not self._desk.errands and not self._over.done():
            self._over.set_result(self._code)

    def _stop(self, reason: RelayError) -> None:
        if self._stopping is None:
            self._stopping = reason
        self._drain()
        for live in list(self._live.values()):
            live.stop(reason)
        self._desk.stop(reason)
        for way in list(self._ways.values()):
            way.stop(reason)

    def _end(self, code: int) -> None:
        """End when the last session has, at once if there is none."""
        self._code = code
        self._maybe_drained()

    # ---- services

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            statuses = [live.status() for live in self._live.values()]
            lag, self._lag = self._lag, 0.0
            self._observer.sample(statuses, lag)
            if self._host_store is not None:
                self._observer.store(self._host_store.counts())
            self._desk.sample()
            self._maybe_drained()
            for start in range(0, max(1, len(statuses)), SAMPLE_SESSIONS):
                self._wire.send(Sample(tuple(statuses[start : start + SAMPLE_SESSIONS]), lag))

    async def _watch_lag(self) -> None:
        while True:
            before = self._loop.time()
            await asyncio.sleep(LAG_SECONDS)
            self._lag = max(self._lag, self._loop.time() - before - LAG_SECONDS)


def _observer(directory: Path, worker: str) -> Observer:
    from korora.metrics import family, instruments
    from korora.metrics.observer import Observer as Counting

    return Counting(instruments.Instruments.shared(directory, worker), family.Side.WORKER, worker)


def main() -> None:
    """Run the worker that the arguments describe."""
    fd, index, log_format, level, metrics = sys.argv[1:6]
    configure(LogFormat(log_format), LogLevel(level))
    try:
        observer = _observer(Path(metrics), index) if metrics else Unobserved()
    except RelayError as error:
        sys.exit(complain(error))
    sock = socket.socket(fileno=int(fd))
    os.set_inheritable(sock.fileno(), False)
    prepare()

    async def work() -> int:
        return await Worker(sock, int(index), observer).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(work()))


if __name__ == "__main__":
    main()

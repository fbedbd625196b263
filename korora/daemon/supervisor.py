"""The parent: opens what the daemon listens on, keeps the workers, and answers signals and operators."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Coroutine, Mapping
from enum import StrEnum, unique
from pathlib import Path
from typing import Any, Final

import structlog

from crypto.errors import CryptoError
from korora.authority import APPROVALS
from korora.daemon import config, control, notify
from korora.daemon.checks import check, make_state, unchanged
from korora.daemon.config import XL, Config
from korora.daemon.crew import QUIT_SECONDS_MAX, Member
from korora.daemon.facts import Counts, facts
from korora.daemon.listeners import Listeners
from korora.daemon.messages import (
    Begun,
    Cancel,
    Configure,
    Drain,
    Drained,
    Ended,
    Greet,
    Greeted,
    Lanes,
    Leave,
    Left,
    Rates,
    Refused,
    Sample,
    Stop,
    ToParent,
)
from korora.daemon.observer import Observer, Unobserved
from korora.daemon.rates import part
from korora.daemon.table import Sessions
from korora.daemon.ways import Way, Ways
from korora.errors import complain, line_of
from korora.log import LogFormat, LogLevel
from korora.relay import announce_ready
from proxy.errors import EXIT_BUG, EXIT_DONE, EXIT_SIGNAL_BASE, ConfigurationError, RelayError
from proxy.session import Role

log = structlog.get_logger("korora.daemon")

TICK_SECONDS: Final = 1.0  # rates are divided anew, the service manager is told how we are
STOP_SECONDS_MAX: Final = 70.0  # to tell peers and hypervisors, once sessions are ended; then workers are killed


@unique
class Phase(StrEnum):
    """Where the daemon is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    RELOADING = "reloading"
    DRAINING = "draining"
    STOPPING = "stopping"


class Supervisor:
    """One run of `korora serve`.

    Args:
        path: the configuration file, read again by a reload.
        first: what it held.
        inherited: listening sockets by name (notify.py).
        notifier: the service manager.
        log_format, log_level: for the workers.
    """

    def __init__(
        self,
        path: Path,
        first: Config,
        *,
        inherited: Mapping[str, socket.socket],
        notifier: notify.Notifier,
        log_format: LogFormat,
        log_level: LogLevel,
    ) -> None:
        self._path, self._config = path, first
        self._inherited = dict(inherited)
        self._notifier = notifier
        self._observer: Observer = Unobserved()
        self._log_options = (log_format, log_level)
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[int] = self._loop.create_future()
        self.phase = Phase.STARTING
        self._name = ""
        self._generation = 1
        self._members: list[Member] = []
        self._drained: set[int] = set()
        self._workers = first.workers or len(os.sched_getaffinity(0))
        self._ways = Ways(self._inherited, self._workers)
        self._sessions = Sessions(first)
        self._listeners = Listeners(self._inherited)
        self._reloading = asyncio.Lock()
        self._counts = Counts()
        self._code = EXIT_DONE
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told = ""

    # ---- life

    async def run(self) -> int:
        """Serve until told to end; the exit code.

        Raises:
            ConfigurationError, CryptoError: it could not begin.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signalled, number)
        self._loop.add_signal_handler(signal.SIGHUP, lambda: self._task(self._reload_and_say()))
        try:
            await self._open()
            await self._start()
            if self.phase is Phase.STARTING:
                self.phase = Phase.SERVING
                announce_ready(stdio=False)
                log.info(
                    "serving",
                    ingresses=len(self._ways),
                    egresses=len(self._config.egress),
                    address=self._listeners.address,
                )
                self._notifier.send(READY=1, STATUS="serving")
            return await self._outcome
        finally:
            await self._close()

    async def _open(self) -> None:
        """Open every listener, so that what is wrong with one shows before anything runs."""
        wanted = self._config
        self._name = await check(wanted)
        make_state(Path(wanted.state))
        self._listeners.open_relay(wanted, self._route)
        await self._listeners.open_metrics(wanted, health=self._health, ready=self._readiness, status=self._status)
        metering = self._listeners.metering
        if metering is not None:
            self._observer = metering.observer
        counted = None if metering is None else metering.path
        self._members = [Member(index, self, *self._log_options, counted) for index in range(self._workers)]
        self._ways.add(await self._ways.open(wanted.ingress))
        await self._listeners.open_control(wanted.control, self._answer)
        await self._open_approvals(wanted)
        await self._listeners.open_xl(wanted.xl.socket, self._greet, self._greeted)
        left = ", ".join(self._inherited)
        if left:
            raise ConfigurationError(f"nothing here uses the inherited socket {left}", "correct the .socket unit")

    async def _open_approvals(self, wanted: Config) -> None:
        if wanted.policy:
            await self._listeners.open_approvals(wanted.approvals, Path(wanted.state) / APPROVALS)

    async def _status(self) -> object:
        return self.status()

    def _health(self) -> str | None:
        """What is so wrong that somebody should act."""
        if self.phase is Phase.STARTING or any(member.ready for member in self._members):
            return None
        return "no worker is alive"

    def _readiness(self) -> str | None:
        """Why no new session is taken."""
        if self.phase in {Phase.SERVING, Phase.RELOADING}:
            return self._health()
        return self.phase.value

    async def _start(self) -> None:
        await asyncio.gather(*(member.start() for member in self._members))
        self._listeners.start()
        self._task(self._tick())
        if self._notifier.watchdog_seconds is not None:
            self._task(self._feed_watchdog(self._notifier.watchdog_seconds))

    async def _close(self) -> None:
        self._notifier.send(STOPPING=1)
        if self._timer is not None:
            self._timer.cancel()
        await self._listeners.close_doors()
        await asyncio.gather(*(member.quit() for member in self._members), return_exceptions=True)
        await self._ways.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._listeners.close()

    def _task(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- workers

    def configuration(self, index: int) -> Configure:
        """See ``Owner.configuration``."""
        arriving, departing = (
            part(count, len(self._members), index)
            for count in (self._config.sessions_max, self._config.xl.sessions_max)
        )
        return Configure(self._generation, self._config, arriving, departing)

    def arrived(self, member: Member) -> None:
        """See ``Owner.arrived``."""
        if self.phase in {Phase.DRAINING, Phase.STOPPING}:
            member.send(Drain())
            return
        for way in self._ways.of(member.index):
            self._ways.give(member, way)

    def died(self, member: Member) -> None:
        """See ``Owner.died``."""
        if self._listeners.metering is not None:
            self._listeners.metering.forget(member.index)
        lost = self._sessions.lost(member.index)
        for session_id, role in lost:
            self._observer.session_died(role)
            log.error("a session died with its worker", session=session_id[:8], role=role, worker=member.index)
        if self.phase in {Phase.DRAINING, Phase.STOPPING}:
            for way in self._ways.of(member.index):
                self._ways.forget(way)
            if lost:
                self._code = self._code or EXIT_BUG
            self._has_drained(member)

    def restarted(self, member: Member) -> None:
        """See ``Owner.restarted``."""
        del member
        self._observer.worker_restarted()

    def heard(self, member: Member, message: ToParent) -> None:
        """See ``Owner.heard``."""
        match message:
            case Begun(_, status):
                if status.role == Role.DESTINATION.value:
                    member.settled()
                if not self._sessions.begun(member.index, message):
                    log.warning("a session id is used twice", session=status.session_id[:8])
                    member.send(Cancel(status.session_id))
                self._divide()
            case Ended():
                self._sessions.over(member.index, message)
                self._divide()
            case Sample(statuses, lag):
                member.lag_seconds = lag
                for status in statuses:
                    self._sessions.sampled(member.index, status)
            case Refused(reason):
                member.settled()
                self._counts.peer_refused(reason)
            case Greeted():
                member.greeted = max(0, member.greeted - 1)
            case Left(name):
                way = self._ways.get(name)
                if way is not None and way.worker == member.index:
                    self._ways.forget(way)
            case Drained():
                self._has_drained(member)
            case _:
                pass

    def _route(self, sock: socket.socket, address: str, index: int | None) -> None:
        """See ``Door``: a lane to its worker, a new session to the one with the fewest."""
        if index is not None:
            if index < len(self._members):
                self._members[index].take(sock, address, new=False)
            return
        ready = [member for member in self._members if member.ready]
        if ready:
            min(ready, key=self._load).take(sock, address, new=True)

    def _load(self, member: Member) -> tuple[bool, int, int]:
        arriving = self._sessions.arriving(member.index) + member.handed
        full = arriving >= self.configuration(member.index).arriving_max
        return full, len(self._sessions.of(member.index)) + member.handed, member.index

    def _greet(self, sock: socket.socket, uid: int, pid: int) -> None:
        """See ``XlDoor``: to the worker with the fewest sessions that may have one more."""
        ready = [member for member in self._members if member.ready]
        if ready:
            min(ready, key=self._xl_load).greet(sock, Greet(uid, pid))

    def _greeted(self) -> int:
        return sum(member.greeted for member in self._members)

    def _xl_load(self, member: Member) -> tuple[bool, int, int]:
        departing = self._sessions.departing(member.index, XL) + member.greeted
        full = departing >= self.configuration(member.index).xl_max
        return full, len(self._sessions.of(member.index)) + member.handed + member.greeted, member.index

    # ---- rates

    def _divide(self) -> None:
        for index, rates in self._sessions.rates().items():
            self._members[index].send(Rates(rates))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._divide()
            self._say_status()
            self._observer.workers(sum(member.ready for member in self._members))
            self._observer.ready(on=self._readiness() is None)
            self._observer.draining(on=self.phase is Phase.DRAINING)

    async def _feed_watchdog(self, seconds: float) -> None:
        while True:
            self._notifier.send(WATCHDOG=1)
            await asyncio.sleep(seconds)

    def _say_status(self) -> None:
        words = f"{self.phase.value}: {len(self._sessions.live)} sessions"
        if words != self._told:
            self._told = words
            self._notifier.send(STATUS=words)

    # ---- the end

    def _signalled(self, number: int) -> None:
        if self.phase in {Phase.DRAINING, Phase.STOPPING}:
            self._stop(number)
        else:
            self._drain(number)

    def _drain(self, number: int = signal.SIGTERM) -> None:
        """Take no new session and no new migration; end when the last one has, or at the bound."""
        if self.phase in {Phase.DRAINING, Phase.STOPPING}:
            return
        starting = self.phase is Phase.STARTING
        self.phase = Phase.DRAINING
        if starting:
            self._end(EXIT_DONE)
            return
        log.info("draining", sessions=len(self._sessions.live), seconds=self._config.limits.drain_timeout)
        patience = self._config.limits.drain_timeout + STOP_SECONDS_MAX + QUIT_SECONDS_MAX
        self._notifier.send(STOPPING=1, EXTEND_TIMEOUT_USEC=int(patience * 1e6))
        self._say_status()
        self._timer = self._loop.call_later(self._config.limits.drain_timeout, self._stop, number)
        for member in self._members:
            member.retire()
            if not member.send(Drain()):
                self._has_drained(member)

    def _stop(self, number: int) -> None:
        """End every session that is left."""
        if self.phase is Phase.STOPPING:
            return
        self.phase = Phase.STOPPING
        log.info("ending what is left", sessions=len(self._sessions.live))
        self._say_status()
        self._code = EXIT_SIGNAL_BASE + number
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(STOP_SECONDS_MAX, self._end, self._code)
        for member in self._members:
            if not member.send(Stop(number)):
                self._has_drained(member)

    def _has_drained(self, member: Member) -> None:
        self._drained.add(member.index)
        if len(self._drained) == len(self._members):
            self._end(self._code)

    def _end(self, code: int) -> None:
        if not self._outcome.done():
            self._outcome.set_result(code)

    # ---- reload

    async def _reload_and_say(self) -> None:
        try:
            await self.reload()
        except (CryptoError, RelayError) as error:
            complain(error)

    async def reload(self) -> list[str]:
        """Read the configuration again and serve by it, all of it or nothing; the keys that wait for a restart.

        Raises:
            ConfigurationError, CryptoError: something is wrong with the new one, and the old one stays.
        """
        async with self._reloading:
            if self.phase is not Phase.SERVING:
                raise ConfigurationError(f"the daemon is {self.phase.value}: it does not reload", "start it anew")
            self.phase = Phase.RELOADING
            self._notifier.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000, STATUS="reloading")
            try:
                behind = await self._replace()
            except (CryptoError, RelayError) as error:
                self._counts.reloaded(good=False)
                self._observer.reloaded(good=False)
                log.warning("reload refused: the old configuration stays", reason=line_of(error))
                self._notifier.send(READY=1, STATUS=f"reload refused, the old configuration stays: {error}")
                raise
            finally:
                if self.phase is Phase.RELOADING:
                    self.phase = Phase.SERVING
            self._told = ""
            self._counts.reloaded(good=not behind)
            self._observer.reloaded(good=not behind)
            self._notifier.send(READY=1, STATUS="reloaded, but not by all workers" if behind else "reloaded")
            if behind:
                raise ConfigurationError(f"the new configuration counts, but not for all: {behind[0]}", "reload again")
            log.info("reloaded", restart_needed=self._counts.restart_needed)
            return self._counts.restart_needed

    async def _replace(self) -> list[str]:
        """Check and open everything first, so that it cannot fail half-way; why workers stayed behind none the less."""
        wanted = config.read(self._path)
        wanted, needed = unchanged(self._config, wanted, listening=self._listeners.address is not None)
        name = await check(wanted)
        await self._open_approvals(wanted)
        kept = {way.name: way.source for way in self._ways if not way.leaving}
        fresh = [ingress for ingress in wanted.ingress if kept.get(ingress.name) != ingress.source]
        for ingress in fresh:
            if self._ways.get(ingress.name) is not None:
                raise ConfigurationError(
                    f"{self._path}: the ingress {ingress.name!r} cannot change its `from` while it is served",
                    "give it another name, or restart",
                )
        opened = await self._ways.open(fresh)
        self._config, self._name, self._counts.restart_needed = wanted, name, needed
        self._generation += 1
        self._sessions.reconfigure(wanted)
        wishes = {ingress.name for ingress in wanted.ingress}
        gone = [way for way in self._ways if way.name not in wishes and not way.leaving]
        self._ways.add(opened)
        behind = await self._spread(opened, gone)
        self._divide()
        return behind

    async def _spread(self, fresh: list[Way], gone: list[Way]) -> list[str]:
        """Tell the workers: the configuration first, then which ingresses come and go."""
        answers = await asyncio.gather(
            *(member.configure(self.configuration(member.index)) for member in self._members)
        )
        for member, error in zip(self._members, answers, strict=True):
            if error is not None:
                log.error("a worker keeps its old configuration", worker=member.index, reason=error)
        for way in fresh:
            self._ways.give(self._members[way.worker], way)
        for way in gone:
            way.leaving = True
            if not self._members[way.worker].send(Leave(way.name)):
                self._ways.forget(way)
        return [error for error in answers if error is not None]

    # ---- operators

    async def _answer(self, request: control.Request) -> control.Answer:
        match request:
            case control.Status():
                return self.status()
            case control.Cancel(session):
                keys = self._sessions.find(session)
                for key in keys:
                    self._members[self._sessions.live[key].worker].send(Cancel(key[0]))
                log.info("an operator cancelled a session", session=keys[0][0][:8])
                return {"session_id": keys[0][0]}
            case control.Limit(session):
                return self._limit(session, control.rate_of(request))
            case control.Lanes(session, count):
                return self._lanes(session, count)
            case control.Reload():
                try:
                    return {"restart_needed": await self.reload()}
                except CryptoError as error:
                    raise ConfigurationError(str(error), getattr(error, "remedy", "")) from None
            case control.Drain():
                self._drain()
                return {"sessions": len(self._sessions.live)}

    def _lanes(self, session: str, count: int) -> control.Answer:
        keys = [key for key in self._sessions.find(session) if key[1] == Role.SOURCE.value]
        if not keys:
            raise ValueError("that session arrives here: its lanes are its source's to choose")
        for key in keys:
            self._members[self._sessions.live[key].worker].send(Lanes(key[0], count))
        log.info("an operator chose a number of lanes", session=keys[0][0][:8], lanes=count)
        return {"session_id": keys[0][0], "lanes": count}

    def _limit(self, session: str, rate: float | None) -> control.Answer:
        if session == control.ALL:
            self._sessions.total = rate
        else:
            self._sessions.limit(self._sessions.find(session), rate)
        self._divide()
        log.info("an operator set a limit", session=session[:8], rate=rate)
        return {"rate": rate}

    def status(self) -> control.Answer:
        """How everything stands."""
        said = {"name": self._name, "phase": self.phase.value, "listen": self._listeners.address}
        return said | facts(self._counts, self._config, self._sessions, ways=self._ways, members=self._members)

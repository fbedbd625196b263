"""The workers as the parent sees them: started, spoken to, buried, started again."""

import asyncio
import socket
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import structlog

from korora.daemon.messages import Configure, Configured, Greet, Quit, Take, ToParent, ToWorker
from korora.daemon.wire import Wire
from korora.log import LogFormat, LogLevel
from proxy.errors import ConfigurationError
from proxy.limits import HANDSHAKE_SECONDS_MAX

log = structlog.get_logger("korora.daemon")

BEGIN_SECONDS_MAX: Final = 60.0  # imports, and an identity with a long CRL, on a busy machine
QUIT_SECONDS_MAX: Final = 75.0  # hypervisors that are wound down take up to a minute
KILL_SECONDS_MAX: Final = 10.0  # for the kernel to bury it
BACKOFF_SECONDS: Final = 0.5  # before a worker that died is started again; doubled each time
BACKOFF_SECONDS_MAX: Final = 30.0
SETTLED_SECONDS: Final = 60.0  # a worker that lived this long begins its back-off anew


class Owner(Protocol):
    """Whoever has the workers."""

    def configuration(self, index: int) -> Configure:
        """What a worker is to serve."""

    def heard(self, member: "Member", message: ToParent) -> None:
        """A worker has said something."""

    def arrived(self, member: "Member") -> None:
        """A worker is there and has its configuration: it can be given ingresses."""

    def died(self, member: "Member") -> None:
        """A worker has gone, with all its sessions."""

    def restarted(self, member: "Member") -> None:
        """A worker had died and is started again."""


class Member:
    """One worker: the same number for life, one process after another.

    Args:
        index: its number, from 0.
        owner: is told what happens.
        log_format, log_level: as the parent's.
        metrics: the directory to count into; None where nothing is counted.
    """

    def __init__(
        self, index: int, owner: Owner, log_format: LogFormat, log_level: LogLevel, metrics: Path | None
    ) -> None:
        self.index, self._owner = index, owner
        self._arguments = (str(index), log_format.value, log_level.value, "" if metrics is None else str(metrics))
        self._wire: Wire[ToParent] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._configured: dict[int, asyncio.Future[str | None]] = {}
        self._first: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._retired = asyncio.Event()
        self.ready = False
        self.restarts = 0
        self.lag_seconds = 0.0
        self._handed: deque[float] = deque()
        """When it was given the connections that have not become sessions yet, nor been refused."""
        self.greeted = 0
        """Connections of `korora xl` that it was given, and that are no sessions yet, nor answered."""

    @property
    def pid(self) -> int | None:
        """Of its process, while it has one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start it and wait until it can take work.

        Raises:
            ConfigurationError: it cannot.
        """
        self._task = asyncio.get_running_loop().create_task(self._live(), name=f"worker {self.index}")
        error: str | None
        try:
            async with asyncio.timeout(BEGIN_SECONDS_MAX):
                error = await asyncio.shield(self._first)
        except TimeoutError:
            error = f"it said nothing for {BEGIN_SECONDS_MAX:.0f} s"
        if error is not None:
            raise ConfigurationError(f"worker {self.index} does not start: {error}", "its own lines above say why")

    def send(self, message: ToWorker, fd: int | None = None) -> bool:
        """Say something to it; whether it could be said."""
        return self._wire is not None and self._wire.send(message, fd)

    def take(self, sock: socket.socket, address: str, *, new: bool) -> None:
        """Give it a connection, which the caller closes here."""
        if self.ready and self.send(Take(address), sock.fileno()) and new:
            self._handed.append(asyncio.get_running_loop().time())

    def greet(self, sock: socket.socket, message: Greet) -> None:
        """Give it a `korora xl`, which the caller closes here."""
        if self.ready and self.send(message, sock.fileno()):
            self.greeted += 1

    @property
    def handed(self) -> int:
        """New connections that it is greeting, as far as we know."""
        late = asyncio.get_running_loop().time() - HANDSHAKE_SECONDS_MAX
        while self._handed and self._handed[0] < late:
            self._handed.popleft()
        return len(self._handed)

    def settled(self) -> None:
        """One of them has become a session, or was refused."""
        if self._handed:
            self._handed.popleft()

    async def configure(self, message: Configure) -> str | None:
        """Give it another configuration; why it keeps the old one, or None."""
        answer = self._configured[message.generation] = asyncio.get_running_loop().create_future()
        try:
            if not self.ready or not self.send(message):
                return None  # it is being started, and will be told then
            async with asyncio.timeout(BEGIN_SECONDS_MAX):
                error: str | None = await answer
                return error
        except TimeoutError:
            return f"worker {self.index} did not answer"
        finally:
            self._configured.pop(message.generation, None)

    def retire(self) -> None:
        """Start it no more when it has ended."""
        self._retired.set()

    async def quit(self) -> None:
        """Let it end; one that does not is killed."""
        self._retired.set()
        self.send(Quit())
        if self._task is None:
            return
        _, pending = await asyncio.wait({self._task}, timeout=QUIT_SECONDS_MAX)
        if pending:
            self._kill()
            await asyncio.wait({self._task}, timeout=KILL_SECONDS_MAX)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _live(self) -> None:
        """One process after another, until it is told to quit."""
        loop = asyncio.get_running_loop()
        backoff = BACKOFF_SECONDS
        while not self._retired.is_set():
            began = loop.time()
            try:
                code = await self._once()
            except OSError as error:
                log.warning("a worker cannot be started", worker=self.index, reason=error.strerror)
                code = -1
            finally:
                self._gone()
            if self._retired.is_set():
                return
            log.error("a worker died", worker=self.index, exit_code=code)
            if not self._first.done():
                self._first.set_result(f"it ended with {code}")
                return
            backoff = BACKOFF_SECONDS if loop.time() - began > SETTLED_SECONDS else backoff
            with suppress(TimeoutError):
                async with asyncio.timeout(backoff):
                    await self._retired.wait()
                    return
            backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)
            self.restarts += 1
            self._owner.restarted(self)

    async def _once(self) -> int:
        """One process, from its beginning to its end; its exit code."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "korora.daemon.worker"),
                *(str(theirs.fileno()), *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        # The union is no type to mypy.
        # mypy knows a union as a type of things, not as a thing that can be given.
        self._wire = Wire(ours, ToParent, take=self._hear, gone=self._silent)  # type: ignore[arg-type]
        self.send(self._owner.configuration(self.index))
        return await self._process.wait()

    def _hear(self, message: ToParent, fd: int | None) -> None:
        del fd  # no message of a worker brings one
        if not isinstance(message, Configured):
            self._owner.heard(self, message)
            return
        waiting = self._configured.get(message.generation)
        if waiting is not None:
            if not waiting.done():
                waiting.set_result(message.error)
        elif message.error is not None:
            if not self._first.done():
                self._first.set_result(message.error)
            log.error("a worker cannot take its configuration", worker=self.index, reason=message.error)
            self._kill()
        elif (newer := self._owner.configuration(self.index)).generation != message.generation:
            self.send(newer)  # there was a reload while it was starting
        else:
            self.ready = True
            self._owner.arrived(self)
            if not self._first.done():
                self._first.set_result(None)

    def _silent(self) -> None:
        """It has hung up, as it does when it ends; where it says what is no message, it must."""
        if not self._retired.is_set():
            self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    def _gone(self) -> None:
        if self._wire is not None:
            self._wire.close()
        self._wire, self._process, self.ready = None, None, False
        self._handed.clear()
        self.greeted = 0
        self._owner.died(self)

"""`korora xl` beside a daemon: hands xl's pipes over, holds on to them until the verdict, and then lets go.

xl cannot reconnect: whatever has the other ends of its pipes must outlive a restart of the daemon. So this process
reads and writes nothing, and waits.
"""

import array
import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

from korora import report as reports
from korora.errors import complain
from korora.progress import Progress
from korora.xl.words import (
    ANSWER_BYTES_MAX,
    Carry,
    LetGo,
    Moved,
    Request,
    Stop,
    Taken,
    Verdict,
    answer_of,
    encode,
)
from proxy.endpoints.pipes import own_description
from proxy.errors import EXIT_SIGNAL_BASE, ConfigurationError, DaemonLost
from proxy.status import SessionStatus

log = structlog.get_logger("korora")

HAND_OVERS_MAX: Final = 16  # a daemon had the pipes: one that dies of it each time must not be asked for ever
_BACKOFF_SECONDS: Final = 0.1  # before the second attempt to reach it; doubled for each further one
_BACKOFF_SECONDS_MAX: Final = 2.0
_NOBODY: Final = (FileNotFoundError, ConnectionRefusedError)


@dataclass(frozen=True, slots=True)
class Order:
    """What `korora xl` was told.

    Args:
        socket: the daemon's xl socket.
        carry: what is asked of it.
        report: where the session's report goes.
        patience_seconds: how long a daemon that went away is waited for.
    """

    socket: Path
    carry: Carry
    report: Path | None = None
    patience_seconds: float = 60.0


def reach(path: Path) -> socket.socket | None:
    """A connection to the daemon; None where none runs.

    Raises:
        ConfigurationError: one may run, and cannot be reached.
    """
    try:
        return _connected(path)
    except _NOBODY:
        return None
    except OSError as error:
        raise ConfigurationError(
            f"cannot reach the daemon at {path}: {error.strerror or error}",
            "be root or the daemon's user, or say --daemon no",
        ) from None


def hand_over(order: Order, daemon: socket.socket) -> int:
    """Have the daemon carry the migration; the exit code.

    Args:
        order: what is to be done.
        daemon: of ``reach``; it is closed here.

    Raises:
        ConfigurationError: the report cannot be written.
    """
    reports.check_writable(order.report)
    return asyncio.run(_Holder(order, _Pipes()).run(daemon))


def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(_BACKOFF_SECONDS_MAX)  # a daemon with a full backlog
        sock.connect(str(path))
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class _Pipes:
    """The standard streams, under numbers of their own: 0 and 1 lead to /dev/null from now on."""

    def __init__(self) -> None:
        # Not xl's own descriptions: O_NONBLOCK, which the daemon must have, would show at its ends of a socket.
        self._fds = [own_description(0, os.O_RDONLY), own_description(1, os.O_WRONLY)]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for stream in (0, 1):
            os.dup2(null, stream)
        os.close(null)
        self.whole = True
        """Whether they can be handed over once more."""

    def give(self, daemon: socket.socket, carry: Carry) -> None:
        """Hand them over; ours stay open.

        Raises:
            OSError: the daemon is gone.
        """
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", self._fds))
        daemon.sendmsg([encode(carry)], [rights])

    def let_go(self, *, output_only: bool = False) -> None:
        """xl is to see the end of them."""
        self.whole = False
        for fd in self._fds[1:] if output_only else self._fds:
            with suppress(OSError):
                os.close(fd)
        self._fds = self._fds[:1] if output_only else []


class _Gone(Exception):
    """The daemon hung up without a verdict."""


class _Holder:
    """One run beside a daemon."""

    def __init__(self, order: Order, pipes: _Pipes) -> None:
        self._order, self._pipes = order, pipes
        self._status: SessionStatus | None = None
        self._session: str | None = None
        self._taken = False
        """Whether the last daemon that was asked had the pipes."""
        self._away = False
        """Whether it has been said that none has them; one that hangs up unheard has no worker yet."""
        self._daemon: socket.socket | None = None
        self._signal: int | None = None
        self._task: asyncio.Task[Verdict] | None = None

    async def run(self, daemon: socket.socket) -> int:
        """Wait for the verdict, whatever becomes of the daemon meanwhile."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)
        self._task = asyncio.create_task(self._verdict(daemon))
        try:
            with Progress(lambda: self._status):
                verdict = await self._task
        except asyncio.CancelledError:
            if self._signal is None:
                raise
            return EXIT_SIGNAL_BASE + self._signal
        except DaemonLost as error:
            self._pipes.let_go()
            return complain(error)
        finally:
            self._pipes.let_go()  # before anything is said: xl waits for it
        if verdict.words is not None:
            sys.stderr.write(f"{verdict.words}\n")
            sys.stderr.flush()
        if self._order.report is not None and verdict.report is not None:
            try:
                reports.write_built(self._order.report, verdict.report)
            except OSError as error:
                words = f"cannot write the report {self._order.report}: {error.strerror or error}"
                complain(ConfigurationError(words, "free space there"))
        return verdict.code

    def _signalled(self, number: int) -> None:
        """Ask the daemon to stop; where it is not there, or for the second time, end."""
        first, self._signal = self._signal is None, number
        if first and self._daemon is not None and self._say(Stop(number)):
            return
        if self._task is not None:
            self._task.cancel()

    def _say(self, word: Request) -> bool:
        if self._daemon is None:
            return False
        try:
            self._daemon.send(encode(word))
        except OSError:
            return False
        return True

    async def _verdict(self, daemon: socket.socket) -> Verdict:
        """Hand the pipes over, and again to the next daemon where one dies.

        Raises:
            DaemonLost: there was none in time, or too many.
        """
        taken, pause = 0, _BACKOFF_SECONDS
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._order.patience_seconds
        while True:
            self._taken = False
            try:
                return await self._carried(daemon)
            except _Gone:
                pass
            if not self._pipes.whole:
                raise DaemonLost(f"the daemon at {self._order.socket} ended after it had closed xl's pipes")
            if self._taken:
                taken, pause = taken + 1, _BACKOFF_SECONDS
                deadline = loop.time() + self._order.patience_seconds
            if taken == HAND_OVERS_MAX:
                raise DaemonLost(f"the daemon at {self._order.socket} went away {HAND_OVERS_MAX} times")
            if not self._away:
                log.warning("the daemon is away", session=self._short, seconds_max=self._order.patience_seconds)
                self._away = True
            # One that is there and hangs up at once has no worker just now: it need not be asked ten times a second.
            daemon = await self._again(pause, deadline)
            pause = min(2 * pause, _BACKOFF_SECONDS_MAX)

    @property
    def _short(self) -> str | None:
        return None if self._session is None else self._session[:8]

    async def _carried(self, daemon: socket.socket) -> Verdict:
        """What one daemon makes of it.

        Raises:
            _Gone: it hung up.
        """
        with daemon:
            self._daemon = daemon
            try:
                with suppress(
                    BrokenPipeError, ConnectionResetError
                ):  # then its answer, if it gave one, is there already
                    self._pipes.give(daemon, msgspec.structs.replace(self._order.carry, session=self._session))
                async with asyncio.timeout(self._order.patience_seconds):
                    word = await self._hear(daemon)
                if self._away:
                    log.warning("the daemon is back", session=self._short)
                    self._away = False
                while not isinstance(word, Verdict):
                    self._heard(word)
                    word = await self._hear(daemon)
            except (OSError, TimeoutError):
                raise _Gone from None
            finally:
                self._daemon = None
        return word

    def _heard(self, word: Taken | Moved | LetGo) -> None:
        match word:
            case Taken(session):
                if self._session is None:
                    log.info("the daemon has xl's pipes", session=session[:8])
                self._session, self._taken = session, True
            case Moved(status):
                self._status = status
            case LetGo(output_only):
                self._pipes.let_go(output_only=output_only)

    @staticmethod
    async def _hear(daemon: socket.socket) -> Taken | Moved | LetGo | Verdict:
        loop = asyncio.get_running_loop()
        try:
            data = await loop.sock_recv(daemon, ANSWER_BYTES_MAX)
        except ConnectionResetError:
            # It has not read all that we sent; what it said before that still waits behind the error.
            data = await loop.sock_recv(daemon, ANSWER_BYTES_MAX)
        if not data:
            raise _Gone
        try:
            return answer_of(data)
        except ValueError:
            raise _Gone from None

    async def _again(self, pause: float, deadline: float) -> socket.socket:
        """The next daemon.

        Args:
            pause: seconds before it is asked; doubled for each further time.
            deadline: until when, by the loop's clock.

        Raises:
            DaemonLost: there is none in time.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while True:
                    await asyncio.sleep(pause)
                    try:
                        return await asyncio.to_thread(_connected, self._order.socket)
                    except OSError as error:
                        log.debug("the daemon is not back yet", reason=str(error))
                    pause = min(2 * pause, _BACKOFF_SECONDS_MAX)
        raise DaemonLost(
            f"the daemon at {self._order.socket} went away, and was not back in {self._order.patience_seconds:.0f} s"
        )

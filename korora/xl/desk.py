"""A worker's end of the xl socket: takes the pipes of `korora xl`, has a session made of them, tells how it ended."""

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol

import structlog

from korora.errors import line_of
from korora.xl.words import (
    ANSWER_BYTES_MAX,
    DESCRIPTORS,
    REQUEST_BYTES_MAX,
    VERSION,
    Answer,
    Carry,
    LetGo,
    Moved,
    Stop,
    Taken,
    Verdict,
    encode,
    no_request,
    request_of,
)
from proxy.endpoints.handed import HandedPipes, take_over
from proxy.endpoints.sockets import readable
from proxy.errors import (
    EXIT_DONE,
    ConfigurationError,
    DaemonLost,
    HypervisorFailed,
    Interrupted,
    RelayError,
    exit_code_of,
)
from proxy.handover.record import Record
from proxy.handover.table import State
from proxy.limits import FIRST_BYTE_SECONDS_MAX
from proxy.process import written_down
from proxy.status import SessionStatus

log = structlog.get_logger("korora.worker")

FLUSH_SECONDS_MAX: Final = 5.0  # for the last word, where nobody reads
_WORDS_KEPT: Final = 8  # that wait for room: there are at most `taken`, two `let_go` and `verdict`
_DESCRIPTOR: Final = array.array("i").itemsize


class Errand(Protocol):
    """One session, from its pipes to its verdict."""

    session_id: str

    async def run(self) -> Verdict | None:
        """Carry it; None where nothing is decided and the pipes were left for a later hand-over."""

    def stop(self, reason: RelayError) -> None:
        """End it early."""

    def status(self) -> SessionStatus | None:
        """How it stands; None while it is not open."""


Begin = Callable[[Carry, int, HandedPipes, Callable[[], None]], Errand]
"""Makes a session of a request, its user's id and its pipes; the last is to be called once it is open.

Raises RelayError where it may not be, and leaves the pipes alone then."""

Readopt = Callable[[str, HandedPipes], Awaitable[Verdict | None]]
"""Finishes a session that another process of the daemon had begun, or says how it ended: the seam for a hand-over with
a journal.

It owns the pipes. `abort` and `settle` of them let xl see the end, and give the holder's copies up too; `leave` gives
back ours alone, and None as the answer makes the holder come again. It may take as long as it must, and is cancelled
when the holder is told to stop, when it has gone, and when this worker ends."""


async def lost(session_id: str, pipes: HandedPipes) -> Verdict:
    """The ``Readopt`` of a daemon that keeps no journal: xl sees the end of both its pipes."""
    await pipes.abort()
    error = DaemonLost(f"the stream of session {session_id[:8]} was lost with the daemon's process that carried it")
    return Verdict(exit_code_of(error), line_of(error), session_id)


def verdict_on(record: Record) -> Verdict:
    """How a hand-over ended that was seen through with another process's pipes."""
    session, name = record.head.session, record.vm.name or "the machine"
    if record.state is State.DONE:
        return Verdict(EXIT_DONE, None, session)
    error = DaemonLost(f"the daemon was lost while {name} changed hosts; it runs here: {record.why}")
    return Verdict(exit_code_of(error), line_of(error), session)


class _Client:
    """One `korora xl`, as the worker has it."""

    def __init__(self, sock: socket.socket, uid: int, pid: int) -> None:
        sock.setblocking(False)
        self._sock, self.uid, self.pid = sock, uid, pid
        self._loop = asyncio.get_running_loop()
        self._queue: deque[bytes] = deque(maxlen=_WORDS_KEPT)
        self._on_stop: Callable[[RelayError], None] | None = None
        self._flushed: asyncio.Future[None] | None = None
        self.gone = False

    async def request(self) -> tuple[Carry, list[int]]:
        """Its first packet, and the descriptors that came with it, which are the caller's.

        Raises:
            ConfigurationError: it is no request.
            OSError, TimeoutError: there is none.
        """
        async with asyncio.timeout(FIRST_BYTE_SECONDS_MAX):
            await readable(self._sock.fileno())
        data, ancillary, flags, _ = self._sock.recvmsg(
            REQUEST_BYTES_MAX, socket.CMSG_SPACE(DESCRIPTORS * _DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
        )
        fds = _descriptors(ancillary)
        try:
            if not data:
                raise ConnectionResetError
            if flags & socket.MSG_TRUNC:
                raise ConfigurationError(f"a request has at most {REQUEST_BYTES_MAX} bytes")
            if flags & socket.MSG_CTRUNC:
                raise ConfigurationError(f"a request brings {DESCRIPTORS} descriptors, not more")
            request = request_of(data)
            if not isinstance(request, Carry):
                raise ConfigurationError("there is nothing to stop")
            if request.version != VERSION:
                raise ConfigurationError(f"korora xl speaks version {request.version}, the daemon {VERSION}")
        except ValueError as error:
            _close(fds)
            raise ConfigurationError(f"no request: {error}") from None
        except BaseException:
            _close(fds)
            raise
        return request, fds

    def listen(self, on_stop: Callable[[RelayError], None]) -> None:
        """From now on tell of its signals, and of its end."""
        self._on_stop = on_stop
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(REQUEST_BYTES_MAX)  # without room for descriptors: the kernel drops those
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._left()
            return
        with suppress(ValueError):
            request = request_of(data)
            if isinstance(request, Stop) and self._on_stop is not None:
                self._on_stop(Interrupted(request.signal))

    def _left(self) -> None:
        """Nobody is there any more: what must it be kept for?"""
        if not self.gone:
            self.gone = True
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._queue.clear()
            self._done()
            if self._on_stop is not None:
                self._on_stop(HypervisorFailed("korora xl, which xl had started, is gone"))

    def say(self, word: Answer) -> None:
        """Say it now, or as soon as there is room."""
        if self.gone:
            return
        data = encode(word)
        if self._queue or not self._sent(data):
            self._queue.append(data)
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def tell(self, word: Moved) -> None:
        """Say it where there is room now."""
        if not self._queue and not self.gone:
            self._sent(encode(word))

    def _sent(self, data: bytes) -> bool:
        try:
            self._sock.send(data)
        except BlockingIOError:
            return False
        except OSError:
            return True  # it is gone, which reading shows
        return True

    def _writable(self) -> None:
        while self._queue:
            if not self._sent(self._queue[0]):
                return
            self._queue.popleft()
        self._loop.remove_writer(self._sock.fileno())
        self._done()

    def _done(self) -> None:
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_result(None)

    async def part(self) -> None:
        """Say what waits, and close."""
        try:
            if self._queue and not self.gone:
                self._flushed = self._loop.create_future()
                with suppress(TimeoutError):
                    async with asyncio.timeout(FLUSH_SECONDS_MAX):
                        await self._flushed
        finally:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()


class Desk:
    """Serves the connections that the parent hands over.

    Args:
        begin: makes sessions.
        readopt: takes sessions again that another process had.
        heard: called once for each connection, when it is a session or has been answered.
        idle: called when one has been served.
    """

    def __init__(self, begin: Begin, readopt: Readopt, *, heard: Callable[[], None], idle: Callable[[], None]) -> None:
        self._begin, self._readopt, self._heard, self._idle = begin, readopt, heard, idle
        self._loop = asyncio.get_running_loop()
        self._errands: dict[_Client, Errand] = {}
        self._serving: dict[asyncio.Task[None], bool] = {}
        """Whether what a task serves must be brought to its end."""

    @property
    def errands(self) -> int:
        """Sessions, agreed on or not, whose verdict has not been told yet."""
        return len(self._errands)

    def take(self, sock: socket.socket, uid: int, pid: int) -> None:
        """A `korora xl` has come, and has said nothing yet; its socket is ours."""
        task = self._loop.create_task(self._serve(_Client(sock, uid, pid)))
        self._serving[task] = False
        task.add_done_callback(lambda done: self._serving.pop(done, None))

    def sample(self) -> None:
        """Tell everybody how his session stands."""
        for client, errand in self._errands.items():
            status = errand.status()
            if status is not None:
                client.tell(Moved(status))

    def stop(self, reason: RelayError) -> None:
        """End all sessions."""
        for errand in list(self._errands.values()):
            errand.stop(reason)

    async def close(self) -> None:
        """Sessions have ended: tell their verdicts; whoever waits for something else is to come again."""
        for task, kept in list(self._serving.items()):
            if not kept:
                task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, client: _Client) -> None:
        heard = _Once(self._heard)
        try:
            verdict = await self._answer(client, heard)
            if verdict is not None:
                client.say(_fitting(verdict))
        except (OSError, TimeoutError):
            return
        finally:
            heard()
            self._errands.pop(client, None)
            try:
                await client.part()
            finally:
                self._idle()

    async def _answer(self, client: _Client, heard: Callable[[], None]) -> Verdict | None:
        try:
            request, fds = await client.request()
            pipes = HandedPipes(
                *take_over(fds),
                let_go=lambda output_only: client.say(LetGo(output_only)),
                holder=written_down(client.pid),
                user=client.uid,
            )
        except ConfigurationError as error:
            log.warning(
                "somebody at the xl socket was not understood", uid=client.uid, pid=client.pid, reason=str(error)
            )
            return no_request(str(error))
        if request.session is not None:
            heard()
            return await self._again(client, request.session, pipes)
        try:
            errand = self._begin(request, client.uid, pipes, heard)
        except RelayError as error:
            await pipes.abort()
            return Verdict(exit_code_of(error), line_of(error))
        self._errands[client] = errand
        task = asyncio.current_task()
        if task is not None:
            self._serving[task] = True
        client.say(Taken(errand.session_id))
        client.listen(errand.stop)
        return await errand.run()

    async def _again(self, client: _Client, session_id: str, pipes: HandedPipes) -> Verdict | None:
        """Its session was another process's."""
        log.info("xl's pipes were handed over again", session=session_id[:8], pid=client.pid)
        client.say(Taken(session_id))
        reasons: list[RelayError] = []
        work = asyncio.ensure_future(self._readopt(session_id, pipes))

        def stop(reason: RelayError) -> None:
            reasons.append(reason)
            work.cancel()

        client.listen(stop)
        try:
            return await work
        except asyncio.CancelledError:
            if not reasons:
                raise
            return Verdict(exit_code_of(reasons[0]), line_of(reasons[0]), session_id)
        except RelayError as error:
            return Verdict(exit_code_of(error), line_of(error), session_id)
        finally:
            pipes.leave()  # nothing, if whoever had them has closed them


class _Once:
    """Calls something the first time that it is called."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._called = call, False

    def __call__(self) -> None:
        if not self._called:
            self._called = True
            self._call()


def _fitting(verdict: Verdict) -> Verdict:
    """Without its report, where that is too long for a packet."""
    if len(encode(verdict)) <= ANSWER_BYTES_MAX:
        return verdict
    return Verdict(verdict.code, verdict.words, verdict.session)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % _DESCRIPTOR])
    return list(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)

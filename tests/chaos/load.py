"""Who the relays work for: hypervisors that talk at any size and pace and check every byte, and die when told to.

A talk is one connection of a migrating hypervisor to its counterpart: both directions are drawn from a seed, so every
byte that arrives can be compared with the one that was to come, wherever the stream is cut. Its first bytes say which
talk it is, so that one `Backend` can serve any number of them, in any order.
"""

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.attacks.wire import Way

KIB: Final = 1024
MIB: Final = 1024 * KIB
READ_BYTES: Final = MIB
WRITE_BYTES: Final = 256 * KIB
LINGER_RESET: Final = struct.pack("ii", 1, 0)
BACKLOG: Final = 512
HEADER: Final = struct.Struct(">8sQ")  # what the destination's hypervisor knows a talk by; also opaque to the relays
MAGIC: Final = b"kchaos\r\n"
TALK_SECONDS_MAX: Final = 120.0
FAR_SECONDS_MAX: Final = 20.0  # after the near end is over, for the far one to be
EVENTUALLY_SECONDS_MAX: Final = 20.0
POLL_SECONDS: Final = 0.005
LOOPBACK: Final = "127.0.0.1"
_ZEROS: Final = memoryview(bytes(READ_BYTES))

MakeSocket = Callable[[], socket.socket]


class WrongBytes(AssertionError):
    """A hypervisor was given what nobody sent."""


class Stream:
    """Bytes of one direction of one talk: incompressible, the same for the same seed, to be had in any portions."""

    def __init__(self, seed: int, way: Way) -> None:
        key = struct.pack(">QQ", seed, way is Way.FORWARD)
        # AES in counter mode is the fastest source of bytes there is here; a test's stream keeps no secret.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def take(self, count: int) -> bytes:
        """The next `count` bytes, 1 MiB at most."""
        return self._cipher.update(_ZEROS[:count])


@dataclass(frozen=True, slots=True)
class Talk:
    """One connection's two streams and what becomes of them."""

    seed: int
    forward_bytes: int
    backward_bytes: int
    writes: tuple[int, ...] = (WRITE_BYTES,)
    """Sizes of single writes, drawn at random from these."""
    near_dies_at: int | None = None
    """The source's hypervisor resets its connection once it has sent and received so many bytes."""
    far_dies_at: int | None = None
    """The same for the destination's."""
    hold: asyncio.Event | None = None
    """Both keep their last byte back until this is set, as a hypervisor does that is paused."""

    def size(self, way: Way) -> int:
        """Bytes of one direction; the header is on top of what is asked for."""
        return HEADER.size + self.forward_bytes if way is Way.FORWARD else self.backward_bytes


@dataclass(eq=False, slots=True)
class End:
    """One hypervisor's end of a talk: what it has said and heard so far, and how that ended."""

    talk: Talk
    hears: Way
    said: int = 0
    heard: int = 0
    ended: str | None = None
    """ "eof" or "reset" by the other side, "died" by ourselves, "wrong" for other bytes than were sent."""

    @property
    def whole(self) -> bool:
        """Whether it heard everything, and a clean end."""
        return self.ended == "eof" and self.heard == self.talk.size(self.hears)

    def __str__(self) -> str:
        says = Way.BACKWARD if self.hears is Way.FORWARD else Way.FORWARD
        sizes = f"said {self.said} of {self.talk.size(says)}, heard {self.heard} of {self.talk.size(self.hears)}"
        return f"talk {self.talk.seed}: {sizes}, {self.ended}"


class _Dies(Exception):
    """This hypervisor's time has come."""


class _Speaker:
    """One end of a connection: says its stream and checks what it hears."""

    def __init__(self, sock: socket.socket, end: End, heard: Stream, dies_at: int | None) -> None:
        self._sock, self._end, self._heard = sock, end, heard
        self._dies_at = dies_at
        self._said_all = False
        self._loop = asyncio.get_running_loop()
        self._dice = random.Random(end.talk.seed)

    async def converse(self) -> None:
        """Say all and half-close, hear to the end; however it ends stands in the End, and the socket is closed."""
        end = self._end
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._say())
                both.create_task(self._hear())
        except* OSError:
            end.ended = "reset"
        except* _Dies:
            end.ended = "died"
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        except* WrongBytes:
            end.ended = "wrong"
            raise
        finally:
            if not self._said_all:  # cancelled: what was said so far must not look whole
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            self._sock.close()

    async def _say(self) -> None:
        end = self._end
        way = Way.BACKWARD if end.hears is Way.FORWARD else Way.FORWARD
        stream, total = Stream(end.talk.seed, way), end.talk.size(way)
        if way is Way.FORWARD:
            await self._loop.sock_sendall(self._sock, HEADER.pack(MAGIC, end.talk.seed))
            end.said = HEADER.size
        while end.said < total:
            left = total - end.said
            if end.talk.hold is not None and not end.talk.hold.is_set():
                left -= 1
                if not left:
                    await end.talk.hold.wait()
                    continue
            piece = stream.take(min(self._dice.choice(end.talk.writes), left))
            await self._loop.sock_sendall(self._sock, piece)
            end.said += len(piece)
            self._mortal()
        self._sock.shutdown(socket.SHUT_WR)
        self._said_all = True

    async def _hear(self) -> None:
        end = self._end
        total = end.talk.size(end.hears)
        while data := await self._loop.sock_recv(self._sock, READ_BYTES):
            if self._heard.take(len(data)) != data or end.heard + len(data) > total:
                raise WrongBytes(f"{end}: other bytes than were sent among the {len(data)} after {end.heard}")
            end.heard += len(data)
            self._mortal()
        # A clean end before the stream's end is the worst that can happen: a cut stream that looks whole.
        if end.heard != total:
            raise WrongBytes(f"{end}: a clean end too early")
        end.ended = "eof"

    def _mortal(self) -> None:
        if self._dies_at is not None and self._end.said + self._end.heard >= self._dies_at:
            raise _Dies


async def migrate(port: int, talk: Talk, *, make: MakeSocket = socket.socket) -> End:
    """The source's hypervisor: connect to its relay and have one talk to the end.

    Args:
        port: where the relay listens, on the loopback.
        talk: what is said.
        make: makes the socket; of another host, it leads to that host's loopback.

    Raises:
        WrongBytes: it was given what nobody sent, or a clean end too early.
        ConnectionRefusedError: nobody listens there.
    """
    loop = asyncio.get_running_loop()
    sock = make()
    _tune(sock)
    end = End(talk, Way.BACKWARD)
    try:
        await loop.sock_connect(sock, (LOOPBACK, port))
    except ConnectionResetError:  # accepted, and thrown out before the loop had looked
        sock.close()
        end.ended = "reset"
        return end
    except BaseException:
        sock.close()
        raise
    async with asyncio.timeout(TALK_SECONDS_MAX):
        await _guarded(_Speaker(sock, end, Stream(talk.seed, Way.BACKWARD), talk.near_dies_at).converse())
    return end


class Backend:
    """The destination's hypervisor: serves every talk it has been told of, on a port that can be shut and opened.

    Args:
        make: makes the listening sockets; of another host, they listen on that host's loopback.
    """

    def __init__(self, make: MakeSocket = socket.socket) -> None:
        self._make = make
        # Bound and never listening, so that the port stays ours while it refuses.
        self._holder = self._bound(0)
        self.port: int = self._holder.getsockname()[1]
        self._listening: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._expected: dict[int, asyncio.Future[End]] = {}
        self._talks: dict[int, Talk] = {}
        self.ends: dict[int, End] = {}
        """The talks that are under way, by seed."""
        self.rude = False
        """Whether it resets every connection as soon as it has it."""
        self.connections = 0
        self.strays = 0
        """Connections that ended before they said which talk they are."""
        self.errors: list[BaseException] = []

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """End everything; wrong bytes in any talk are an error even if nobody asked for that one."""
        await self.shut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._holder.close()
        if self.errors:
            raise self.errors[0]

    def open(self) -> None:
        """Accept from now on."""
        listener = self._bound(self.port)
        listener.listen(BACKLOG)
        self._listening = self._spawn(self._accept(listener))

    async def shut(self) -> None:
        """Refuse from now on; connections that are open go on."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None

    @property
    def serving(self) -> int:
        """Connections that are open."""
        return len(self._tasks) - (self._listening is not None)

    def expect(self, talk: Talk) -> "asyncio.Future[End]":
        """Serve this talk when it comes; its far end once it is over."""
        self._talks[talk.seed] = talk
        future: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._expected[talk.seed] = future
        return future

    async def held(self, talk: Talk) -> None:
        """Until the destination's end of a talk has heard all but the last byte."""

        def waits() -> bool:
            end = self.ends.get(talk.seed)
            return end is not None and end.heard == talk.size(Way.FORWARD) - 1

        await eventually(waits)

    async def idle(self) -> None:
        """Until no connection is open."""
        await eventually(lambda: not self.serving)

    def _bound(self, port: int) -> socket.socket:
        sock = self._make()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((LOOPBACK, port))
        sock.setblocking(False)
        return sock

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                sock, _ = await loop.sock_accept(listener)
                self.connections += 1
                _tune(sock)
                if self.rude:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
                    sock.close()
                    continue
                self._spawn(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        header = b""
        try:
            while len(header) < HEADER.size:
                more = await loop.sock_recv(sock, HEADER.size - len(header))
                if not more:
                    break
                header += more
        except OSError:
            header = b""
        except BaseException:
            sock.close()
            raise
        if len(header) < HEADER.size:
            self.strays += 1
            sock.close()
            return
        magic, seed = HEADER.unpack(header)
        talk, future = self._talks.pop(seed, None), self._expected.pop(seed, None)
        if magic != MAGIC or talk is None or future is None:
            sock.close()
            self.errors.append(WrongBytes(f"a connection of no talk: {header!r}"))
            return
        end = self.ends[seed] = End(talk, Way.FORWARD, heard=HEADER.size)
        try:
            speaker = _Speaker(sock, end, Stream(seed, Way.FORWARD), talk.far_dies_at)
            await _guarded(speaker.converse())
        except WrongBytes as error:
            self.errors.append(error)
        finally:
            del self.ends[seed]
        if not future.done():
            future.set_result(end)


async def eventually(condition: Callable[[], object], seconds: float = EVENTUALLY_SECONDS_MAX) -> None:
    """Look again and again, for what tells nobody when it happens.

    Raises:
        TimeoutError: it has not within `seconds`.
    """
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(POLL_SECONDS)


@dataclass(slots=True)
class Ends:
    """Both ends of one talk."""

    near: End
    coming: "asyncio.Future[End]"

    @property
    def far(self) -> End | None:
        """None where the destination's hypervisor has not learned of it, or is not through with it."""
        return self.coming.result() if self.coming.done() else None

    @property
    def whole(self) -> bool:
        """Whether both heard everything."""
        return self.near.whole and self.far is not None and self.far.whole

    @property
    def cut(self) -> bool:
        """Whether something is missing, and who misses it was told so by a reset."""
        told = all(end is None or end.whole or end.ended in {"reset", "died"} for end in (self.near, self.far))
        return told and not self.whole

    def __str__(self) -> str:
        return f"source: {self.near}; destination: {self.far}"


FAR_POLL_SECONDS: Final = 0.25  # between looks at whether a connection is there that may yet become the far end


async def talk_through(port: int, backend: Backend, talk: Talk, *, make: MakeSocket = socket.socket) -> Ends:
    """Have one talk through a pair of relays.

    Args:
        port: where the source's relay takes its hypervisor's connections.
        backend: the destination's hypervisor.
        talk: what is said.
        make: see `migrate`.

    Raises:
        WrongBytes: either end was given what nobody sent, or took a cut stream for a whole one.
        TimeoutError: an end was left in the dark.
    """
    coming = backend.expect(talk)
    near = await migrate(port, talk, make=make)
    async with asyncio.timeout(FAR_SECONDS_MAX):
        # A talk that broke early may never reach the far end, or only when it is over.
        while near.ended == "eof" or backend.serving:
            done, _ = await asyncio.wait({coming}, timeout=FAR_POLL_SECONDS)
            if done:
                break
    if backend.errors:
        raise backend.errors[0]
    return Ends(near, coming)


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    """The one error that a converse() may end with, out of its group."""
    try:
        await work
    except* WrongBytes as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        wrong = found
    else:
        return
    raise wrong


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")

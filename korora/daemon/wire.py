"""One end of the socket pair between the parent and a worker: whole messages, never blocking, bounded."""

import array
import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto, unique
from typing import Final, Generic, TypeVar

import msgspec

from korora.daemon.messages import MESSAGE_BYTES_MAX, QUEUE_MESSAGES_MAX

M = TypeVar("M")

_DESCRIPTOR: Final = array.array("i").itemsize
_TURN_MESSAGES: Final = 64  # taken before the loop serves others


@unique
class _Done(Enum):
    """What became of a message."""

    SENT = auto()
    LATER = auto()
    LOST = auto()


class Wire(Generic[M]):
    """Sends any message, receives those of one union.

    Args:
        sock: one of a pair of SOCK_SEQPACKET sockets; this object owns it from now on.
        kind: the union of messages that may come.
        take: called with each message, and the descriptor that came with it, which is then the callee's.
        gone: called once, when the other end has gone or said something that is no message.
    """

    def __init__(
        self, sock: socket.socket, kind: type[M], *, take: Callable[[M, int | None], None], gone: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock, self._take, self._gone = sock, take, gone
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._queue: deque[tuple[bytes, int | None]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self.closed = False

    def send(self, message: msgspec.Struct, fd: int | None = None) -> bool:
        """Send a message now or as soon as there is room; whether it could be.

        Args:
            message: encodes to at most `MESSAGE_BYTES_MAX` bytes.
            fd: goes along; it stays the caller's, who may close it at once.
        """
        if self.closed or len(self._queue) >= QUEUE_MESSAGES_MAX:
            return False
        data = self._encoder.encode(message)
        done = _Done.LATER if self._queue else self._try(data, fd)
        if done is not _Done.LATER:
            return done is _Done.SENT
        self._queue.append((data, None if fd is None else os.dup(fd)))
        self._loop.add_writer(self._sock.fileno(), self._writable)
        return True

    def close(self) -> None:
        """Close without a word to the owner."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, fd in self._queue:
            if fd is not None:
                os.close(fd)
        self._queue.clear()
        self._sock.close()

    def _lost(self) -> None:
        if not self.closed:
            self.close()
            self._gone()

    def _try(self, data: bytes, fd: int | None) -> _Done:
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            self._sock.sendmsg([data], rights)
        except BlockingIOError:
            return _Done.LATER
        except OSError:
            self._lost()
            return _Done.LOST
        return _Done.SENT

    def _writable(self) -> None:
        while self._queue:
            data, fd = self._queue[0]
            if self._try(data, fd) is not _Done.SENT:
                return
            self._queue.popleft()
            if fd is not None:
                os.close(fd)
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(_TURN_MESSAGES):
            if self.closed:
                return
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    MESSAGE_BYTES_MAX, socket.CMSG_SPACE(_DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                self._lost()
                return
            fds = _descriptors(ancillary)
            try:
                if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
                    raise msgspec.DecodeError("no whole message")
                message = self._decoder.decode(data)
            except msgspec.DecodeError:
                for fd in fds:
                    os.close(fd)
                self._lost()
                return
            self._take(message, fds[0] if fds else None)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            with suppress(ValueError):
                fds.frombytes(data[: len(data) - len(data) % _DESCRIPTOR])
    return list(fds)

"""The control connection on a socket: TLS, messages, byte counts, time-outs."""

import asyncio
import socket

from crypto.errors import AuthenticationError, IntegrityError
from crypto.tls import PRE_AUTHENTICATION_BYTES_MAX, PeerInfo, TlsPeer
from proxy.control import Abort, Message, MessageReader, encode, printable
from proxy.errors import PeerAborted, PeerLost, PeerRefused, PeerVanished
from proxy.limits import ABORT_SECONDS_MAX, CONTROL_SECONDS_MAX, DRAIN_SECONDS_MAX
from proxy.shell.waiting import Gate

_READ_BYTES = 64 * 1024


class ControlLink:
    """One control connection, from TCP to messages.

    Reads and writes survive a cancellation without losing a byte, which TLS would take for forgery: what a session says
    last, it says after its tasks were cancelled.

    Args:
        sock: connected and non-blocking; this object owns it.
        tls: the TLS endpoint.
        received: bytes that were read from the socket already.
        preface: what goes out before TLS.
    """

    def __init__(self, sock: socket.socket, tls: TlsPeer, received: bytes = b"", preface: bytes = b"") -> None:
        self._sock = sock
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._messages: list[Message] = []
        self._reader = MessageReader()
        self._sending = asyncio.Lock()
        self._read_gate, self._write_gate = Gate(sock.fileno()), Gate(sock.fileno())
        self._unsent = bytearray(preface)
        self._open = False
        self._early = received
        self._begun: float | None = None
        """When the message under way began to arrive."""
        self.sent_bytes = len(preface)
        self.received_bytes = 0

    async def handshake(self) -> PeerInfo:
        """Run TLS until the peer is verified.

        Raises:
            AuthenticationError: TLS or the peer's certificate failed.
            PeerRefused: the connection ended before that.
        """
        while self._tls.peer is None:
            await self._flush()
            await self._read()
        await self._flush()
        return self._tls.peer

    @property
    def tls(self) -> TlsPeer:
        """The TLS endpoint, for its exporter."""
        return self._tls

    def mark_open(self) -> None:
        """ACCEPT has passed: from now on failures concern the session, not the peer's identity."""
        self._open = True
        self._tls.mark_open()

    async def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            PeerLost: the connection broke (PeerRefused before ACCEPT).
        """
        self._tls.send(encode(message))
        await self._flush()

    async def receive(self) -> Message:
        """The next message.

        Raises:
            PeerAborted: it was ABORT.
            PeerLost: the connection ended (PeerRefused before ACCEPT).
            ProtocolViolation: the bytes are no message.
            IntegrityError, AuthenticationError: TLS failed, after or before ACCEPT.
        """
        while not self._messages:
            try:
                async with asyncio.timeout_at(None if self._begun is None else self._begun + CONTROL_SECONDS_MAX):
                    await self._read()
            except TimeoutError:
                raise self._lost(f"a control message did not end within {CONTROL_SECONDS_MAX:.0f} s") from None
            if not self._reader.partial:
                self._begun = None
            elif self._begun is None or self._messages:
                self._begun = self._loop.time()
        message = self._messages.pop(0)
        if isinstance(message, Abort):
            raise PeerAborted(message.code, printable(message.reason))
        return message

    async def _read(self) -> None:
        data, self._early = self._early, b""
        data = data or await self._receive_bytes()
        if not data:
            raise self._lost("the control connection ended")
        self.received_bytes += len(data)
        try:
            plaintext = self._tls.receive(data)
        except (AuthenticationError, IntegrityError):
            await self._say_farewell()
            raise
        self._messages += self._reader.feed(plaintext)
        await self._flush()
        if self._tls.closed and not self._messages:
            raise self._lost("the peer closed the control connection")

    async def _receive_bytes(self) -> bytes:
        # Not the loop's sock_recv: cancelled between its read and our waking, it would drop what it had read.
        while True:
            try:
                return self._sock.recv(PRE_AUTHENTICATION_BYTES_MAX if self._tls.peer is None else _READ_BYTES)
            except BlockingIOError:
                await self._read_gate.wait_readable()
            except OSError as error:
                raise self._lost(f"the control connection broke ({error.strerror})") from None

    def _lost(self, reason: str) -> PeerLost | PeerVanished:
        return PeerLost(reason) if self._open else PeerVanished(f"{reason} before the session was accepted")

    async def _flush(self) -> None:
        async with self._sending:
            data = self._tls.outgoing()
            self.sent_bytes += len(data)
            self._unsent += data
            while self._unsent:
                try:
                    del self._unsent[: self._sock.send(self._unsent)]
                except BlockingIOError:
                    await self._write_gate.wait_writable()
                except OSError as error:
                    raise self._lost(f"the control connection broke ({error.strerror})") from None

    async def _say_farewell(self) -> None:
        """Send the alert that OpenSSL has queued, so that the peer learns what happened."""
        try:
            async with asyncio.timeout(ABORT_SECONDS_MAX):
                await self._flush()
        except (TimeoutError, PeerLost, PeerRefused):
            return

    async def abort(self, code: int, reason: str) -> bool:
        """Tell the peer why the session is over; whether the connection still took it. ``close`` follows."""
        if self._tls.peer is None:
            return False
        try:
            async with asyncio.timeout(ABORT_SECONDS_MAX):
                await self.send(Abort(code, printable(reason)))
        except (TimeoutError, PeerLost, PeerRefused, AuthenticationError):
            return False
        return True

    async def close(self) -> bool:
        """close_notify, half-close, wait for the peer's end, close: so that no reset overtakes what was said last.

        Returns:
            Whether the peer took its leave by close_notify, which it does after it has heard everything.
        """
        self._tls.close()
        try:
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                await self._flush()
                self._release()
                self._sock.shutdown(socket.SHUT_WR)
                while data := await self._loop.sock_recv(self._sock, _READ_BYTES):
                    if not self._tls.closed and self._open:
                        self._tls.receive(data)
        except (OSError, TimeoutError, PeerLost, PeerRefused, AuthenticationError, IntegrityError):
            pass
        finally:
            self.drop()
        return self._tls.closed

    def drop(self) -> None:
        """Close at once; whoever waits for it finds it broken."""
        self._release()
        self._sock.close()
        self._read_gate.wake()
        self._write_gate.wake()

    def _release(self) -> None:
        self._read_gate.release()
        self._write_gate.release()

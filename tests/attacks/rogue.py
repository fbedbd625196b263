"""Peers with a good identity and bad manners: they speak the protocol by hand, and may say anything.

TLS and the sealing of records are crypto/'s own (an insider has those); messages and frames are made here, from the
format.
"""

import asyncio
import os
import socket
from dataclasses import dataclass
from typing import Any, Self

import msgspec
from blake3 import blake3

from crypto.errors import CryptoError
from crypto.keys import Direction, EpochKeys, LaneId, ResumeSecret, SessionId, Suite, lane_info, lane_secret
from crypto.records import Opener, RecordType, Sealer
from crypto.tls import TlsConfig, TlsPeer
from tests.attacks import wire

MIB = 1024 * 1024
SUITE = Suite.AES_256_GCM


class Gone(Exception):
    """The relay has closed or reset a connection."""


def message(kind: str, **fields: object) -> bytes:
    """A control message: the length, then a MessagePack map."""
    body = msgspec.msgpack.encode({"type": kind, **fields})
    return len(body).to_bytes(4, "big") + body


def offer(session: bytes, **changes: object) -> bytes:
    """A good offer, but for the changes."""
    fields: dict[str, object] = {
        "version": 1,
        "session": session,
        "suites": [1, 2],
        "codecs": [0],
        "egress": "default",
        "lanes": 1,
        "resume_seconds": 30,
        "xl_flags": "",
    }
    return message("offer", **(fields | changes))


class Stream:
    """Makes the frames of one channel's one direction; anything about them can be made wrong."""

    def __init__(self, channel: int = 0, direction: Direction = Direction.FORWARD) -> None:
        self.channel, self.direction = channel, direction
        self.number = self.offset = 0
        self._hasher = blake3()

    def data(self, body: bytes, order: int, **changes: Any) -> bytes:
        """The next DATA frame."""
        self._hasher.update(body)
        frame = self._frame(wire.DATA, body, len(body), order, changes)
        self.offset += len(body)
        return frame

    def paged(self, body: bytes, raw: bytes, order: int, **changes: Any) -> bytes:
        """The next DATA frame, whose body says by pages what ``raw`` says as it is."""
        self._hasher.update(raw)
        frame = self._frame(wire.DATA, body, len(raw), order, {"codec": 1} | changes)
        self.offset += len(raw)
        return frame

    def end(self, order: int, **changes: Any) -> bytes:
        """The END frame."""
        body = changes.pop("body", self._hasher.digest())
        return self._frame(wire.END, body, 0, order, changes)

    def _frame(self, kind: int, body: bytes, raw: int, order: int, changes: dict[str, Any]) -> bytes:
        fields = {
            "kind": kind,
            "codec": 0,
            "flags": 0,
            "channel": self.channel,
            "direction": int(self.direction),
            "reserved": 0,
            "number": self.number,
            "cache_order": order,
            "offset": self.offset,
            "raw": raw,
            "length": len(body),
            "digest": self._hasher.digest()[:16],
            "spare": 0,
        }
        assert changes.keys() <= fields.keys()
        self.number += 1
        return wire.FRAME_HEADER.pack(*(fields | changes).values()) + body


def ack(channel: int, direction: int, frames: int, credit: int) -> bytes:
    """One entry of an ACK record."""
    return wire.ACK_ENTRY.pack(channel, direction, frames, credit)


class Control:
    """A control connection, spoken by hand."""

    def __init__(self, sock: socket.socket, config: TlsConfig) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.tls = TlsPeer(config)
        self._config = config
        self._plaintext = bytearray()

    async def raw(self, data: bytes) -> None:
        """Send bytes outside TLS."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def handshake(self) -> None:
        """TLS until the relay is verified."""
        while self.tls.peer is None:
            await self._flush()
            await self._read()
        await self._flush()

    async def say(self, data: bytes) -> None:
        """Send plaintext: one message or several, or what is none."""
        self.tls.send(data)
        await self._flush()

    async def hear(self) -> dict[str, Any]:
        """The next message other than a heartbeat.

        Raises:
            Gone: the connection ended.
        """
        while True:
            while len(self._plaintext) < 4 or len(self._plaintext) < self._size:
                await self._read()
            body = bytes(self._plaintext[4 : self._size])
            del self._plaintext[: self._size]
            heard: dict[str, Any] = msgspec.msgpack.decode(body)
            if heard["type"] != "heartbeat":
                return heard

    def exporter(self, session: bytes) -> bytes:
        """What both ends of this connection can compute, and nobody else."""
        return self.tls.export(SessionId(session))

    @property
    def _size(self) -> int:
        return 4 + int.from_bytes(self._plaintext[:4], "big")

    def keys(self, session: bytes, lane: int, direction: Direction) -> EpochKeys:
        """The keys of one lane direction, as the key schedule gives them."""
        assert self.tls.peer is not None
        leaves = self._config.leaf_sha256, self.tls.peer.leaf_sha256
        source, destination = leaves if self._config.role.value == "client" else leaves[::-1]
        info = lane_info(
            suite=SUITE,
            direction=direction,
            lane=LaneId(lane),
            source_leaf_sha256=source,
            destination_leaf_sha256=destination,
        )
        return EpochKeys(SUITE, lane_secret(self.tls.export(SessionId(session)), SessionId(session), info))

    async def _read(self) -> None:
        try:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        except OSError as error:
            raise Gone("control was reset") from error
        if not data:
            raise Gone("control ended")
        try:
            self._plaintext += self.tls.receive(data)
        except CryptoError:
            await self._flush()  # the alert
            self.sock.shutdown(socket.SHUT_WR)
            raise
        if self.tls.closed and not self._plaintext:
            raise Gone("control was closed")
        await self._flush()

    async def _flush(self) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, self.tls.outgoing())
        except OSError as error:
            raise Gone("control was reset") from error


class HandLane:
    """A lane, spoken by hand: `sealer` and `opener` are open to every abuse."""

    def __init__(self, sock: socket.socket, sealer: Sealer, opener: Opener) -> None:
        self.sock, self.sealer, self.opener = sock, sealer, opener

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        try:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)
        except OSError as error:
            raise Gone("the lane was reset") from error

    async def record(self, kind: RecordType, payload: bytes = b"", flags: int = 0) -> None:
        """Seal and send one record."""
        await self.raw(bytes(self.sealer.seal(kind, payload, flags)))

    async def frame(self, frame: bytes) -> None:
        """Send a frame, in one record if it fits."""
        for start in range(0, len(frame), wire.RECORD_BYTES):
            part = frame[start : start + wire.RECORD_BYTES]
            first = wire.FIRST if start == 0 else 0
            last = wire.LAST if start + len(part) == len(frame) else 0
            await self.record(RecordType.FRAME, part, first | last)

    async def receive(self) -> tuple[RecordType, bytes]:
        """The next record.

        Raises:
            Gone: the lane ended.
        """
        header_bytes = await self._exactly(wire.HEADER_BYTES)
        header = self.opener.parse_header(header_bytes)
        body = await self._exactly(header.body_bytes)
        out = bytearray(header.length)
        self.opener.open_into(header, header_bytes, memoryview(body), memoryview(out))
        return header.type, bytes(out)

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = await asyncio.get_running_loop().sock_recv(self.sock, size - len(data))
            except OSError as error:
                raise Gone("the lane was reset") from error
            if not more:
                raise Gone("the lane ended")
            data += more
        return data


async def dial(port: int) -> socket.socket:
    """A TCP connection to a relay of this machine."""
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


class RogueSource:
    """Connects to a destination's relay; an async context manager that closes whatever it opened."""

    def __init__(self, config: TlsConfig, port: int) -> None:
        self._config, self._port = config, port
        self._sockets: list[socket.socket] = []
        self.session = os.urandom(16)
        self.control: Control
        self.grants: list[dict[str, Any]] = []
        self.route = bytes(16)
        self.secret: ResumeSecret

    async def __aenter__(self) -> Self:
        """Connect and authenticate."""
        self.control = Control(await self.dial(), self._config)
        try:
            await self.control.handshake()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything."""
        self.close()

    def close(self) -> None:
        """Close everything."""
        for sock in self._sockets:
            sock.close()

    async def dial(self) -> socket.socket:
        """One more connection to the relay."""
        sock = await dial(self._port)
        self._sockets.append(sock)
        return sock

    async def offer(self, **changes: object) -> dict[str, Any]:
        """Say an offer, return the answer."""
        await self.control.say(offer(self.session, **changes))
        answer = await self.control.hear()
        self.grants = list(answer.get("lanes", ()))
        self.route = answer.get("route", self.route)
        self.secret = ResumeSecret(self.control.exporter(self.session), SessionId(self.session))
        return answer

    async def returned(self, config: TlsConfig | None = None, *, preface: bool = True) -> Control:
        """One more control connection, TLS included; `control` stays as it is."""
        control = Control(await self.dial(), config or self._config)
        if preface:
            await control.raw(wire.RESUME_MAGIC + self.route)
        await control.handshake()
        return control

    def resume(self, control: Control, **changes: object) -> bytes:
        """A good RESUME for that connection, but for the changes."""
        fields: dict[str, object] = {
            "version": 1,
            "session": self.session,
            "proof": self.secret.proof(Direction.FORWARD, control.exporter(self.session)),
            "received": 0,
            "channels": [],
        }
        return message("resume", **(fields | changes))

    async def comes_back(self, **changes: object) -> dict[str, Any]:
        """Resume over a new control connection; where that is granted, it is `control` from then on."""
        control = await self.returned()
        await control.say(self.resume(control, **changes))
        answer = await control.hear()
        if answer["type"] == "resumed":
            exporter = control.exporter(self.session)
            self.secret.verify(answer["proof"], Direction.BACKWARD, exporter)
            self.control.sock.close()
            self.control, self.grants = control, list(answer["lanes"])
        return answer

    def halves(self, lane: int) -> tuple[Sealer, Opener]:
        """Sealer and opener of any lane."""
        return (
            Sealer(self.control.keys(self.session, lane, Direction.FORWARD), LaneId(lane)),
            Opener(self.control.keys(self.session, lane, Direction.BACKWARD), LaneId(lane)),
        )

    async def lane(self, grant: dict[str, Any] | None = None) -> HandLane:
        """Open a lane with a grant (the next one), HELLO and LANE_OK included."""
        grant = grant or self.grants.pop(0)
        made = HandLane(await self.dial(), *self.halves(grant["lane"]))
        await made.raw(wire.LANE_MAGIC + grant["token"])
        await made.record(RecordType.HELLO)
        kind, _ = await made.receive()
        assert kind is RecordType.LANE_OK
        return made

    async def channel(self, number: int = 0, credit: int = MIB) -> int:
        """Open a channel, return the credit given."""
        await self.control.say(message("channel_open", channel=number, credit=credit))
        answer = await self.control.hear()
        assert answer["type"] == "channel_opened", answer
        return int(answer["credit"])


async def finish_well(rogue: RogueSource, lane: HandLane, stream: Stream, order: int) -> None:
    """End a session as a source in order does, whose hypervisor got no answer but the end."""
    await lane.frame(stream.end(order=order))
    kind, payload = await lane.receive()
    while kind is not RecordType.FRAME:
        kind, payload = await lane.receive()
    assert payload == Stream(direction=Direction.BACKWARD).end(order=0)
    await lane.record(RecordType.ACK, ack(0, 1, 1, MIB))
    await rogue.control.say(message("finish"))
    assert await rogue.control.hear() == {"type": "finished"}


@dataclass(slots=True)
class Met:
    """What a `RogueDestination` has with one source: its control connection and its first lane."""

    control: Control
    lane: HandLane
    offer: dict[str, Any]
    secret: ResumeSecret

    def resumed(self, control: Control, **changes: object) -> bytes:
        """A good RESUMED for that connection, of a destination that has heard of channel 0 and got nothing, but for
        the changes."""
        session = self.offer["session"]
        fields: dict[str, object] = {
            "proof": self.secret.proof(Direction.BACKWARD, control.exporter(session)),
            "received": 0,
            "channels": [{"channel": 0, "frames": 0, "credit": MIB, "opened": True}],
            "lanes": [{"lane": 1, "token": bytes(16)}],
            "phase": "open",
        }
        return message("resumed", **(fields | changes))


class RogueDestination:
    """Listens for a source's relay; an async context manager that closes whatever it opened."""

    def __init__(self, config: TlsConfig) -> None:
        self._config = config
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._sockets: list[socket.socket] = []
        self.token = os.urandom(16)
        self.port: int = self._listener.getsockname()[1]

    async def __aenter__(self) -> Self:
        """Nothing to do yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close everything."""
        for sock in (*self._sockets, self._listener):
            sock.close()

    async def accept(self) -> socket.socket:
        """The relay's next connection."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        sock.setblocking(False)
        self._sockets.append(sock)
        return sock

    async def greet(self) -> tuple[Control, dict[str, Any]]:
        """Authenticate and hear the offer."""
        control = Control(await self.accept(), self._config)
        await control.handshake()
        return control, await control.hear()

    async def taken_back(self, config: TlsConfig | None = None) -> tuple[Control, dict[str, Any]]:
        """The source's next control connection of a session that it resumes, up to its RESUME."""
        control = Control(await self.accept(), config or self._config)
        preface = b""
        while len(preface) < wire.PREFIX_BYTES:
            preface += await asyncio.get_running_loop().sock_recv(control.sock, wire.PREFIX_BYTES - len(preface))
        assert preface == wire.RESUME_MAGIC + bytes(16)
        await control.handshake()
        return control, await control.hear()

    def acceptance(self, **changes: object) -> bytes:
        """A good ACCEPT, but for the changes."""
        fields: dict[str, object] = {
            "suite": 1,
            "codec": 0,
            "lanes": [{"lane": 0, "token": self.token}],
            "resume_seconds": 30,
            "route": bytes(16),
        }
        return message("accept", **(fields | changes))

    async def meet(self, credit: int = MIB, **changes: object) -> Met:
        """Everything up to an open channel 0; with these changes to ACCEPT, or what makes them of the exporter."""
        control, heard = await self.greet()
        exporter = control.exporter(heard["session"])
        changes = {name: made(exporter) if callable(made) else made for name, made in changes.items()}
        await control.say(self.acceptance(**changes))
        lane = await self.lane(control, heard["session"])
        assert (await control.hear())["type"] == "channel_open"
        await control.say(message("channel_opened", channel=0, credit=credit))
        session = heard["session"]
        return Met(control, lane, heard, ResumeSecret(control.exporter(session), SessionId(session)))

    async def lane(self, control: Control, session: bytes, number: int = 0) -> HandLane:
        """Take the relay's lane: prefix, HELLO, LANE_OK."""
        lane = HandLane(
            await self.accept(),
            Sealer(control.keys(session, number, Direction.BACKWARD), LaneId(number)),
            Opener(control.keys(session, number, Direction.FORWARD), LaneId(number)),
        )
        prefix = await lane._exactly(wire.PREFIX_BYTES)
        assert prefix.startswith(wire.LANE_MAGIC)
        kind, _ = await lane.receive()
        assert kind is RecordType.HELLO
        await lane.record(RecordType.LANE_OK)
        return lane

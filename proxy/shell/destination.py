"""The destination's end: one port for control and lanes, sessions handed to the local hypervisor."""

import asyncio
import hmac
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from crypto.errors import AuthenticationError, CryptoError, IntegrityError, LaneReused
from crypto.keys import LANE_ID_MAX, LaneId, SessionId, Suite
from crypto.records import OVERHEAD_BYTES, RecordType
from crypto.tls import PeerInfo, TlsConfig, TlsPeer
from proxy.control import (
    PROTOCOL_VERSION,
    Accept,
    ChannelOpen,
    ChannelOpened,
    Finish,
    Finished,
    LaneGrant,
    LaneGranted,
    LaneRequest,
    Message,
    Offer,
    Refuse,
)
from proxy.endpoints.base import Egress
from proxy.endpoints.sockets import tune
from proxy.errors import (
    EXIT_AUTHENTICATION,
    EXIT_POLICY,
    ConfigurationError,
    HypervisorFailed,
    PeerLost,
    PeerRefused,
    PolicyRefused,
    ProtocolViolation,
    RelayError,
)
from proxy.limits import (
    CHANNELS_MAX,
    CONTROL_SECONDS_MAX,
    FIRST_BYTE_SECONDS_MAX,
    HANDSHAKE_SECONDS_MAX,
    LANE_ATTEMPTS_MAX,
    LANE_HELLO_SECONDS_MAX,
    LANES_MAX,
    SESSIONS_MAX,
)
from proxy.report import SessionReport
from proxy.session import Role, Session
from proxy.shell.channel import Channel
from proxy.shell.greeting import HalfOpen
from proxy.shell.lane import Lane, LaneKeys
from proxy.shell.link import ControlLink
from proxy.shell.runner import Runner
from proxy.wire import (
    LANE_FIRST_BYTE,
    LANE_MAGIC,
    LANE_PREFIX_BYTES,
    LANE_TOKEN_BYTES,
    TLS_FIRST_BYTE,
    ChannelId,
    Codec,
)

log = structlog.get_logger("korora.destination")

RandomBytes = Callable[[int], bytes]


class DestinationRunner(Runner):
    """An open session at the destination.

    Args:
        session, link, peer, report: see ``Runner``.
        keys: derives lanes.
        egress: the local hypervisor.
        xl_flags: what the source asked of xl.
        random: source of lane tokens.
    """

    def __init__(
        self,
        session: Session,
        link: ControlLink,
        peer: PeerInfo,
        report: SessionReport,
        *,
        keys: LaneKeys,
        egress: Egress,
        xl_flags: str,
        random: RandomBytes,
    ) -> None:
        super().__init__(session, link, peer, report)
        self._keys, self.egress, self._xl_flags, self._random = keys, egress, xl_flags, random
        self._tokens: dict[bytes, LaneId] = {}
        self._next_lane = 0
        self._announced: asyncio.Queue[ChannelOpen] = asyncio.Queue(CHANNELS_MAX)
        self._finish_asked = False

    def grant(self) -> LaneGrant:
        """A lane id never given out before on this connection, with a token for its hello.

        Raises:
            LaneReused: the ids have run out.
            ProtocolViolation: the peer asks for more lanes than it may.
        """
        if self._next_lane > LANE_ID_MAX:
            raise LaneReused("lane ids have run out")
        if self._next_lane >= LANES_MAX + LANE_ATTEMPTS_MAX:
            raise ProtocolViolation("the peer asks for lane after lane")
        lane = LaneId(self._next_lane)
        self._next_lane += 1
        token = self._random(LANE_TOKEN_BYTES)
        self._tokens[token] = lane
        return LaneGrant(lane, token)

    def redeem(self, token: bytes) -> LaneId | None:
        """The lane a token opens; a token works once."""
        if self.over:
            return None
        found = None
        for known in self._tokens:
            if hmac.compare_digest(known, token):
                found = known
        return None if found is None else self._tokens.pop(found)

    async def join(self, sock: socket.socket, lane_id: LaneId) -> None:
        """Take over a connection whose token was good: its sealed HELLO, our LANE_OK.

        A hello that is not authentic costs only its connection, never the session.
        """
        sealer, opener = self._keys.halves(lane_id)
        lane = Lane(sock, lane_id, sealer, opener, self.pool)
        lane.received_bytes = LANE_PREFIX_BYTES
        try:
            async with asyncio.timeout(LANE_HELLO_SECONDS_MAX):
                hello = await lane.receive_exactly(HELLO_BYTES)
                if hello.header.type is not RecordType.HELLO:
                    raise ProtocolViolation(f"{hello.header.type.name} instead of HELLO")
                hello.release()
                await lane.send(RecordType.LANE_OK)
        except (IntegrityError, RelayError, TimeoutError) as error:
            self.log.warning("a lane's hello failed", lane=lane_id, reason=str(error) or "no answer in time")
            lane.drop()
            return
        except BaseException:
            lane.drop()
            raise
        self.add_lane(lane)

    def forget(self, lane: Lane) -> bool:
        """See ``Runner.forget``: a source that did not get our LANE_OK whole gives that lane up and opens another."""
        if not lane.unused or (self.session.receivers and len(self.lanes) == 1):
            return False
        self.log.warning("a lane was given up before its first use", lane=lane.id)
        del self.lanes[lane.id]
        lane.drop()
        return True

    async def _conduct(self) -> None:
        self.start_control()
        if not await self.until(lambda: bool(self.lanes), LANE_HELLO_SECONDS_MAX * (LANE_ATTEMPTS_MAX + 1)):
            raise PeerLost("the source opened no lane")
        self.serve(self.acknowledge(), "acknowledge")
        self.serve(self._open_channels(), "open channels")
        await self.until(lambda: self._finish_asked)
        # FINISH came by the control connection and may have overtaken the last acknowledgements on a lane.
        if not await self.until(lambda: self.session.finished, CONTROL_SECONDS_MAX):
            raise ProtocolViolation("FINISH before all channels have ended")
        await self.settle_channels()
        # Everything has been handed over for good: whether the source still hears so does not change that.
        self.conclude()
        with suppress(PeerLost):
            await self.say(Finished())

    async def _hear(self, message: Message) -> None:
        match message:
            case ChannelOpen() if not self._announced.full():
                self._announced.put_nowait(message)
            case LaneRequest():
                self._tokens.clear()  # it gave the earlier ones up
                await self.say(LaneGranted(self.grant()))
            case Finish():
                self._finish_asked = True
                self._progress.wake()
            case _:
                raise ProtocolViolation(f"{type(message).__name__} has no place here")

    async def _open_channels(self) -> None:
        """Connect to the hypervisor when the source announces a channel: in order, never before, never as a probe."""
        while True:
            announced = await self._announced.get()
            if not self.lanes:
                raise PeerLost(f"channel {announced.channel}: the lane it was to use has gone")
            if self.egress.single and announced.channel > 0:
                raise HypervisorFailed(f"{self.egress.label} takes one channel, the source has opened another")
            number = ChannelId(announced.channel)
            credit = self.session.reserve(number)
            channel = Channel(number, await self.egress.connect(self._xl_flags), self)
            self.session.open(number, announced.credit)
            self.start_delivery(channel)
            await self.say(ChannelOpened(number, credit))
            self.start_pump(channel)


HELLO_BYTES = OVERHEAD_BYTES


Admission = Callable[[PeerInfo, Offer], None]


def _anybody(peer: PeerInfo, offer: Offer) -> None:
    """Whoever has authenticated may use every egress."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a destination agrees to."""

    resume_seconds: int = 30
    sessions_max: int = SESSIONS_MAX
    suites: tuple[Suite, ...] = (Suite.AES_256_GCM, Suite.CHACHA20_POLY1305)
    random: RandomBytes = field(default=os.urandom, repr=False)
    admit: Admission = field(default=_anybody, repr=False)
    """Raises PolicyRefused where a peer may not use an egress."""


SessionTask = Callable[[DestinationRunner], Awaitable[None]]
PeerFailure = Callable[[Exception], None]


class Destination:
    """Accepts connections on one port and makes sessions of them.

    Args:
        tls: identity and rules for peers; role SERVER.
        egresses: the destination's own table of names.
        listener: bound, listening and non-blocking; None where connections come by ``take`` alone.
        terms: what is agreed to.
        begin: called with each accepted session, in a task of its own; runs it.
        failed: told of every TLS peer that did not become a session.
    """

    def __init__(
        self,
        tls: TlsConfig,
        egresses: dict[str, Egress],
        listener: socket.socket | None,
        *,
        terms: Terms,
        begin: SessionTask,
        failed: PeerFailure,
    ) -> None:
        self._tls, self._egresses, self._listener, self._terms = tls, egresses, listener, terms
        self._begin, self._failed = begin, failed
        self._half_open = HalfOpen()
        self._sessions: set[DestinationRunner] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepting = True
        """Whether new sessions are let in; lanes of open ones always are."""

    @property
    def sessions(self) -> int:
        """Sessions that are open, and those that are being told that they are."""
        return len(self._sessions)

    async def serve(self) -> None:
        """Accept connections until cancelled."""
        if self._listener is None:
            raise ConfigurationError("nothing to accept connections from", "give take() the connections")
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, address = await loop.sock_accept(self._listener)
                except OSError as error:
                    # Out of descriptors or memory: what is open goes on, newcomers wait in the backlog.
                    log.warning("cannot accept a connection", reason=error.strerror)
                    await asyncio.sleep(0.1)
                    continue
                self.take(sock, str(address[0]))
        finally:
            await self.close()

    def take(self, sock: socket.socket, address: str) -> None:
        """Greet one connection that was accepted here or elsewhere; this object owns it from now on.

        Args:
            sock: connected; nothing has been read from it.
            address: where it comes from, for limits and logs.
        """
        task = asyncio.get_running_loop().create_task(self._greet(sock, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._half_open.add(task, address)

    async def close(self) -> None:
        """End every connection and session there is."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reconfigure(self, tls: TlsConfig, egresses: dict[str, Egress], terms: Terms) -> None:
        """Judge by other rules from now on: whoever makes contact next, to resume a session included.

        Sessions that are open go on.
        """
        self._tls, self._egresses, self._terms = tls, egresses, terms

    async def _greet(self, sock: socket.socket, address: str) -> None:
        """The first byte tells control from lane; what is neither is closed and does not count."""
        tune(sock)
        try:
            async with asyncio.timeout(FIRST_BYTE_SECONDS_MAX):
                first = await asyncio.get_running_loop().sock_recv(sock, 1)
        except (OSError, TimeoutError):
            first = b""
        except asyncio.CancelledError:
            sock.close()
            raise
        if first and first[0] == LANE_FIRST_BYTE:
            await self._lane(sock, first)
        elif first and first[0] == TLS_FIRST_BYTE:
            await self._control(sock, first, address)
        else:
            sock.close()

    async def _lane(self, sock: socket.socket, first: bytes) -> None:
        """A lane hello: its token names the session."""
        loop = asyncio.get_running_loop()
        prefix = first
        try:
            async with asyncio.timeout(LANE_HELLO_SECONDS_MAX):
                while len(prefix) < LANE_PREFIX_BYTES:
                    more = await loop.sock_recv(sock, LANE_PREFIX_BYTES - len(prefix))
                    if not more:
                        break
                    prefix += more
        except (OSError, TimeoutError):
            prefix = b""
        except asyncio.CancelledError:
            sock.close()
            raise
        if len(prefix) == LANE_PREFIX_BYTES and prefix.startswith(LANE_MAGIC):
            for runner in self._sessions:
                lane = runner.redeem(prefix[len(LANE_MAGIC) :])
                if lane is not None:
                    await runner.join(sock, lane)
                    return
        sock.close()

    async def _control(self, sock: socket.socket, first: bytes, address: str) -> None:
        """TLS, OFFER and its answer; then the session."""
        link = ControlLink(sock, TlsPeer(self._tls), received=first)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
                peer = await link.handshake()
                offer = await link.receive()
                runner = await self._answer(link, peer, offer, address)
        except (CryptoError, RelayError, TimeoutError) as error:
            failure = _as_refusal(error)
            log.warning("a peer was not let in", address=address, reason=str(failure))
            self._failed(failure)
            await link.close()
            return
        except BaseException:
            link.drop()
            raise
        self._half_open.done(asyncio.current_task())
        runner.report.handshake_seconds = loop.time() - began
        try:
            await self._begin(runner)
        finally:
            self._sessions.discard(runner)

    async def _answer(self, link: ControlLink, peer: PeerInfo, offer: Message, address: str) -> DestinationRunner:
        """ACCEPT an offer, or say why not.

        Raises:
            PolicyRefused, PeerRefused: it was refused; the peer has been told.
        """
        try:
            if not isinstance(offer, Offer):
                raise PeerRefused(f"{type(offer).__name__} instead of an offer")
            suite = self._judge(peer, offer)
        except (PolicyRefused, PeerRefused) as refusal:
            code = EXIT_POLICY if isinstance(refusal, PolicyRefused) else EXIT_AUTHENTICATION
            await link.send(Refuse(code, str(refusal)))
            raise
        session = Session(Role.DESTINATION, SessionId(offer.session))
        session.received(offer)
        report = SessionReport(role=Role.DESTINATION.value, session_id=offer.session.hex(), started=datetime.now(UTC))
        report.peer, report.peer_address = peer.name, address
        report.group, report.cipher = peer.group, suite.label
        keys = LaneKeys(
            link.tls.export(session.id),
            session,
            suite,
            source_leaf=peer.leaf_sha256,
            destination_leaf=self._tls.leaf_sha256,
        )
        runner = DestinationRunner(
            session,
            link,
            peer,
            report,
            keys=keys,
            egress=self._egresses[offer.egress],
            xl_flags=offer.xl_flags,
            random=self._terms.random,
        )
        grants = tuple(runner.grant() for _ in range(min(offer.lanes, 1)))
        self._sessions.add(runner)
        try:
            resume = min(offer.resume_seconds, self._terms.resume_seconds)
            link.mark_open()
            await runner.say(Accept(int(suite), int(Codec.OPAQUE), grants, resume))
        except BaseException:
            self._sessions.discard(runner)
            raise
        return runner

    def _judge(self, peer: PeerInfo, offer: Offer) -> Suite:
        """The suite to use, if the offer can be accepted."""
        if offer.version != PROTOCOL_VERSION:
            raise PeerRefused(f"protocol version {offer.version}, this relay speaks {PROTOCOL_VERSION}")
        suite = next((mine for mine in self._terms.suites if mine in offer.suites), None)
        if suite is None or Codec.OPAQUE not in offer.codecs:
            raise PeerRefused("no common suite or codec")
        if offer.egress not in self._egresses:
            raise PolicyRefused(f"there is no egress {offer.egress!r} here")
        if not self.accepting or len(self._sessions) >= self._terms.sessions_max:
            raise PolicyRefused("no further session is taken now")
        if any(runner.session.id == offer.session for runner in self._sessions):
            raise PolicyRefused("that session id is in use")
        egress = self._egresses[offer.egress]
        if egress.single and any(runner.egress.label == egress.label for runner in self._sessions):
            raise PolicyRefused(f"{egress.label} serves one session at a time")
        self._terms.admit(peer, offer)
        return suite


def _as_refusal(error: Exception) -> Exception:
    """Anything that fails before ACCEPT is a failed authentication, but a policy's no."""
    if isinstance(error, AuthenticationError | PolicyRefused | PeerRefused):
        return error
    if isinstance(error, TimeoutError):
        return PeerRefused(f"no complete handshake within {HANDSHAKE_SECONDS_MAX:.0f} s")
    return PeerRefused(str(error))

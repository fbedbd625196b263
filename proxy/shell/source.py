"""The source's end: take the local hypervisor's connections, reach the peer, offer, carry."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from crypto.errors import AuthenticationError, IntegrityError
from crypto.keys import SESSION_ID_BYTES, LaneId, SessionId, Suite
from crypto.records import RecordType
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
    printable,
)
from proxy.endpoints.base import Connection, Ingress
from proxy.endpoints.sockets import dial_tcp, explain
from proxy.errors import (
    EXIT_POLICY,
    HypervisorFailed,
    PeerAborted,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    PolicyRefused,
    ProtocolViolation,
)
from proxy.limits import (
    CHANNEL_OPEN_SECONDS_MAX,
    CHANNELS_MAX,
    CONTROL_SECONDS_MAX,
    HANDOVER_SECONDS_MAX,
    HANDSHAKE_SECONDS_MAX,
    LANE_ATTEMPTS_MAX,
    LANE_HELLO_SECONDS_MAX,
)
from proxy.report import SessionReport
from proxy.session import Role, Session
from proxy.shell.channel import Channel
from proxy.shell.lane import Lane, LaneKeys
from proxy.shell.link import ControlLink
from proxy.shell.runner import Runner
from proxy.wire import LANE_MAGIC, ChannelId, Codec

RandomBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Peer:
    """Where the destination's relay listens, and what is asked of it."""

    host: str
    port: int
    lanes: int = 1
    resume_seconds: int = 30
    egress: str = "default"
    xl_flags: str = ""
    rate_limit: float | None = None
    suites: tuple[Suite, ...] = (Suite.AES_256_GCM, Suite.CHACHA20_POLY1305)
    random: RandomBytes = field(default=os.urandom, repr=False)

    @property
    def address(self) -> str:
        """HOST:PORT for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class SourceRunner(Runner):
    """An open session at the source.

    Args:
        session, link, peer, report: see ``Runner``.
        where: the destination's relay.
        keys: derives lanes.
        grants: the lanes the destination granted with ACCEPT.
        ingress: where further connections of this migration come from.
        first: the connection that began it.
    """

    def __init__(
        self,
        session: Session,
        link: ControlLink,
        peer: PeerInfo,
        report: SessionReport,
        *,
        where: Peer,
        keys: LaneKeys,
        grants: tuple[LaneGrant, ...],
        ingress: Ingress,
        first: Connection,
    ) -> None:
        super().__init__(session, link, peer, report)
        self._where, self._keys, self._grants = where, keys, list(grants)
        self._ingress, self._first = ingress, first
        self._seen_lanes: set[int] = set()
        self.set_rate(where.rate_limit)
        self._granted: asyncio.Queue[LaneGrant] = asyncio.Queue(1)
        self._opened: dict[ChannelId, asyncio.Future[int]] = {}
        self._finished = False

    async def abandon(self) -> None:
        """See ``Runner.abandon``; the first connection may not be a channel yet."""
        if not self.channels:
            await self._first.abort()
        await super().abandon()

    async def _conduct(self) -> None:
        self.start_control()
        for grant in self._grants:
            self.add_lane(await self._open_lane(grant))
        self.serve(self.acknowledge(), "acknowledge")
        await self._add(self._first)
        accepting = self.serve(self._accept(), "accept") if not self._ingress.single else None
        await self._all_ended()
        if accepting is not None:
            # What connects from here on is the next migration.
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
        await self.settle_channels()
        await self.say(Finish())
        if not await self.until(lambda: self._finished, HANDOVER_SECONDS_MAX + CONTROL_SECONDS_MAX):
            raise PeerLost("the destination never said that its end is final")

    async def _all_ended(self) -> None:
        """Wait until every channel has ended both ways.

        Raises:
            HypervisorFailed: all of ours have, and the other side then neither said anything nor ended.
        """
        heard = -1
        while not await self.until(lambda: self.session.finished, HANDOVER_SECONDS_MAX):
            moved = sum(half.offset for half in self.session.receivers.values())
            if moved == heard and all(half.finished for half in self.session.senders.values()):
                raise HypervisorFailed(f"the destination's hypervisor did not end within {HANDOVER_SECONDS_MAX:.0f} s")
            heard = moved

    async def _hear(self, message: Message) -> None:
        match message:
            case ChannelOpened(channel, credit):
                waiting = self._opened.get(ChannelId(channel))
                if waiting is None or waiting.done():
                    raise ProtocolViolation(f"channel {channel} opened without being announced")
                waiting.set_result(credit)
            case LaneGranted(grant) if not self._granted.full():
                self._granted.put_nowait(grant)
            case Finished():
                self._finished = True
                self.conclude()
                self._progress.wake()
            case _:
                raise ProtocolViolation(f"{type(message).__name__} has no place here")

    async def _accept(self) -> None:
        """Further connections of the same migration."""
        while True:
            connection = await self._ingress.accept()
            if len(self.session.receivers) >= CHANNELS_MAX:
                await connection.abort()
                raise HypervisorFailed(f"{self._ingress.label}: more than {CHANNELS_MAX} connections in one migration")
            await self._add(connection)

    async def _add(self, connection: Connection) -> None:
        """Announce a channel, wait until the destination's end is open, begin to read."""
        channel = Channel(self.session.next_channel, connection, self)
        credit = self.session.reserve(channel.number)
        opened = self._opened[channel.number] = asyncio.get_running_loop().create_future()
        self.start_delivery(channel)
        await self.say(ChannelOpen(channel.number, credit))
        try:
            async with asyncio.timeout(CHANNEL_OPEN_SECONDS_MAX):
                self.session.open(channel.number, await opened)
        except TimeoutError:
            raise PeerLost(f"channel {channel.number}: no answer from the destination") from None
        self.start_pump(channel)

    async def _open_lane(self, grant: LaneGrant) -> Lane:
        """Open a lane; a hello that fails is made anew under a fresh lane id.

        Raises:
            PeerLost: no attempt succeeded.
        """
        for attempt in range(1, LANE_ATTEMPTS_MAX + 1):
            if grant.lane in self._seen_lanes:
                raise ProtocolViolation(f"lane id {grant.lane} was given out twice")
            self._seen_lanes.add(grant.lane)
            try:
                async with asyncio.timeout(LANE_HELLO_SECONDS_MAX):
                    return await self._say_hello(grant)
            except (OSError, TimeoutError, PeerLost, IntegrityError) as error:
                self.log.warning("a lane's hello failed", lane=grant.lane, attempt=attempt, reason=explain(error))
            await self.say(LaneRequest())
            try:
                async with asyncio.timeout(CONTROL_SECONDS_MAX):
                    grant = await self._granted.get()
            except TimeoutError:
                raise PeerLost("the destination grants no lane") from None
        raise PeerLost(f"no lane could be opened in {LANE_ATTEMPTS_MAX} attempts")

    async def _say_hello(self, grant: LaneGrant) -> Lane:
        sealer, opener = self._keys.halves(LaneId(grant.lane))
        sock = await dial_tcp(self._where.host, self._where.port)
        lane = Lane(sock, LaneId(grant.lane), sealer, opener, self.pool)
        try:
            await lane.send_raw(LANE_MAGIC + grant.token)
            await lane.send(RecordType.HELLO)
            answer = await lane.receive()
            if answer.header.type is not RecordType.LANE_OK:
                raise PeerLost(f"lane {lane.id}: {answer.header.type.name} instead of LANE_OK")
            answer.release()
        except BaseException:
            lane.drop()
            raise
        return lane


class Source:
    """Makes sessions of the local hypervisor's connections.

    Args:
        tls: identity and rules for the peer; role CLIENT.
        where: the destination's relay.
        ingress: opened already.
        begun: told of each session as it opens.
    """

    def __init__(
        self, tls: TlsConfig, where: Peer, ingress: Ingress, begun: Callable[[SourceRunner], None] | None = None
    ) -> None:
        self._tls, self._where, self._ingress, self._begun = tls, where, ingress, begun
        self.current: SourceRunner | None = None

    def reconfigure(self, tls: TlsConfig, where: Peer) -> None:
        """Another identity, other rules or another address from the next contact on; an open session goes on."""
        self._tls, self._where = tls, where

    async def session(self, first: Connection, report: SessionReport) -> None:
        """One whole session, begun by the hypervisor's connection ``first``.

        Raises:
            RelayError, CryptoError: what ended it; the hypervisor has been told.
        """
        try:
            runner = await self._greet(first, report)
        except BaseException:
            await first.abort()
            raise
        self.current = runner
        if self._begun is not None:
            self._begun(runner)
        try:
            await runner.run()
        finally:
            self.current = None

    def new_report(self) -> SessionReport:
        """A report with a fresh session id."""
        session_id = self._where.random(SESSION_ID_BYTES).hex()
        report = SessionReport(role=Role.SOURCE.value, session_id=session_id, started=datetime.now(UTC))
        report.peer_address = self._where.address
        return report

    async def _greet(self, first: Connection, report: SessionReport) -> SourceRunner:
        """TCP, TLS, OFFER and its answer."""
        where = self._where
        began = asyncio.get_running_loop().time()
        try:
            sock = await dial_tcp(where.host, where.port)
        except (OSError, TimeoutError) as error:
            raise PeerUnreachable(f"cannot reach the peer at {where.address}: {explain(error)}") from None
        link = ControlLink(sock, TlsPeer(self._tls))
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
                peer = await link.handshake()
                session = Session(Role.SOURCE, SessionId(bytes.fromhex(report.session_id)))
                report.peer, report.group = peer.name, peer.group
                answer = await self._offer(link, session)
        except TimeoutError:
            link.drop()
            raise PeerRefused(f"the peer at {where.address} did not answer in {HANDSHAKE_SECONDS_MAX:.0f} s") from None
        except (AuthenticationError, PeerRefused, PolicyRefused):
            await link.close()
            raise
        except ProtocolViolation as error:
            link.drop()
            raise PeerRefused(f"the peer at {where.address} does not speak this protocol: {error}") from None
        except BaseException:
            link.drop()
            raise
        suite = Suite(answer.suite)
        report.cipher = suite.label
        report.handshake_seconds = asyncio.get_running_loop().time() - began
        keys = LaneKeys(
            link.tls.export(session.id),
            session,
            suite,
            source_leaf=self._tls.leaf_sha256,
            destination_leaf=peer.leaf_sha256,
        )
        return SourceRunner(
            session,
            link,
            peer,
            report,
            where=where,
            keys=keys,
            grants=answer.lanes,
            ingress=self._ingress,
            first=first,
        )

    async def _offer(self, link: ControlLink, session: Session) -> Accept:
        where = self._where
        offer = Offer(
            version=PROTOCOL_VERSION,
            session=session.id,
            suites=tuple(int(suite) for suite in where.suites),
            codecs=(int(Codec.OPAQUE),),
            egress=where.egress,
            lanes=where.lanes,
            resume_seconds=where.resume_seconds,
            xl_flags=where.xl_flags,
        )
        await link.send(offer)
        try:
            answer = await link.receive()
        except PeerAborted as abort:
            raise (PolicyRefused if abort.code == EXIT_POLICY else PeerRefused)(str(abort)) from None
        session.received(answer)
        match answer:
            case Refuse(code, reason):
                kind = PolicyRefused if code == EXIT_POLICY else PeerRefused
                raise kind(f"the peer refused: {printable(reason)}")
            case Accept(suite, codec) if suite in where.suites and codec == Codec.OPAQUE:
                link.mark_open()
                return answer
        raise ProtocolViolation("ACCEPT names a suite or codec that was not offered")

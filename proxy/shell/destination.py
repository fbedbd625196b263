"""The destination's end: one port for control and lanes, sessions handed to the local hypervisor."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import structlog

from crypto.errors import AuthenticationError, CryptoError, PeerNameMismatch, ReceiptError
from crypto.keys import Direction, ResumeSecret, SessionId, Suite, segment_alias, segment_name
from crypto.tls import PeerInfo, TlsConfig, TlsPeer
from proxy.authority import Point, Question
from proxy.control import (
    PROTOCOL_VERSION,
    Evidence,
    LogHead,
    Message,
    Offer,
    Recover,
    Refuse,
    Resume,
    Resumed,
    StoredSegment,
    Survey,
)
from proxy.endpoints.base import Egress
from proxy.endpoints.sockets import tune
from proxy.errors import (
    ConfigurationError,
    JournalError,
    PeerLost,
    PeerRefused,
    PolicyRefused,
    RelayError,
    StreamCorrupt,
)
from proxy.limits import HANDSHAKE_SECONDS_MAX
from proxy.paging import PagingTerms, Stored
from proxy.report import SessionReport
from proxy.session import Role, Session
from proxy.shell import attesting
from proxy.shell.arrival import DestinationRunner, agreed_cache_bytes
from proxy.shell.greeting import HalfOpen, read_first, read_prefix
from proxy.shell.lane import LaneKeys
from proxy.shell.link import ControlLink
from proxy.shell.linked import Meeting
from proxy.shell.oversight import Oversight
from proxy.shell.posting import guard_arrival
from proxy.shell.stored import aliased, open_stored
from proxy.shell.surveying import Preflight, told
from proxy.shell.terms import Terms
from proxy.shell.verdicts import Verdict, Verdicts, as_refusal, refusal_code, verdict_on
from proxy.shell.visits import Visits
from proxy.wire import (
    LANE_FIRST_BYTE,
    LANE_MAGIC,
    RESUME_MAGIC,
    TLS_FIRST_BYTE,
    Codec,
)
from proxy.witness import Witness

__all__ = ["Destination", "DestinationRunner", "Terms"]

log = structlog.get_logger("korora.destination")

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
        self._sessions: dict[SessionId, DestinationRunner] = {}
        self._reserved: dict[SessionId, str] = {}
        """Sessions that may be let in and are being prepared, and the egress of each."""
        self._ended = Verdicts()
        self._visits = Visits()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepting = True
        """Whether new sessions are let in; lanes of open ones always are."""

    @property
    def sessions(self) -> int:
        """Sessions that are open, and those that are being told that they are, or are about to be."""
        return len(self._sessions) + len(self._reserved)

    @property
    def untold(self) -> int:
        """Sessions that are over and whose source may not know how they ended; see ``told``."""
        return len(self._ended)

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
        first = await read_first(sock)
        if first and first[0] == LANE_FIRST_BYTE:
            await self._lane(sock, first, address)
        elif first and first[0] == TLS_FIRST_BYTE:
            await self._control(sock, first, address)
        else:
            sock.close()

    async def _lane(self, sock: socket.socket, first: bytes, address: str) -> None:
        """A lane hello, whose token names the session; or a source that comes back, whose TLS will."""
        prefix = await read_prefix(sock, first)
        if prefix.startswith(LANE_MAGIC):
            for runner in self._sessions.values():
                lane = runner.redeem(prefix[len(LANE_MAGIC) :])
                if lane is not None:
                    await runner.join(sock, lane)
                    return
        if prefix.startswith(RESUME_MAGIC):
            await self._control(sock, b"", address, returning=True)
            return
        sock.close()

    async def _control(self, sock: socket.socket, first: bytes, address: str, *, returning: bool = False) -> None:
        """TLS, OFFER and its answer, then the session; or RESUME and its answer, and the session goes on."""
        link = ControlLink(sock, TlsPeer(self._tls), received=first)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
                peer = await link.handshake()
                message = await link.receive()
                attested = ""
                if not isinstance(message, Recover):
                    message, attested = await attesting.answer(
                        link,
                        peer,
                        message,
                        self._terms.platform,
                        None if self._terms.handovers is None else self._terms.handovers.recipient,
                    )
                visits = isinstance(message, Recover) or (isinstance(message, Survey) and not returning)
                if returning and not visits:
                    await self._take_back(link, peer, message, address, attested)
                    return
                runner = None if visits else await self._answer(link, peer, message, address, attested)
        except (CryptoError, RelayError, TimeoutError) as error:
            failure = as_refusal(error)
            log.warning("a peer was not let in", address=address, reason=getattr(failure, "told", "") or str(failure))
            if not returning:
                self._failed(failure)
            await link.close()
            return
        except BaseException:
            link.drop()
            raise
        self._half_open.done(asyncio.current_task())
        if runner is not None:
            await self._carry(runner, began)
        elif isinstance(message, Recover | Survey):
            await self._visits.receive(link, peer, message, self._terms, self._egresses.keys())

    async def _carry(self, runner: DestinationRunner, began: float) -> None:
        """An accepted session, to its end."""
        loop = asyncio.get_running_loop()
        runner.report.handshake_seconds = loop.time() - began
        try:
            await self._begin(runner)
        finally:
            self._remember(runner)

    def _remember(self, runner: DestinationRunner) -> None:
        """A session is over: where its source may not know how it ended, keep the verdict for it."""
        self._sessions.pop(runner.session.id, None)
        if runner.session.resume_seconds and not runner.heard:
            self._ended.keep(runner)

    async def told(self) -> None:
        """Wait until every source knows how its session ended, or has had its time to ask."""
        await self._ended.told()

    async def _take_back(
        self, link: ControlLink, peer: PeerInfo, message: Message, address: str, attested: str
    ) -> None:
        """Answer a RESUME: the session goes on, or its verdict, or why not.

        Raises:
            RelayError, AuthenticationError: it was refused; the peer has been told.
        """
        try:
            if not isinstance(message, Resume) or message.version != PROTOCOL_VERSION:
                raise PeerRefused(f"{type(message).__name__} instead of a resumption")
            session = SessionId(message.session)
            known = self._sessions.get(session) or self._ended.get(session)
            if known is None or (isinstance(known, DestinationRunner) and not known.session.resume_seconds):
                raise PeerLost("there is no such session any more")
            exporter = link.tls.export(session)
            if peer.name != known.peer.name:
                raise PeerNameMismatch(f"{peer.name!r} would resume a session of another host")
            known.secret.verify(message.proof, Direction.FORWARD, exporter)
            if isinstance(known, DestinationRunner) and known.decided:
                known = verdict_on(known)
            if isinstance(known, Verdict):
                known.check()
                answer = Resumed(known.secret.proof(Direction.BACKWARD, exporter), 0, (), (), "closed")
            else:
                known.oversight.question = replace(known.oversight.question, attested=attested)
                await self._judge_again(peer, known)
                answer = known.resume(message, exporter)
        except (RelayError, AuthenticationError) as refusal:
            await link.send(Refuse(refusal_code(refusal), told(refusal)))
            raise
        link.mark_open()
        if isinstance(known, Verdict):
            await link.send(answer)
            if await link.close():
                self._ended.forget(session)
                if (runner := self._sessions.get(session)) is not None:
                    runner.heard = True
            return
        log.info("a session goes on", session=session.hex()[:8], address=address)
        known.report.peer_address = address
        # Before the answer leaves: while it waits for the socket, another may come and must find this one to replace.
        # Nothing can be said before it even so, for sending queues it before anybody else has a turn.
        known.attach(Meeting(link, peer, self._keys(link, known.session, known.suite, peer)))
        await link.send(answer)

    async def _judge_again(self, peer: PeerInfo, runner: DestinationRunner) -> None:
        """A session that comes back is judged by the rules of today.

        Raises:
            PolicyRefused: it would not be let in any more; the session is over.
        """
        try:
            if runner.offer.egress not in self._egresses:
                raise PolicyRefused(f"there is no egress {runner.offer.egress!r} here any more")
            self._terms.admit(peer, runner.offer)
            await runner.oversight.ask(Point.RESUME)
        except PolicyRefused as refusal:
            runner.fail(refusal)
            raise

    def _keys(self, link: ControlLink, session: Session, suite: Suite, peer: PeerInfo) -> LaneKeys:
        return LaneKeys(
            link.tls.export(session.id),
            session,
            suite,
            source_leaf=peer.leaf_sha256,
            destination_leaf=link.tls.own_leaf_sha256,
        )

    async def _answer(
        self, link: ControlLink, peer: PeerInfo, offer: Message, address: str, attested: str
    ) -> DestinationRunner:
        """ACCEPT an offer, or say why not.

        Raises:
            PolicyRefused, PeerRefused: it was refused; the peer has been told.
        """
        try:
            if not isinstance(offer, Offer):
                raise PeerRefused(f"{type(offer).__name__} instead of an offer")
            suite = self._judge(peer, offer)
        except (PolicyRefused, PeerRefused) as refusal:
            await link.send(Refuse(refusal_code(refusal), told(refusal)))
            raise
        terms, session = self._terms, SessionId(offer.session)
        self._reserved[session] = offer.egress
        try:
            runner = await self._prepare((link, peer, address), offer, suite, attested)
            self._sessions[session] = runner
        except (PolicyRefused, PeerRefused, ReceiptError, StreamCorrupt) as refusal:
            await link.send(Refuse(refusal_code(refusal), told(refusal)))
            raise
        finally:
            del self._reserved[session]
        try:
            link.mark_open()
            await runner.say(runner.acceptance())
        except BaseException as error:
            self._sessions.pop(session, None)
            runner.discard()
            await self._never_was(terms, runner.report, error)
            raise
        return runner

    async def _prepare(
        self, contact: tuple[ControlLink, PeerInfo, str], offer: Offer, suite: Suite, attested: str
    ) -> DestinationRunner:
        """A session that was let in, if those who have a say here allow it.

        Raises:
            PolicyRefused: they do not, or it cannot be guarded as it has to be.
        """
        link, peer, address = contact
        session = Session(Role.DESTINATION, SessionId(offer.session))
        session.received(offer)
        report = SessionReport(role=Role.DESTINATION.value, session_id=offer.session.hex(), started=datetime.now(UTC))
        report.peer, report.peer_address = peer.name, address
        report.group, report.cipher, report.attested = peer.group, suite.label, attested or None
        terms, egress = self._terms, self._egresses[offer.egress]  # by other rules the next one is judged
        question = Question(
            point=Point.OFFER,
            role=Role.DESTINATION,
            session=report.session_id,
            peer=peer.name,
            pin=peer.spki_sha256.hex(),
            egress=offer.egress,
            tenant=offer.tenant,
            guarded=terms.guards(offer.egress, egress.handover, offer.handover),
            attested=attested,
            own=link.tls.own_leaf_sha256.hex(),
        )
        oversight = Oversight(terms.authority, question, report)
        witness = None if terms.notary is None else terms.notary.begin(question, report)
        runner: DestinationRunner | None = None
        preflight = Preflight(terms.surveyor, report, departing=False)
        try:
            host = await preflight.facts()
            preflight.judge(host, offer.host)
            await oversight.ask(Point.OFFER)
            signed = await self._sign(witness, offer)
            meeting = Meeting(link, peer, self._keys(link, session, suite, peer))
            runner = await self._runner(meeting, session, report, offer=offer, suite=suite, terms=terms, egress=egress)
            runner.testify(oversight, witness)
            runner.evidence, runner.head, runner.host = *signed, host
            monitor = terms.monitors.get(offer.egress, "")
            required = offer.egress in terms.guarded
            await guard_arrival(runner, terms.handovers, egress, monitor, required=required)
        except BaseException as error:
            if runner is not None:
                runner.discard()
            else:
                oversight.end()
            await self._never_was(terms, report, error)
            if isinstance(error, JournalError):
                raise PolicyRefused(f"no journal can be kept there: {error}") from None
            raise
        return runner

    async def _sign(self, witness: Witness | None, offer: Offer) -> tuple[Evidence | None, LogHead | None]:
        """The source's offer, with our signature, and the head of our log; nothing where nobody signs.

        Raises:
            PolicyRefused: the source signs nothing.
            CryptoError, RelayError: what it has signed is not what it offers.
        """
        if witness is None:
            return None, None
        if offer.evidence is None:
            raise PolicyRefused("the source signs no receipts, and here that is wanted: update its relay")
        return await asyncio.to_thread(witness.accept, offer.evidence)

    async def _never_was(self, terms: Terms, report: SessionReport, error: BaseException) -> None:
        """A session was refused: that, too, leaves a receipt."""
        if terms.notary is not None:
            await asyncio.to_thread(terms.notary.refused, report, str(error) or type(error).__name__)

    async def _runner(
        self,
        meeting: Meeting,
        session: Session,
        report: SessionReport,
        *,
        offer: Offer,
        suite: Suite,
        terms: Terms,
        egress: Egress,
    ) -> DestinationRunner:
        """The session itself, with its part of the content store."""
        exporter = meeting.link.tls.export(session.id)
        paging, segments, stored = await self._paging(offer, exporter)
        return DestinationRunner(
            session,
            report,
            meeting,
            min(offer.resume_seconds, terms.resume_seconds),
            offer=offer,
            suite=suite,
            secret=ResumeSecret(exporter, session.id),
            egress=egress,
            lanes=max(offer.lanes, terms.lanes),
            random=terms.random,
            paging=paging,
            segments=segments,
            stored=stored,
        )

    async def _paging(
        self, offer: Offer, exporter: bytes
    ) -> tuple[PagingTerms, tuple[StoredSegment, ...], Stored | None]:
        """What is done about the session's pages: the stored ones are used if source and egress name one tenant."""
        tenant = self._terms.tenants.get(offer.egress, self._terms.paging.tenant)
        paging = replace(self._terms.paging, tenant=tenant if tenant == offer.tenant else "")
        if not agreed_cache_bytes(paging, offer) or not paging.tenant or paging.store is None:
            return paging, (), None
        alias = partial(segment_alias, direction=Direction.FORWARD, exporter=exporter)
        segments = await asyncio.to_thread(paging.store.held, tenant, offer.segments, alias)
        name = segment_name(exporter, SessionId(offer.session))
        stored = await open_stored(paging, name, segments, agreed_cache_bytes(paging, offer))
        if stored is None:
            return paging, (), None
        return paging, aliased(segments, Direction.BACKWARD, exporter), stored

    def _judge(self, peer: PeerInfo, offer: Offer) -> Suite:
        """The suite to use, if the offer can be accepted."""
        if offer.version != PROTOCOL_VERSION:
            raise PeerRefused(f"protocol version {offer.version}, this relay speaks {PROTOCOL_VERSION}")
        suite = next((mine for mine in self._terms.suites if mine in offer.suites), None)
        if suite is None or Codec.OPAQUE not in offer.codecs:
            raise PeerRefused("no common suite or codec")
        if offer.egress not in self._egresses:
            raise PolicyRefused(f"there is no egress {offer.egress!r} here")
        if not self.accepting or self.sessions >= self._terms.sessions_max:
            raise PolicyRefused("no further session is taken now")
        if any(SessionId(offer.session) in known for known in (self._sessions, self._reserved, self._ended)):
            raise PolicyRefused("that session id is in use")
        egress = self._egresses[offer.egress]
        used = {runner.offer.egress for runner in self._sessions.values()} | set(self._reserved.values())
        if egress.exclusive and offer.egress in used:
            raise PolicyRefused(f"{egress.label} serves one session at a time")
        self._terms.admit(peer, offer)
        return suite

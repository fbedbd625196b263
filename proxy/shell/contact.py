"""The source reaches its peer: TCP, TLS, and OFFER or RESUME with its answer."""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from chunking.pages import PAGE_BYTES
from crypto.errors import AttestationError, AuthenticationError, PeerNameMismatch, ReceiptError
from crypto.keys import SESSION_ID_BYTES, Direction, ResumeSecret, SessionId, Suite
from crypto.tls import PeerInfo, TlsConfig, TlsPeer
from proxy.attestation import Platform, Proved
from proxy.control import (
    PROTOCOL_VERSION,
    Accept,
    Evidence,
    Message,
    Offer,
    Refuse,
    Resume,
    Resumed,
    StoredSegment,
    Surveyed,
    printable,
)
from proxy.endpoints.sockets import dial_tcp, explain
from proxy.errors import (
    EXIT_AUTHENTICATION,
    EXIT_POLICY,
    PeerAborted,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    PolicyRefused,
    PreflightFailed,
    ProtocolViolation,
    exit_code_of,
)
from proxy.limits import HANDSHAKE_SECONDS_MAX, RESUME_ATTEMPT_SECONDS_MAX, SURVEY_SECONDS_MAX
from proxy.paging import PagingTerms
from proxy.preflight import HostFacts, Surveyor
from proxy.session import Session
from proxy.shell.attesting import begin
from proxy.shell.lane import LaneKeys
from proxy.shell.link import ControlLink
from proxy.shell.linked import Meeting
from proxy.shell.stored import aliased
from proxy.shell.surveying import ask, told
from proxy.wire import RESUME_MAGIC, Codec

RandomBytes = Callable[[int], bytes]
Surveys = tuple[HostFacts, Surveyed, float]


@dataclass(frozen=True, slots=True)
class Peer:
    """Where the destination's relay listens, and what is asked of it."""

    host: str
    port: int
    lanes: int = 1
    resume_seconds: int = 30
    egress: str = "default"
    xl_flags: str = ""
    one_channel: bool = False
    """Whether what connects while a session is open is another migration, as with xl, and has to wait."""
    rate_limit: float | None = None
    handover: Literal["", "xl", "qmp"] = ""
    """The kind of hypervisor whose hand-over can be guarded here."""
    vtpm: bool = False
    """Whether vTPMs are moved here."""
    platform: Platform | None = field(default=None, repr=False)
    """Of this host, and what it demands of others'; None: nothing is shown and nothing demanded."""
    surveyor: Surveyor | None = field(default=None, repr=False)
    """Of this host; None: nothing is said of it, and the destination is not judged."""
    guarded: bool = False
    """Whether no session is opened whose hand-over is not guarded."""
    paging: PagingTerms = field(default_factory=PagingTerms)
    suites: tuple[Suite, ...] = (Suite.AES_256_GCM, Suite.CHACHA20_POLY1305)
    random: RandomBytes = field(default=os.urandom, repr=False)

    @property
    def address(self) -> str:
        """HOST:PORT for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Introduction(Protocol):
    """What the two sides show one another beside their certificates."""

    async def admit(self, peer: PeerInfo, proved: Proved, own_leaf: bytes) -> Evidence | None:
        """The peer has authenticated, and nothing was offered to it yet: what is shown to it.

        Args:
            peer: who it is.
            proved: what it has proved of its platform.
            own_leaf: SHA-256 of the certificate that it was shown.

        Raises:
            PolicyRefused: nothing is to be offered to it.
        """

    async def host(self) -> HostFacts | None:
        """What this host says of itself; None for nothing."""

    async def accepted(self, answer: Accept) -> None:
        """It has accepted.

        Raises:
            PeerRefused, PreflightFailed, CryptoError: what it shows is not enough.
        """


@dataclass(frozen=True, slots=True)
class Contact:
    """How a source reaches its peer: identity and rules, and where. A reload makes a new one."""

    tls: TlsConfig
    where: Peer

    async def greet(self, session: Session, introduction: Introduction) -> tuple[Meeting, Accept]:
        """Open a session.

        Args:
            session: it says its id.
            introduction: hears who the peer is and what it answers, and may object.

        Raises:
            PeerUnreachable: there is no TCP connection.
            AuthenticationError, PeerRefused, PolicyRefused: the peer is not let in, or does not let us in.
        """
        where = self.where
        link = await self._dial()
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
                peer = await link.handshake()
                proved = await begin(link, session.id, peer, where.platform)
                evidence = await introduction.admit(peer, proved, link.tls.own_leaf_sha256)
                answer = await self._offer(link, session, evidence, await introduction.host())
                await introduction.accepted(answer)
                link.mark_open()
        except TimeoutError:
            link.drop()
            raise PeerRefused(f"the peer at {where.address} did not answer in {HANDSHAKE_SECONDS_MAX:.0f} s") from None
        except (AuthenticationError, ReceiptError, PeerRefused, PolicyRefused) as error:
            await _part(link, error)
            raise
        except ProtocolViolation as error:
            link.drop()
            raise PeerRefused(f"the peer at {where.address} does not speak this protocol: {error}") from None
        except BaseException:
            link.drop()
            raise
        return Meeting(link, peer, self._keys(link, peer, session, Suite(answer.suite))), answer

    async def come_back(
        self, session: Session, name: str, suite: Suite, secret: ResumeSecret, route: bytes
    ) -> tuple[Meeting, Resumed]:
        """Go on with a session over a new control connection.

        Args:
            session: it says what has arrived here.
            name: the peer's, as the session began; another host cannot take it over.
            suite: the AEAD agreed on.
            secret: by which both sides know the session again.
            route: of ACCEPT; it leads to the process that has the session.

        Raises:
            PeerUnreachable, PeerVanished: it did not come about; try again.
            AuthenticationError, PeerRefused, PolicyRefused, PeerAborted, ProtocolViolation: it will not.
        """
        link = await self._dial(RESUME_MAGIC + route)
        try:
            async with asyncio.timeout(RESUME_ATTEMPT_SECONDS_MAX):
                peer = await link.handshake()
                if peer.name != name:
                    raise PeerNameMismatch(f"the session is {name!r}'s, and {peer.name!r} answers")
                await begin(link, session.id, peer, self.where.platform)
                exporter = link.tls.export(session.id)
                proof = secret.proof(Direction.FORWARD, exporter)
                await link.send(
                    Resume(PROTOCOL_VERSION, session.id, proof, session.inbox.expected, session.channel_states())
                )
                answer = self._resumed(await link.receive())
                secret.verify(answer.proof, Direction.BACKWARD, exporter)
        except TimeoutError:
            link.drop()
            raise PeerVanished(f"no answer in {RESUME_ATTEMPT_SECONDS_MAX:.0f} s") from None
        except AttestationError as error:
            await _part(link, error)
            raise
        except BaseException:
            link.drop()
            raise
        link.mark_open()
        return Meeting(link, peer, self._keys(link, peer, session, suite)), answer

    async def meet(self, name: str, route: bytes = b"") -> ControlLink:
        """A control connection to the peer called ``name``, authenticated; nothing has been said yet.

        Args:
            name: the peer's.
            route: see ``come_back``; empty for whichever of its processes takes it.

        Raises:
            PeerUnreachable, PeerVanished: it did not come about; try again.
            AuthenticationError, PeerRefused: the peer is not who it was, or does not let us in.
        """
        link = await self._dial(RESUME_MAGIC + route if route else b"")
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX):
                peer = await link.handshake()
            if peer.name != name:
                raise PeerNameMismatch(f"the hand-over is {name!r}'s, and {peer.name!r} answers")
        except TimeoutError:
            link.drop()
            raise PeerVanished(f"no handshake in {HANDSHAKE_SECONDS_MAX:.0f} s") from None
        except BaseException:
            link.drop()
            raise
        return link

    async def _dial(self, preface: bytes = b"") -> ControlLink:
        where = self.where
        try:
            sock = await dial_tcp(where.host, where.port)
        except (OSError, TimeoutError) as error:
            raise PeerUnreachable(f"cannot reach the peer at {where.address}: {explain(error)}") from None
        return ControlLink(sock, TlsPeer(self.tls), preface=preface)

    def _keys(self, link: ControlLink, peer: PeerInfo, session: Session, suite: Suite) -> LaneKeys:
        return LaneKeys(
            link.tls.export(session.id),
            session,
            suite,
            source_leaf=link.tls.own_leaf_sha256,
            destination_leaf=peer.leaf_sha256,
        )

    async def survey(self, surveyor: Surveyor, need_bytes: int, came: Callable[[str, str], None]) -> Surveys:
        """Ask the destination whether a machine could go there; nothing goes.

        Args:
            surveyor: of this process.
            need_bytes: the machine's memory; -1 where that is not known.
            came: told of each step that has gone well (``connection``, ``authentication``, ``attestation``), with what
                came of it: the address, the peer's name, what it has proved.

        Returns:
            See ``surveying.ask``.

        Raises:
            PeerUnreachable: there is no TCP connection.
            AuthenticationError, TpmError, PeerRefused, PolicyRefused: the peer is not let in, or does not let us in.
        """
        where = self.where
        link = await self._dial()
        came("connection", where.address)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS_MAX + SURVEY_SECONDS_MAX):
                peer = await link.handshake()
                came("authentication", peer.name)
                proved = await begin(link, SessionId(where.random(SESSION_ID_BYTES)), peer, where.platform)
                came("attestation", proved.attested)
                return await ask(link, surveyor, where.egress, need_bytes)
        except TimeoutError:
            raise PeerRefused(f"the peer at {where.address} did not answer in time") from None
        except AttestationError as error:
            await link.abort(exit_code_of(error), str(error))
            raise
        except ProtocolViolation as error:
            raise PeerRefused(f"the peer at {where.address} does not speak this protocol: {error}") from None
        finally:
            await link.close()

    async def _offer(
        self, link: ControlLink, session: Session, evidence: Evidence | None, host: HostFacts | None
    ) -> Accept:
        where, paging = self.where, self.where.paging
        codecs = (int(Codec.OPAQUE), int(Codec.PAGES)) if paging.wanted else (int(Codec.OPAQUE),)
        segments: tuple[StoredSegment, ...] = ()
        if paging.store is not None and paging.tenant and paging.wanted:
            segments = await asyncio.to_thread(paging.store.offered, paging.tenant)
        exporter = link.tls.export(session.id)
        offer = Offer(
            version=PROTOCOL_VERSION,
            session=session.id,
            suites=tuple(int(suite) for suite in where.suites),
            codecs=codecs,
            egress=where.egress,
            lanes=where.lanes,
            resume_seconds=where.resume_seconds,
            xl_flags=where.xl_flags,
            cache_bytes=paging.cache_bytes if paging.wanted else 0,
            chains=paging.chains_offered,
            tenant=paging.tenant,
            segments=aliased(segments, Direction.FORWARD, exporter),
            handover=where.handover,
            vtpm=where.vtpm,
            evidence=evidence,
            host=host,
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
            case Accept(suite, codec) if suite in where.suites and codec in codecs:
                if answer.cache_bytes > offer.cache_bytes or answer.chains > offer.chains:
                    raise ProtocolViolation("ACCEPT wants more memory than was offered")
                if codec == Codec.PAGES and answer.cache_bytes < PAGE_BYTES:
                    raise ProtocolViolation("ACCEPT wants pages, and no cache for them")
                if answer.handover not in ("", offer.handover):
                    raise ProtocolViolation("ACCEPT guards a hand-over that was not offered")
                agreed = _agreed(segments, answer.segments, exporter)
                return msgspec.structs.replace(answer, segments=agreed)
        raise ProtocolViolation("ACCEPT names a suite or codec that was not offered")

    def _resumed(self, answer: Message) -> Resumed:
        match answer:
            case Resumed():
                return answer
            case Refuse(code, reason) if code == EXIT_POLICY:
                raise PolicyRefused(f"the peer takes the session back no more: {printable(reason)}")
            case Refuse(code, reason) if code == EXIT_AUTHENTICATION:
                raise PeerRefused(f"the peer refused to go on: {printable(reason)}")
            case Refuse(code, reason):
                raise PeerAborted(code, printable(reason))
        raise ProtocolViolation(f"{type(answer).__name__} instead of an answer to RESUME")


async def _part(link: ControlLink, error: Exception) -> None:
    """End a connection before the session is open; a destination that has accepted, or attested, is told why."""
    if isinstance(error, ReceiptError | AttestationError | PreflightFailed):
        await link.abort(exit_code_of(error), told(error))
    await link.close()


def _agreed(
    own: Sequence[StoredSegment], answer: Sequence[StoredSegment], exporter: bytes
) -> tuple[StoredSegment, ...]:
    """The segments that ACCEPT names, under their own names.

    Raises:
        ProtocolViolation: one was not offered, or not by a peer that knows its name, or it is named twice.
    """
    offered = dict(zip((segment.name for segment in aliased(own, Direction.BACKWARD, exporter)), own, strict=True))
    agreed = []
    for segment in answer:
        mine = offered.pop(segment.name, None)
        if mine is None or segment.pages > mine.pages:
            raise ProtocolViolation("ACCEPT names stored pages that were not offered")
        agreed.append(StoredSegment(mine.name, segment.pages))
    return tuple(agreed)

"""An open session at the destination: its lanes let in, its channels opened, its source taken back after a loss."""

import asyncio
import hmac
import os
import socket
from collections.abc import Callable, Sequence

from chunking.decoder import Decoder
from chunking.pages import PAGE_BYTES
from crypto.errors import IntegrityError, LaneReused
from crypto.keys import LANE_ID_MAX, Direction, LaneId, ResumeSecret, Suite
from crypto.records import OVERHEAD_BYTES, RecordType
from proxy.control import (
    Accept,
    ChannelOpen,
    ChannelOpened,
    ChannelState,
    Evidence,
    Finish,
    Finished,
    LaneGrant,
    LaneGranted,
    LaneRequest,
    LogHead,
    Message,
    Offer,
    PagesGiven,
    PagesWanted,
    Resume,
    Resumed,
    Shown,
    Statement,
    StoredSegment,
    VtpmGiven,
)
from proxy.endpoints.base import Egress
from proxy.errors import HypervisorFailed, PeerLost, ProtocolViolation, RelayError
from proxy.guest import GuestView
from proxy.limits import (
    CHANNELS_MAX,
    CONTROL_SECONDS_MAX,
    FIRST_LANE_SECONDS_MAX,
    LANE_ATTEMPTS_MAX,
    LANE_HELLO_SECONDS_MAX,
    LANES_MAX,
)
from proxy.paging import Encode, PagingTerms, Stored
from proxy.preflight import HostFacts
from proxy.report import SessionReport
from proxy.session import Session, State
from proxy.shell.channel import Channel
from proxy.shell.decoding import DecodingLine
from proxy.shell.lane import Lane
from proxy.shell.link import ControlLink
from proxy.shell.linked import Meeting
from proxy.shell.runner import Runner
from proxy.wire import LANE_PREFIX_BYTES, LANE_TOKEN_BYTES, ChannelId, Codec

RandomBytes = Callable[[int], bytes]

HELLO_BYTES = OVERHEAD_BYTES


class DestinationRunner(Runner):
    """An open session at the destination.

    Args:
        session, report, meeting, resume_seconds: see ``Runner``.
        offer: what the source asked for.
        suite: the AEAD agreed on.
        secret: by which both sides know the session again after a loss.
        egress: the local hypervisor.
        lanes: how many the source is asked to open.
        random: source of lane tokens.
        paging: what this relay is ready to do about pages.
        segments: stored ones that both ends hold, as the peer is told of them.
        stored: its part of the content store.
    """

    def __init__(
        self,
        session: Session,
        report: SessionReport,
        meeting: Meeting,
        resume_seconds: int,
        *,
        offer: Offer,
        suite: Suite,
        secret: ResumeSecret,
        egress: Egress,
        lanes: int,
        random: RandomBytes = os.urandom,
        paging: PagingTerms | None = None,
        segments: tuple[StoredSegment, ...] = (),
        stored: Stored | None = None,
    ) -> None:
        super().__init__(session, report, meeting, resume_seconds, lanes)
        self._meeting = meeting
        self.offer, self.secret, self.suite = offer, secret, suite
        self._egress, self._random = egress, random
        self.evidence: Evidence | None = None
        """The source's offer, signed by both, where receipts are signed."""
        self.head: LogHead | None = None
        """Of our log, for the source to see."""
        self.host: HostFacts | None = None
        """What this host says of itself."""
        self._tokens: dict[bytes, LaneId] = {}
        self._next_lane = 0
        self._announced: asyncio.Queue[ChannelOpen] = asyncio.Queue(CHANNELS_MAX)
        self._announced_count = 0
        self._finish_asked = False
        self._finish_receipt = b""
        self._segments, self.stored = segments, stored
        self._agree_on_pages(paging or PagingTerms())

    def _agree_on_pages(self, paging: PagingTerms) -> None:
        """Pages are encoded if the source offers it and there is a cache for them here."""
        offer = self.offer
        self._cache_bytes = agreed_cache_bytes(paging, offer)
        self._chains = min(offer.chains, paging.chains)
        self.session.paged = bool(self._cache_bytes)
        self.report.encode = (Encode.PAGES if self.session.paged else Encode.OPAQUE).value
        if self.session.paged:
            self.guest = GuestView(None if self.stored is None else self.stored.name)
            self.decoding = DecodingLine(
                Decoder(
                    self._cache_bytes,
                    chains=self._chains,
                    stored=None if self.stored is None else self.stored.pages,
                ),
                self._chains,
                guest=self.guest,
                stored=self.stored,
                deliver=self.deliver,
                ask=self._ask,
                fail=self.fail,
            )

    def acceptance(self) -> Accept:
        """The answer to the source's offer."""
        return Accept(
            suite=int(self.suite),
            codec=int(Codec.PAGES if self.session.paged else Codec.OPAQUE),
            lanes=self.grants(),
            resume_seconds=self.session.resume_seconds,
            route=self._random(LANE_TOKEN_BYTES),
            cache_bytes=self._cache_bytes,
            chains=self._chains,
            segments=self._segments,
            handover="" if self.guard is None else self.guard.kind,
            evidence=self.evidence,
            head=self.head,
            vtpm=self.custody is not None and self.custody.agreed,
            host=self.host,
        )

    def _ask(self, order: int, ordinals: Sequence[int]) -> None:
        """See ``decoding.Asks``; of a peer that is away ``attach`` asks."""
        link = self.link
        if link is None:
            self.decoding_waits()
        else:
            self.serve(self._ask_on(link, PagesWanted(order, tuple(ordinals))), "ask for pages")

    async def _ask_on(self, link: ControlLink, question: PagesWanted) -> None:
        if link is self.link:  # or it was asked again by another, and would be answered twice
            await self.say(question)

    # ---- lanes

    def grants(self) -> tuple[LaneGrant, ...]:
        """Permission for as many lanes as the session is to have."""
        return tuple(self.grant() for _ in range(self.lanes_wanted))

    def grant(self) -> LaneGrant:
        """A lane id never given out before in this session, with a token for its hello.

        Raises:
            LaneReused: the ids have run out.
            ProtocolViolation: the peer asks for more lanes than it may.
        """
        if self._next_lane > LANE_ID_MAX:
            raise LaneReused("lane ids have run out")
        once = not self.session.resume_seconds and self._next_lane >= LANES_MAX + LANE_ATTEMPTS_MAX
        if once or len(self.bundle.lanes) >= LANES_MAX:
            raise ProtocolViolation("the peer asks for lane after lane")
        if len(self._tokens) >= LANES_MAX:
            del self._tokens[next(iter(self._tokens))]  # the source has given the oldest up
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
        keys = self.keys
        self.bundle.expect()
        lane = self.make_lane(sock, lane_id, keys)
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
        if keys is not self.keys or len(self.bundle.lanes) >= LANES_MAX:
            lane.drop()  # its keys are of a control connection that is gone
            return
        self.add_lane(lane)

    def forget(self, lane: Lane) -> bool:
        """See ``Runner.forget``: a source that did not get our LANE_OK whole gives that lane up and opens another."""
        if not lane.unused or (self.session.receivers and not self.bundle.lanes):
            return False
        self.log.warning("a lane was given up before its first use", lane=lane.id)
        return True

    # ---- the session's course

    async def _conduct(self) -> None:
        self.attach(self._meeting)
        if not await self.until(lambda: bool(self.bundle.lanes), FIRST_LANE_SECONDS_MAX):
            raise PeerLost("the source opened no lane")
        self.serve(self.bundle.acknowledge(), "acknowledge")
        self.serve(self.bundle.resend(), "resend")
        self.serve(self._open_channels(), "open channels")
        if self.guard is None:
            await self.until(lambda: self.session.finished or self._finish_asked)
            await self.testimony.agree()
        await self.until(lambda: self._finish_asked)
        # FINISH came by the control connection and may have overtaken the last acknowledgements on a lane.
        if not await self.until(lambda: self.session.finished, CONTROL_SECONDS_MAX):
            raise ProtocolViolation("FINISH before all channels have ended")
        if self.guard is not None and not self.moved:
            raise ProtocolViolation("FINISH before the hand-over is done")
        await self.settle_channels()
        receipt = await self._outcome()
        # Everything has been handed over for good: whether the source still hears so does not change that.
        self.conclude()
        await self.say(Finished(receipt))

    async def _hear(self, message: Message) -> None:
        match message:
            case ChannelOpen(channel) if channel == self._announced_count and not self._announced.full():
                self._announced_count += 1
                self._announced.put_nowait(message)
            case LaneRequest():
                await self.say(LaneGranted(self.grant()))
            case PagesGiven(order, ordinals, pages) if self.decoding is not None:
                if len(pages) != len(ordinals) * PAGE_BYTES:
                    raise ProtocolViolation(f"{len(ordinals)} stored pages in {len(pages)} bytes")
                starts = range(0, len(pages), PAGE_BYTES)
                given = {n: pages[at : at + PAGE_BYTES] for n, at in zip(ordinals, starts, strict=True)}
                if len(given) != len(ordinals):
                    raise ProtocolViolation("a stored page twice in one message")
                self.decoding.given(order, given)
            case Finish(receipt):
                self._finish_asked, self._finish_receipt = True, receipt
                self.progress.wake()
            case Shown() | Statement():
                self.testimony.hear(message)
            case VtpmGiven() if self.custody is not None:
                self.custody.hear(message)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} has no place here")

    async def _outcome(self) -> bytes:
        """The outcome that the source has signed, with our signature; nothing where nobody signs."""
        witness = self.testimony.witness
        if witness is None:
            return b""
        self._account()
        return await asyncio.to_thread(witness.concluded, self._finish_receipt)

    async def _open_channels(self) -> None:
        """Connect to the hypervisor when the source announces a channel: in order, never before, never as a probe."""
        while True:
            announced = await self._announced.get()
            if not self.bundle.lanes and not self.session.resume_seconds:
                raise PeerLost(f"channel {announced.channel}: the lane it was to use has gone")
            if self._egress.single and announced.channel > 0:
                raise HypervisorFailed(f"{self._egress.label} takes one channel, the source has opened another")
            await self.testimony.until_met()
            number = ChannelId(announced.channel)
            credit = self.session.reserve(number)
            guard = self.guard if number == 0 else None
            if guard is not None:
                await guard.begin()
            if number == 0:
                self.follow_naming()
            connection = await self._egress.connect(self.offer.xl_flags)
            if guard is not None:
                guard.connected(connection)
            channel = Channel(number, connection, self, guard, self.naming)
            self.session.open(number, announced.credit)
            self.start_delivery(channel)
            await self.say(ChannelOpened(number, credit))
            self.start_pump(channel)

    # ---- the source comes back

    def resume(self, message: Resume, exporter: bytes) -> Resumed:
        """A source that has shown who it is wants to go on: take what it says, and answer; ``attach`` follows.

        Args:
            message: its RESUME, the proof verified.
            exporter: of the new control connection.

        Raises:
            ProtocolViolation: it says what cannot be; the session is over.
        """
        if self.link is not None:
            self.detach(self.link, PeerLost("the source has come by another connection"))
        self._tokens.clear()
        try:
            covered = self.session.resumed(message.received, message.channels, self._loop.time())
        except ProtocolViolation as error:
            self.fail(error)
            raise
        self.acknowledged(covered)
        self.report.resumes += 1
        known = {state.channel: state for state in self.session.channel_states()}
        states = (known.get(number) for number in range(self._announced_count))
        return Resumed(
            proof=self.secret.proof(Direction.BACKWARD, exporter),
            received=self.session.inbox.expected,
            channels=tuple(state or ChannelState(n, 0, 0, opened=False) for n, state in enumerate(states)),
            lanes=self.grants(),
            phase="open" if self.session.state is State.OPEN else "finishing",
        )


def agreed_cache_bytes(paging: PagingTerms, offer: Offer) -> int:
    """The page cache that both ends can keep; 0 where one of them wants none."""
    size = min(offer.cache_bytes, paging.cache_bytes) if paging.wanted and Codec.PAGES in offer.codecs else 0
    return size if size >= PAGE_BYTES else 0

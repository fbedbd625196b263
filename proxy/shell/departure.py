"""An open session at the source: its channels announced, its lanes opened and replaced, its peer found again."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from chunking.adapt import Adapter, Pin
from chunking.encoder import Encoder
from crypto.errors import IntegrityError
from crypto.keys import LaneId, ResumeSecret, Suite
from crypto.records import RecordType
from proxy.channel import SendHalf
from proxy.control import (
    Accept,
    ChannelOpen,
    ChannelOpened,
    Countersigned,
    Facts,
    Finish,
    Finished,
    LaneGrant,
    LaneGranted,
    LaneRequest,
    Message,
    PagesGiven,
    PagesWanted,
    Resumed,
    VtpmProved,
    VtpmWanted,
)
from proxy.endpoints.base import Connection, Ingress
from proxy.endpoints.sockets import dial_tcp, explain
from proxy.errors import HypervisorFailed, PeerLost, PeerUnreachable, PeerVanished, ProtocolViolation
from proxy.guest import GuestView
from proxy.limits import (
    CHANNEL_OPEN_SECONDS_MAX,
    CHANNELS_MAX,
    CONTROL_SECONDS_MAX,
    FRAME_BYTES_MAX,
    HANDOVER_SECONDS_MAX,
    LANE_ATTEMPTS_MAX,
    LANE_HELLO_SECONDS_MAX,
    LANE_PAUSE_SECONDS_MAX,
    LANES_MAX,
    PAGES_GIVEN_MAX,
    PAGES_GIVEN_SECONDS_MAX,
    PAGES_QUESTIONS_MAX,
    RESUME_PAUSE_SECONDS_MAX,
    RESUME_PAUSE_SECONDS_MIN,
)
from proxy.paging import Encode, PagingTerms, Stored
from proxy.report import SessionReport
from proxy.session import Session, State
from proxy.shell.channel import Channel
from proxy.shell.contact import Contact
from proxy.shell.encoding import EncodingLine
from proxy.shell.framing import Framing, PagedFraming
from proxy.shell.lane import BufferPool, Lane, LaneKeys
from proxy.shell.link import ControlLink
from proxy.shell.linked import Meeting
from proxy.shell.runner import Runner
from proxy.streams.parser import StreamParser
from proxy.wire import FRAME_HEADER_BYTES, LANE_MAGIC, ChannelId, Codec


class SourceRunner(Runner):
    """An open session at the source.

    Args:
        session, report: see ``Runner``.
        meeting: the peer that let us in.
        accept: what it said.
        resume_seconds: see ``Runner``.
        contact: how the peer is reached now; asked anew for each attempt.
        ingress: where further connections of this migration come from.
        first: the connection that began it.
        stored: its part of the content store.
    """

    def __init__(
        self,
        session: Session,
        report: SessionReport,
        meeting: Meeting,
        accept: Accept,
        resume_seconds: int,
        *,
        contact: Callable[[], Contact],
        ingress: Ingress,
        first: Connection,
        stored: Stored | None = None,
    ) -> None:
        super().__init__(session, report, meeting, resume_seconds, len(accept.lanes))
        self.stored = stored
        self._meeting = meeting
        self._contact, self._ingress, self._first = contact, ingress, first
        self._suite, self._route = Suite(accept.suite), accept.route
        self._secret = ResumeSecret(meeting.link.tls.export(session.id), session.id)
        self._grants = list(accept.lanes)
        self._seen_lanes: set[int] = set()
        self._granted: asyncio.Queue[LaneGrant] = asyncio.Queue(1)
        self._opened: dict[ChannelId, asyncio.Future[int]] = {}
        self._finished = False
        self._finish = Finish()
        self.beside: Callable[[], Coroutine[Any, Any, None]] | None = None
        """What is to be done while the hypervisor migrates unguarded."""
        self._giving: list[asyncio.Task[None]] = []
        report.encode = Encode.OPAQUE.value
        self.set_rate(contact().where.rate_limit)
        if accept.codec == Codec.PAGES:
            self._agree_on_pages(contact().where.paging, accept)

    def _agree_on_pages(self, paging: PagingTerms, accept: Accept) -> None:
        self.session.paged = True
        self.report.encode = paging.encode.value
        self.guest = GuestView(None if self.stored is None else self.stored.name)
        self._large = BufferPool(FRAME_HEADER_BYTES + FRAME_BYTES_MAX)
        self.encoding = EncodingLine(
            self.session,
            Encoder(accept.cache_bytes, accept.chains, stored=None if self.stored is None else self.stored.pages),
            Adapter(workers=accept.chains, pin=Pin(paging.encode)),
            accept.chains,
            stored=self.stored,
            send=self.send_frame,
            fail=self.fail,
            wake=self._wake_pumps,
        )

    def framing(self, half: SendHalf) -> Framing:
        """See ``Carrier.framing``."""
        if self.encoding is None or self.guest is None:
            return super().framing(half)
        return PagedFraming(self, half, self.encoding, StreamParser(self.guest.vtpm), self._large, guest=self.guest)

    def set_lanes(self, count: int) -> None:
        """Have ``count`` lanes, 1 to ``LANES_MAX``, from now on: open more, or leave some.

        A session that cannot resume leaves none: what a lane still brings after it was left would not come again.
        """
        self.lanes_wanted = max(1, min(LANES_MAX, count))
        while self.session.resume_seconds and len(self.bundle.lanes) > self.lanes_wanted:
            lane = self.bundle.lanes[max(self.bundle.lanes)]
            self.bundle.remove(lane)
            self.serve(self.leave(lane), f"leave {lane.id}")
        self.changed.wake()

    async def abandon(self) -> None:
        """See ``Runner.abandon``; the first connection may not be a channel yet."""
        if not self.channels:
            await self._first.abort()
        await super().abandon()

    # ---- the session's course

    async def _conduct(self) -> None:
        self.attach(self._meeting)
        self.serve(self._keep_lanes(), "keep lanes")
        if self.session.resume_seconds:
            self.serve(self._come_back(), "come back")
        await self.until(lambda: bool(self.bundle.lanes))
        if self.encoding is not None:
            self.serve(self.encoding.run(), "encode")
        self.serve(self.bundle.acknowledge(), "acknowledge")
        self.serve(self.bundle.resend(), "resend")
        if self.guard is not None:
            await self.guard.begin()
        elif self.beside is not None:
            self.serve(self.beside(), "beside")
        self.follow_naming()
        await self._add(self._first)
        alone = self._ingress.single or self._contact().where.one_channel
        accepting = None if alone else self.serve(self._accept(), "accept")
        await self._all_ended()
        if accepting is not None:
            # What connects from here on is the next migration.
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
        self.complete = True
        self.progress.wake()
        if self.guard is not None:
            await self.guard.until_decided()
        else:
            await self.testimony.agree()
        await self.settle_channels()
        self._finish = await self._outcome()
        await self.say(self._finish)
        if not await self.until(lambda: self._finished, HANDOVER_SECONDS_MAX + CONTROL_SECONDS_MAX):
            raise PeerLost("the destination never said that its end is final")

    async def _outcome(self) -> Finish:
        """All is done: so it is said, and signed where that is wanted."""
        witness = self.testimony.witness
        if witness is None:
            return Finish()
        self._account()
        return Finish(await asyncio.to_thread(witness.conclude))

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
            case PagesWanted(order, ordinals) if self.encoding is not None:
                self._give(order, ordinals, self.encoding.borrowed(order))
            case Finished(receipt):
                if self.testimony.witness is not None:
                    await asyncio.to_thread(self.testimony.witness.over, receipt)
                self._done()
            case Facts() | Countersigned():
                self.testimony.hear(message)
            case VtpmWanted() | VtpmProved() if self.custody is not None:
                self.custody.hear(message)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} has no place here")

    def _give(self, order: int, ordinals: tuple[int, ...], borrowed: Mapping[int, bytes]) -> None:
        """The destination cannot read stored pages that a frame refers to.

        They are given beside hearing it: it may take its time to read them, and must not seem silent meanwhile.

        Raises:
            ProtocolViolation: they are not the frame's, or it asks for more before it has read what it asked for.
        """
        if not borrowed.keys() >= set(ordinals):
            raise ProtocolViolation(f"the destination asks for pages that frame {order} does not refer to")
        self._giving = [task for task in self._giving if not task.done()]
        if len(self._giving) >= PAGES_QUESTIONS_MAX:
            raise ProtocolViolation("the destination asks for pages, and does not read those that it asked for")
        self.log.warning("the destination lacks stored pages", pages=len(ordinals))
        pages = {ordinal: borrowed[ordinal] for ordinal in ordinals}
        self._giving.append(self.serve(self._give_pages(self.link, order, pages), "give pages"))

    async def _give_pages(self, link: ControlLink | None, order: int, pages: Mapping[int, bytes]) -> None:
        ordinals = tuple(pages)
        for start in range(0, len(ordinals), PAGES_GIVEN_MAX):
            if link is not self.link:
                return  # by another connection it asks again
            some = ordinals[start : start + PAGES_GIVEN_MAX]
            try:
                async with asyncio.timeout(PAGES_GIVEN_SECONDS_MAX):
                    await self.say(PagesGiven(order, some, b"".join(pages[ordinal] for ordinal in some)))
            except TimeoutError:
                raise PeerLost("the destination does not read the stored pages that it asked for") from None

    def _done(self) -> None:
        self._finished = True
        self.conclude()
        self.progress.wake()

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
        number = self.session.next_channel
        channel = Channel(number, connection, self, self.guard if number == 0 else None, self.naming)
        credit = self.session.reserve(channel.number)
        opened = self._opened[channel.number] = asyncio.get_running_loop().create_future()
        opened.add_done_callback(lambda _: self.progress.wake())
        self.start_delivery(channel)
        await self.say(ChannelOpen(channel.number, credit))
        if not await self.until(opened.done, CHANNEL_OPEN_SECONDS_MAX):
            raise PeerLost(f"channel {channel.number}: no answer from the destination")
        self.session.open(channel.number, opened.result())
        self.start_pump(channel)

    # ---- lanes

    async def _keep_lanes(self) -> None:
        """Open as many lanes as are wanted, and another for each that is lost.

        Raises:
            PeerLost: the session cannot resume, and no attempt at a lane succeeded.
        """
        failed = 0
        while True:
            while self.link is None or len(self.bundle.lanes) >= self.lanes_wanted:
                await self.changed.wait()
            try:
                lane = await self._while_met(self._open_lane(self.keys))
            except (OSError, TimeoutError, PeerLost, IntegrityError) as error:
                failed += 1
                self.log.warning("a lane's hello failed", attempt=failed, reason=explain(error))
            else:
                failed = 0
                if lane is not None:
                    self.add_lane(lane)
                continue
            if not self.session.resume_seconds and failed >= LANE_ATTEMPTS_MAX:
                if not self.bundle.lanes:
                    raise PeerLost(f"no lane could be opened in {LANE_ATTEMPTS_MAX} attempts")
                return
            if failed >= LANE_ATTEMPTS_MAX:
                most = LANE_PAUSE_SECONDS_MAX if self.bundle.lanes else RESUME_PAUSE_SECONDS_MAX
                await asyncio.sleep(min(most, RESUME_PAUSE_SECONDS_MIN * 2 ** min(failed, 16)))

    async def _while_met(self, work: Coroutine[Any, Any, Lane]) -> Lane | None:
        """The lane, or None where the control connection went meanwhile, and the keys with it."""
        keys, opening = self.keys, asyncio.create_task(work)
        opening.add_done_callback(lambda _: self.changed.wake())
        wanted = False
        try:
            while not opening.done() and self.link is not None and self.keys is keys:
                await self.changed.wait()
            wanted = opening.done() and self.keys is keys
            return opening.result() if wanted else None
        finally:
            if not wanted:
                opening.cancel()
                opening.add_done_callback(_drop_lane)

    async def _open_lane(self, keys: LaneKeys) -> Lane:
        """Open a lane, under a fresh lane id.

        Raises:
            OSError, TimeoutError, PeerLost, IntegrityError: it did not come about.
            ProtocolViolation: its id was given out before.
        """
        if self._grants:
            grant = self._grants.pop(0)
        else:
            while not self._granted.empty():
                self._granted.get_nowait()  # the answer to a request of a control connection that is gone
            await self.say(LaneRequest())
            async with asyncio.timeout(CONTROL_SECONDS_MAX):
                grant = await self._granted.get()
        if grant.lane in self._seen_lanes:
            raise ProtocolViolation(f"lane id {grant.lane} was given out twice")
        self._seen_lanes.add(grant.lane)
        async with asyncio.timeout(LANE_HELLO_SECONDS_MAX):
            return await self._say_hello(grant, keys)

    async def _say_hello(self, grant: LaneGrant, keys: LaneKeys) -> Lane:
        where = self._contact().where
        sock = await dial_tcp(where.host, where.port)
        lane = self.make_lane(sock, LaneId(grant.lane), keys)
        try:
            await lane.send_raw(LANE_MAGIC + grant.token)
            await lane.send(RecordType.HELLO)
            self.bundle.expect()
            answer = await lane.receive()
            if answer.header.type is not RecordType.LANE_OK:
                raise PeerLost(f"lane {lane.id}: {answer.header.type.name} instead of LANE_OK")
            answer.release()
        except BaseException:
            lane.drop()
            raise
        return lane

    # ---- the peer is found again

    async def _come_back(self) -> None:
        """Whenever the control connection is lost, make another, as often and as long as it takes.

        Raises:
            AuthenticationError, PeerRefused, PolicyRefused, PeerAborted, ProtocolViolation: the peer is there, and does
                not go on.
        """
        pause = RESUME_PAUSE_SECONDS_MIN
        while True:
            while self.link is not None:
                await self.changed.wait()
                pause = RESUME_PAUSE_SECONDS_MIN
            try:
                meeting, answer = await self._contact().come_back(
                    self.session, self.peer.name, self._suite, self._secret, self._route
                )
            except (PeerUnreachable, PeerVanished) as error:
                self.log.info("the peer is not back yet", reason=str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, RESUME_PAUSE_SECONDS_MAX)
                continue
            await self._go_on(meeting, answer)

    async def _go_on(self, meeting: Meeting, answer: Resumed) -> None:
        """The peer has taken us back: agree on what either side has, say again what it has not heard."""
        self.report.resumes += 1
        self.log.info("the session goes on", resumes=self.report.resumes)
        if answer.phase == "closed":
            if self.session.state is State.OPEN:
                meeting.link.drop()
                raise ProtocolViolation("the destination says it is done with a session that is not")
            self.link = meeting.link
            self._done()
            return
        try:
            covered = self.session.resumed(answer.received, answer.channels, asyncio.get_running_loop().time())
        except ProtocolViolation:
            meeting.link.drop()
            raise
        self.acknowledged(covered)
        self._grants = list(answer.lanes)
        self.attach(meeting)
        for state in answer.channels:
            waiting = self._opened.get(ChannelId(state.channel))
            if waiting is None:
                raise ProtocolViolation(f"channel {state.channel} was never announced")
            if state.opened and not waiting.done():
                waiting.set_result(state.credit)
        for number, half in list(self.session.receivers.items()):
            if number >= len(answer.channels):
                await self.say(ChannelOpen(number, half.credit))
        if answer.phase == "open" and self.session.state is State.FINISHING:
            await self.say(self._finish)


def _drop_lane(opening: asyncio.Task[Lane]) -> None:
    """Nobody wants a lane any more, which may have come about even so."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().drop()

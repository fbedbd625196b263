"""One open session on real sockets: what source and destination share.

    hypervisor ──read──▶ pump ──frame──▶ lanes ═══════ lanes ──record──▶ check ──frame──▶ deliver ──write──▶ hypervisor

Each channel has a pump (its hypervisor's bytes into frames) and a delivery (checked frames to its hypervisor); each
lane has a receiver; one task answers with acknowledgements, one sends again what lost lanes took with them; each
control connection has a task that hears it and one for heartbeats. The first error ends them all: the hypervisors are
told first, then the peer. A connection that is lost is no error while the session may resume: the peer is away, the
hypervisors wait, and the session goes on when it comes back, or ends when it does not.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

from proxy.authority import Point
from proxy.channel import SendHalf
from proxy.endpoints.base import Connection
from proxy.errors import (
    EXIT_INTEGRITY,
    Interrupted,
    PeerAborted,
    PeerLost,
    ProtocolViolation,
    RelayError,
    exit_code_of,
)
from proxy.flow import Departure
from proxy.guest import GuestView
from proxy.handover.table import Side
from proxy.hypervisors.base import Vm
from proxy.limits import (
    ABORT_SECONDS_MAX,
    DRAIN_SECONDS_MAX,
    STOPPED_SECONDS_MAX,
)
from proxy.ordering import Outgoing
from proxy.paging import Stored
from proxy.rate import TokenBucket
from proxy.report import SessionReport, tally
from proxy.session import Role, Session
from proxy.shell.channel import Channel
from proxy.shell.custody import Custody
from proxy.shell.decoding import DecodingLine
from proxy.shell.encoding import EncodingLine
from proxy.shell.framing import Framing
from proxy.shell.glance import status_of
from proxy.shell.lane import FrameOwner, give_back
from proxy.shell.laned import Laned
from proxy.shell.link import ControlLink
from proxy.shell.linked import Meeting
from proxy.shell.naming import Naming
from proxy.shell.oversight import Oversight
from proxy.shell.testimony import Testimony
from proxy.status import SessionStatus
from proxy.tally import PageTally
from proxy.wire import ChannelId, FrameHeader, FrameKind
from proxy.witness import Witness


class Runner(Laned):
    """One session on its sockets; ``SourceRunner`` and ``DestinationRunner`` add what the roles do differently.

    Args:
        session: the sans-IO state.
        report: filled in as the session goes.
        meeting: the first control connection, past ACCEPT.
        resume_seconds: how long a loss is waited out, as ACCEPT says; 0: it ends the session.
        lanes: how many the session is to have.
    """

    def __init__(
        self, session: Session, report: SessionReport, meeting: Meeting, resume_seconds: int, lanes: int
    ) -> None:
        super().__init__(session, report, meeting, lanes)
        self.oversight = Oversight.none(session.id, report)
        """Who has a say on it: whoever made it says so before it runs (``testify``)."""
        self.testimony = Testimony(self, session.role, self.oversight, None)
        self.custody: Custody | None = None
        """Of the machine's vTPM, where those are moved."""
        self.vouched: bytes | None = None
        """Source: the key that the destination's TPM has vouched for; None where it did not have to attest."""
        self.complete = False
        """Whether all channels have ended, and no further one can come."""
        session.agree(resume_seconds, self._release)
        self.channels: dict[ChannelId, Channel] = {}
        self.bucket, self.intake = TokenBucket(), TokenBucket()
        self._rate: float | None = None
        self._rate_max: float | None = None
        """Of a policy's rule."""
        self.heard = False
        """Whether the peer has taken its leave of a session that is over, and so knows how it ended."""
        self.began = self._loop.time()
        self._stopping: asyncio.TimerHandle | None = None
        """Until then a last handshake may finish, and the session ends."""
        self._ending = False
        """Whether any direction has ended: only then can an acknowledgement be the last."""
        self.encoding: EncodingLine | None = None
        """Where frames are encoded by pages, if that was agreed on."""
        self.stored: Stored | None = None
        """Its part of the content store."""
        self.decoding: DecodingLine | None = None
        self.naming: Naming | None = None
        """Holds the migration until its machine is known and may pass; None where nobody wants to know."""
        self.guest: GuestView | None = None
        """What its streams tell of the guest; None where nobody follows them."""

    # ---- seen and steered from outside

    def status(self) -> SessionStatus:
        """This moment of the session."""
        return status_of(self)

    def set_rate(self, rate: float | None) -> None:
        """Send no more than ``rate`` stream bytes a second from now on; None lifts the limit."""
        self._rate = rate
        self._change_rate()

    def limit_rate(self, rate: float) -> None:
        """Never send more than ``rate``, whatever ``set_rate`` allows."""
        self._rate_max = min(rate, self._rate_max or rate)
        self._change_rate()

    def _change_rate(self) -> None:
        rates = [rate for rate in (self._rate, self._rate_max) if rate is not None]
        self.bucket.change(min(rates, default=None), self._loop.time())
        self._wake_pumps()

    def stop(self, reason: RelayError) -> None:
        """End the session from outside: the peer and the hypervisors are told ``reason``.

        Where it is the process that is to end, a last handshake that is under way may finish, for
        ``STOPPED_SECONDS_MAX``: it takes less than to take up afterwards what was cut, and the machine stands still.
        """
        if isinstance(reason, Interrupted) and self.guard is not None and self.guard.closing:
            if self._stopping is None:
                self.log.info("the hand-over under way may finish", seconds_max=STOPPED_SECONDS_MAX)
                self._stopping = self._loop.call_later(STOPPED_SECONDS_MAX, self._stop, reason)
            return
        self._stop(reason)

    def _stop(self, reason: RelayError) -> None:
        if self.guard is not None:
            self.guard.stop()
        self.fail(reason)

    # ---- life

    async def run(self) -> None:
        """Carry the session, and its hand-over, to their end.

        Raises:
            RelayError, CryptoError: what ended it early. The hypervisors and the peer have been told.
        """
        try:
            await self._run()
            await self.finish_handover()
        finally:
            if self._stopping is not None:
                self._stopping.cancel()
            self.end_handover(self.report)
            self.oversight.end()

    async def _run(self) -> None:
        """Carry the session to its end.

        Raises:
            RelayError, CryptoError: what ended it early. The hypervisors and the peer have been told.
        """
        self._main = asyncio.current_task()
        before = 0 if self._main is None else self._main.cancelling()
        cancelled = False
        try:
            if self._failure is None:  # stop() may have come before us
                await self._conduct()
        except asyncio.CancelledError:
            # A task of ours failed and woke us, or somebody called stop(), or we are cancelled; or several of these.
            ours = self._failure is not None
            cancelled = not ours or (self._main is not None and self._main.uncancel() > before)
            self._failure = self._failure or PeerLost("the relay is stopping")
            if cancelled and self.guard is not None:
                self.guard.stop()  # nobody is left who could wait for the peer
        except Exception as error:  # noqa: BLE001 - a bug of ours, too, must not leave a hypervisor waiting
            self._failure = self._failure or error
        finally:
            self._main = None
            self.over = True
            self._lift_deadline()
            self._close_lines()  # before anything waits: whoever is cancelled once more must not leave threads behind
            await self._end_services()
        if self._failure is not None:
            await self._fail(self._failure)
            if cancelled:
                raise asyncio.CancelledError
            if self.moved:
                self.log.warning("the session broke off after the machine had moved", reason=str(self._failure))
                return
            raise self._failure
        await self._part()

    def discard(self) -> None:
        """Let go of a session that never ran."""
        self._failure = self._failure or PeerLost("it never began")
        self._close_lines()
        self.end_handover(self.report)
        self.oversight.end()

    def _close_lines(self) -> None:
        """Let go of threads and of the content store."""
        for line in (self.encoding, self.decoding):
            if line is not None:
                line.close()
        if self.stored is not None:
            # What a lost session brought is as good as any: its next attempt will find it.
            bad = self._failure is not None and exit_code_of(self._failure) == EXIT_INTEGRITY
            self.stored.close(keep=not bad)

    async def _conduct(self) -> None:
        """The role's way from an open session to its agreed end."""
        raise NotImplementedError

    async def _fail(self, failure: BaseException) -> None:
        """Hypervisors first, and the peer at once: one that is wound down may take a minute."""
        self._parted = not isinstance(failure, PeerLost)  # ABORT says why: a word that overtook it would hide that
        abandoning = self._loop.create_task(self.abandon())
        await asyncio.sleep(0)  # it begins with what takes no time: resets, kills
        if self._listening is not None:
            if isinstance(failure, PeerLost):
                # A lane that broke is often the peer giving up: the control connection may still say why.
                await asyncio.wait({self._listening}, timeout=ABORT_SECONDS_MAX / 2)
                failure = self._failure or failure
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        self._account()
        link = self.link
        self._parted = True
        if link is not None:
            told = await link.abort(exit_code_of(failure), str(failure) or type(failure).__name__)
            self.heard = told or isinstance(failure, PeerAborted)
        for lane in self.bundle.lanes.values():
            lane.drop()
        if link is not None:
            await link.close()  # the peer waits for it before it ends, and for the peer waits its hypervisor
        await abandoning

    async def abandon(self) -> None:
        """Make sure that no hypervisor takes this for a clean end."""
        if self.guard is not None and not self.guard.holds:
            await self._abort_channels()
        await self.see_through()
        await self._abort_channels()

    async def _abort_channels(self) -> None:
        pending = [channel for channel in self.channels.values() if not channel.settled]
        leaves = self.guard is not None and self.guard.leaves
        for channel in pending:
            channel.settled = True
        await asyncio.gather(*(_let_go(one.connection, leaves=leaves) for one in pending), return_exceptions=True)

    async def _part(self) -> None:
        """Both sides have agreed that all is well: FINAL on every lane, close_notify."""
        await self.abandon()  # what connected after the end belongs to no session
        self._account()
        lanes = list(self.bundle.lanes.values())
        try:
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                for lane in lanes:
                    await lane.finish()
        except (PeerLost, TimeoutError):
            self.log.debug("the peer was gone before FINAL")
        closing: list[Coroutine[Any, Any, None]] = [lane.close() for lane in lanes]
        if self.link is not None:
            closing.append(self._take_leave(self.link))
        await asyncio.gather(*closing)

    async def _take_leave(self, link: ControlLink) -> None:
        if await link.close():
            self.heard = True

    # ---- the peer comes and goes

    def _went(self) -> None:
        """See ``Linked._went``."""
        self.decoding_waits()
        super()._went()

    def _came(self) -> None:
        """See ``Linked._came``."""
        self.testimony.repeat()
        if self.custody is not None:
            self.custody.repeat()
        if self.decoding is not None:
            self.decoding.ask_again()

    def decoding_waits(self) -> None:
        """Nobody is there to give stored pages."""
        if self.decoding is not None:
            self.decoding.wait_for_peer()

    # ---- who has a say, and who signs

    def testify(self, oversight: Oversight, witness: Witness | None) -> None:
        """Who has a say on this session, and who signs what it does; said before it runs."""
        self.oversight = oversight
        self.testimony = Testimony(self, self.session.role, oversight, witness)

    async def keep_vtpm(self, side: Side, vm: Vm) -> None:
        """See ``guard.Approval``: the machine's vTPM is where the machine is, before anybody promises anything."""
        if self.custody is not None:
            await self.custody.approve(side, vm)

    def account(self) -> None:
        """See ``testimony.Session``."""
        self._account()

    async def until_complete(self) -> None:
        """See ``testimony.Session``: a guarded session is signed for before its channels end."""
        if self.guard is None:
            await self.until(lambda: self.complete)
        else:
            await self.guard.whole()

    @property
    def digested(self) -> tuple[str, ...]:
        """See ``testimony.Session``; QEMU hands over before it has sent everything: nobody knows how much that was."""
        if self.guard is not None and self.guard.kind == "qmp":
            return ()
        moved = () if self.report.vtpm_epoch is None else (f"vtpm/{self.report.vtpm_epoch}",)
        return (*(f"channel/{number}/forward" for number in self.session.senders), *moved)

    def follow_naming(self) -> None:
        """From here on the first channel is followed until it tells which machine comes, if anybody wants to know."""
        guard = self.guard
        told = guard.told if guard is not None and guard.kind == "xl" else None
        if told is None and self.oversight.authority is None:
            return
        self.naming = Naming(self.serve, told=told, ask=None if self.oversight.authority is None else self._may_pass)
        if guard is not None and guard.kind == "qmp":
            self.naming.know(guard.party.vm)  # its monitor has told, and its stream never does

    async def _may_pass(self, vm: Vm | None) -> None:
        await self.oversight.ask(Point.IDENTITY, vm)
        if self.report.rate_limit is None:
            return
        if self.session.role is Role.SOURCE:
            self.limit_rate(self.report.rate_limit)
        else:  # the peer's word that it sends no faster is not needed
            self.intake.change(self.report.rate_limit, self._loop.time())

    def start_delivery(self, channel: Channel) -> None:
        """Begin to write what arrives for a channel whose receiving half is reserved.

        The source does so before it announces the channel: the destination's first frame may overtake its answer.
        """
        self.channels[channel.number] = channel
        self.serve(channel.deliver(), f"deliver {channel.number}")

    def start_pump(self, channel: Channel) -> None:
        """Begin to read a channel whose sending half is open."""
        self.serve(channel.pump(), f"pump {channel.number}")

    async def settle_channels(self) -> None:
        """Make every local end's result final.

        Raises:
            HypervisorFailed: one of them says it did not work.
        """
        for channel in self.channels.values():
            if not channel.settled:
                await channel.connection.settle()
                channel.settled = True

    def framing(self, half: SendHalf) -> Framing:
        """See ``Carrier.framing``."""
        return Framing(self, half)

    async def send_frame(self, frame: Outgoing) -> None:
        """See ``Carrier.send_frame``."""
        await self.bundle.send(frame)

    def _release(self, frame: Outgoing) -> None:
        if frame.owner is not None:
            frame.owner.release()

    def written(self, channel: ChannelId, owner: FrameOwner | None, size: int) -> None:
        """See ``Carrier.written``: the frame's buffer is free, its sender is told soon."""
        give_back(owner)
        self.session.wrote(self.session.receivers[channel], size)
        self.bundle.written(size)

    def ended(self) -> None:
        """See ``Carrier.ended``."""
        self._ending = True
        self.progress.wake()

    def _wake_pumps(self) -> None:
        for channel in self.channels.values():
            channel.reading.wake()

    # ---- what arrives

    def frame(self, owner: FrameOwner, header: FrameHeader, body: memoryview) -> None:
        """See ``Host.frame``."""
        if len(body) != header.body_bytes:
            raise ProtocolViolation(f"a frame with a body of {len(body)} bytes, {header.body_bytes} announced")
        half = self.session.expect(header)
        if header.channel not in self.channels:
            raise ProtocolViolation(f"a frame for channel {header.channel} before it is open")
        line = self.decoding
        if line is not None and line.wants(header):
            line.put(half, header, owner, body)
            return
        half.verify(header, body)
        if line is not None:
            line.see(header, body)
        self.deliver(header, owner, body)

    def deliver(self, header: FrameHeader, owner: FrameOwner, stream: memoryview) -> None:
        """Stream bytes that were checked go on to the hypervisor."""
        channel = self.channels[header.channel]
        if header.kind is FrameKind.END:
            give_back(owner)
            channel.take_end()
        else:
            channel.take(owner, stream)

    def acknowledged(self, covered: list[Departure]) -> None:
        """See ``Host.acknowledged``."""
        if self.encoding is not None:
            for departure in covered:
                self.encoding.acknowledged(departure.order)
        self._wake_pumps()
        if self._ending:
            self.progress.wake()

    def _account(self) -> None:
        """Write what the session did into its report."""
        sent, received = self.wire_bytes()
        tally(self.report, self.session, self.pages, self.guest, sent_bytes=sent, received_bytes=received)

    @property
    def pages(self) -> PageTally | None:
        """What page-aware encoding did here; None where it was not agreed on."""
        line = self.encoding or self.decoding
        return None if line is None else line.tally


async def _let_go(connection: Connection, *, leaves: bool) -> None:
    """End a hypervisor's connection; where another process is to go on, in the way that loses least, if it has one."""
    leave = getattr(connection, "leave", None) if leaves else None
    if leave is not None:
        leave()
    else:
        await connection.abort()

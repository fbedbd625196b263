"""What a running session looks like at this moment."""

import asyncio
from typing import TYPE_CHECKING

from proxy.status import SessionStatus
from proxy.tally import PageCounts, PageTally

if TYPE_CHECKING:
    from proxy.shell.runner import Runner

_OF_THE_GUEST = ("rounds", "rounds_ended", "round_pages", "dirty_pages", "guest_pages")


def status_of(runner: "Runner") -> SessionStatus:
    """This moment of a session, for progress lines, `korora top` and metrics."""
    session, traffic = runner.session, runner.bundle.traffic
    senders, receivers = session.senders.values(), session.receivers.values()
    sent, received = runner.wire_bytes()
    tally, guest = runner.pages or PageTally(), runner.guest
    return SessionStatus(
        session_id=runner.report.session_id,
        role=session.role.value,
        peer=runner.peer.name,
        peer_address=runner.report.peer_address,
        vm=runner.report.vm if guest is None else guest.name,
        state=session.state.value if runner.link is not None else "resuming",
        handover="unguarded" if runner.guard is None else runner.guard.party.state.value,
        seconds=asyncio.get_running_loop().time() - runner.began,
        channels=len(receivers),
        lanes=len(runner.bundle.lanes),
        bytes_in=sum(half.offset for half in senders),
        bytes_out=sum(half.written_bytes for half in receivers),
        wire_sent=sent,
        wire_received=received,
        frames_sent=sum(half.frames for half in senders),
        frames_received=sum(half.frames for half in receivers),
        frames_resent=session.outbox.resent,
        records_sent=traffic.records_sent,
        records_received=traffic.records_received,
        rekeys=traffic.rekeys,
        lanes_lost=runner.bundle.lost,
        resumes=runner.report.resumes,
        queue_frames=sum(half.in_flight for half in senders),
        queue_bytes=session.flight.in_flight_bytes,
        window_bytes=session.flight.limit_bytes,
        delay_seconds=session.flight.delay_seconds,
        bytes_per_second=session.flight.bytes_per_second,
        rate_limit=runner.bucket.rate,
        regime=None if runner.encoding is None else runner.encoding.adapter.regime.name.lower(),
        **{f"pages_{kind}": getattr(tally.pages, kind) for kind in PageCounts.__slots__},
        paged_bytes=tally.raw_bytes,
        body_bytes=tally.body_bytes,
        delta_bytes=tally.delta_bytes,
        codec_seconds=tally.seconds,
        pages_missing=tally.missing,
        **({} if guest is None else {name: getattr(guest, name) for name in _OF_THE_GUEST}),
    )

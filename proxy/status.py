"""What a running session looks like from outside: for progress lines, `korora top` and metrics. Sans-IO."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """A moment of one session. Counts are since its beginning; sizes in bytes, times in seconds.

    Args:
        session_id: 32 hexadecimal digits.
        role: ``source`` or ``destination``.
        peer: the other host's name.
        peer_address: where it is.
        vm: the VM's name, once it is known.
        state: ``open``, ``finishing`` or ``closed`` (proxy/session.py), or ``resuming`` while the peer is away.
        handover: where this side of it stands (proxy/handover/table.py), or ``unguarded`` if nobody guards it.
        seconds: since the session began.
        channels: opened so far.
        lanes: carrying the session now.
        bytes_in: stream bytes that entered here from the local hypervisor.
        bytes_out: stream bytes written to the local hypervisor.
        wire_sent: bytes put on the network, TLS and lanes together.
        wire_received: bytes taken from it.
        frames_sent: frames made here, those sent again not counted.
        frames_received: frames checked here, those that came again not counted.
        frames_resent: frames sent once more after a loss.
        records_sent: records sealed on all lanes there were.
        records_received: records opened.
        rekeys: epochs begun after the first, both directions.
        lanes_lost: lanes that broke and were done without or replaced.
        resumes: times the session went on over a new control connection.
        queue_frames: frames that wait for their acknowledgement.
        queue_bytes: stream bytes in them.
        window_bytes: how many stream bytes may be in flight now.
        delay_seconds: smallest time from a frame's departure to its acknowledgement of late; 0 before any.
        bytes_per_second: stream bytes acknowledged a second, the best of late; 0 before any.
        rate_limit: bytes a second this side may send; None for no limit.
        regime: how the last frame was encoded, in words of chunking/regime.py; None where pages are not.
        pages_zero, pages_duplicate, pages_delta, pages_literal, pages_copy: pages by how they were encoded.
        paged_bytes: stream bytes of frames that were encoded by pages.
        body_bytes: what those became.
        delta_bytes: what pages took that went as differences, before compression; at the source only.
        codec_seconds: spent encoding or decoding them, all threads together.
        pages_missing: stored pages that had to be asked for, because they could not be read.
        rounds: rounds of the hypervisor over the guest's memory, the one under way included; 0 where unknown.
        rounds_ended: pages in the last two that have ended, or in fewer, the latest last.
        round_pages: pages sent in the one under way.
        dirty_pages: pages sent again so far.
        guest_pages: pages sent so far, those sent again counted each time.
    """

    session_id: str
    role: str
    peer: str
    peer_address: str | None
    vm: str | None
    state: str
    seconds: float
    channels: int
    lanes: int
    bytes_in: int
    bytes_out: int
    wire_sent: int
    wire_received: int
    frames_sent: int
    frames_received: int
    frames_resent: int
    records_sent: int
    records_received: int
    rekeys: int
    lanes_lost: int
    resumes: int
    queue_frames: int
    queue_bytes: int
    window_bytes: int
    delay_seconds: float
    bytes_per_second: float
    rate_limit: float | None
    handover: str = "unguarded"
    regime: str | None = None
    pages_zero: int = 0
    pages_duplicate: int = 0
    pages_delta: int = 0
    pages_literal: int = 0
    pages_copy: int = 0
    paged_bytes: int = 0
    body_bytes: int = 0
    delta_bytes: int = 0
    codec_seconds: float = 0.0
    pages_missing: int = 0
    rounds: int = 0
    rounds_ended: tuple[int, ...] = ()
    round_pages: int = 0
    dirty_pages: int = 0
    guest_pages: int = 0

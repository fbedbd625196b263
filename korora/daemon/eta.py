"""When a migration may come to its end, where its rounds tell that honestly. Sans-IO.

Only the hypervisor knows how much there is to send, and when it will stop the guest. What a relay sees are rounds: each
sends what the guest changed during the one before. Where the last two that ended became clearly smaller, the next ones
are taken to shrink alike, and the time left is that of a geometric series; anything else is not known.
"""

from typing import Final

from proxy.status import SessionStatus

SHRINK_MAX: Final = 0.8  # of a round to the one before: nearer to 1 the sum of all that may follow means nothing
DAY_SECONDS: Final = 86_400.0  # what would take longer is no estimate


def seconds_left(status: SessionStatus, pages_per_second: float) -> float | None:
    """An estimate, or None where there is nothing to make it of: a first or second round, no end in sight, no rate.

    Args:
        status: of the session, now.
        pages_per_second: how fast its pages go of late.
    """
    if len(status.rounds_ended) < 2 or pages_per_second <= 0 or status.state != "open":
        return None
    before, last = status.rounds_ended[-2:]
    if before <= 0 or last > SHRINK_MAX * before:
        return None
    shrink = last / before
    expected = shrink * last
    # A round that is larger than expected is under way at least: then only what may follow it is left.
    under_way = max(expected, status.round_pages)
    pages = under_way - status.round_pages + under_way * shrink / (1 - shrink)
    seconds = pages / pages_per_second
    return round(seconds, 1) if seconds <= DAY_SECONDS else None

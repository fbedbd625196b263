"""Windows: how much credit a receiver gives, and how much a sender keeps in flight. Sans-IO.

Credit bounds memory; the flight window bounds waiting. A sender stays below
max(2 × bandwidth-delay product, ``IN_FLIGHT_BYTES_MIN``), so that urgent pages do not queue behind bulk. Credit counts
stream bytes, for that is what the receiver must hold; flight counts bytes of bodies, for that is what waits. Bandwidth
and delay come from the acknowledgements themselves, as in BBR (draft-ietf-ccwg-bbr section 4.1): each frame remembers
how much had been delivered when it left.

The delay counts only as frames measure it that leave with little before them: in steady state a frame waits behind
the whole window, and a delay taken from it would make the window twice as long each time. Where bulk never lets up, the
window is narrowed for a moment now and then to measure again, as in BBR's ProbeRTT.
"""

from collections import deque
from typing import Final, NamedTuple

from proxy.limits import (
    CREDIT_BYTES_MAX,
    CREDIT_BYTES_MIN,
    CREDIT_BYTES_SESSION,
    IN_FLIGHT_BYTES_MAX,
    IN_FLIGHT_BYTES_MIN,
)

_SAMPLES: Final = 16  # acknowledgements over which the best bandwidth counts
_DELAY_SECONDS: Final = 10.0  # after which the smallest delay is measured anew
_PROBE_BYTES: Final = IN_FLIGHT_BYTES_MIN // 2  # the window meanwhile; half, because the limit is twice the product
_PROBE_SECONDS: Final = 2.0  # a measurement that does not come about is given up, and the old one kept


def credit_bytes(channels: int) -> int:
    """Bytes a receiver lets each channel of one direction be ahead, when ``channels`` are open."""
    return max(CREDIT_BYTES_MIN, min(CREDIT_BYTES_MAX, CREDIT_BYTES_SESSION // max(1, channels)))


class Departure(NamedTuple):
    """What a sender remembers of a frame.

    Args:
        size: bytes of its body, as they go over the network.
        at: when it left, in seconds.
        delivered: bytes of bodies acknowledged by then.
        under_way: bytes of bodies on their way then, its own included.
        raw: stream bytes it stands for.
        order: its cache order.
    """

    size: int
    at: float
    delivered: int
    under_way: int = 0
    raw: int = 0
    order: int = 0


class FlightWindow:
    """The in-flight limit of one session's sending side. Times in seconds, sizes in bytes."""

    def __init__(self) -> None:
        self.in_flight_bytes = 0
        self.limit_bytes = IN_FLIGHT_BYTES_MIN
        self.delay_seconds = 0.0
        """Smallest time from a frame's departure to its acknowledgement in the last seconds; 0 before any."""
        self._delivered = 0
        self._delay_at = 0.0
        self._rates: deque[float] = deque(maxlen=_SAMPLES)

    @property
    def room_bytes(self) -> int:
        """Bytes that may still leave now."""
        return max(0, self.limit_bytes - self.in_flight_bytes)

    @property
    def bytes_per_second(self) -> float:
        """Bytes of bodies acknowledged a second, the best of the last acknowledgements; 0 before any."""
        return max(self._rates, default=0.0)

    def depart(self, size: int, now: float, *, raw: int | None = None, order: int = 0) -> Departure:
        """A frame leaves: ``size`` bytes of body for ``raw`` stream bytes (as many, if not said), in cache order."""
        self.in_flight_bytes += size
        return Departure(size, now, self._delivered, self.in_flight_bytes, size if raw is None else raw, order)

    def arrive(self, departure: Departure, now: float) -> None:
        """That frame was acknowledged."""
        self.in_flight_bytes -= departure.size
        self._delivered += departure.size
        elapsed = now - departure.at
        if elapsed <= 0:
            return
        self._rates.append((self._delivered - departure.delivered) / elapsed)
        due = now - self._delay_at > _DELAY_SECONDS
        unhindered = departure.under_way <= _PROBE_BYTES
        if not self.delay_seconds or elapsed < self.delay_seconds or (unhindered and due):
            self.delay_seconds = elapsed
            self._delay_at = now
        elif now - self._delay_at > _DELAY_SECONDS + _PROBE_SECONDS:
            self._delay_at = now
        elif due:
            self.limit_bytes = _PROBE_BYTES
            return
        product = max(self._rates) * self.delay_seconds
        self.limit_bytes = int(min(IN_FLIGHT_BYTES_MAX, max(IN_FLIGHT_BYTES_MIN, 2 * product)))

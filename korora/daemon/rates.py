"""How a total rate is divided among the sessions that send. Sans-IO; rates in bytes a second."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WEIGHTS: Final = {"low": 1.0, "normal": 4.0, "high": 16.0}  # each step gets four times the one below it
USED_SHARE: Final = 0.9  # a session that uses this much of its rate would use more; over 1 / GROWTH, or it would swing
GROWTH: Final = 1.25  # how much more than it used a session is thought to want
IDLE_SHARE: Final = 0.1  # of its fair share: what a session that sends nothing is thought to want, to begin with


def part(count: int, workers: int, index: int) -> int:
    """A worker's part of a number of sessions that all workers may have together."""
    each, over = divmod(count, workers)
    return each + (index < over)


@dataclass(frozen=True, slots=True)
class Claim:
    """One sending session's part in the division.

    Args:
        weight: of its priority, over 0.
        demand: what it would use at most; None for all it can get.
        limit: what it may never exceed; None for none.
    """

    weight: float
    demand: float | None = None
    limit: float | None = None


def share(total: float | None, claims: Sequence[Claim]) -> list[float | None]:
    """Divide `total` by weight, nobody above its limit, and nothing left over while somebody may have it.

    Demands are served first, each by its weight; what then is left goes on top of them, for a demand is only an
    estimate and a rate only a permission. So the rates add up to the smaller of `total` and all limits together.

    Returns:
        A rate for each claim, in their order. Without a total each has its own limit.
    """
    if total is None:
        return [claim.limit for claim in claims]
    wanted = [least(claim.demand, claim.limit) for claim in claims]
    weights = [claim.weight for claim in claims]
    rates = _fill(total, weights, wanted)
    left = total - sum(rates)
    if left > 0:
        room = [None if claim.limit is None else claim.limit - rate for claim, rate in zip(claims, rates, strict=True)]
        extra = _fill(left, weights, room)
        rates = [rate + more for rate, more in zip(rates, extra, strict=True)]
    return list(rates)


def demand(used: float, given: float | None, fair: float) -> float | None:
    """What a session is thought to want.

    Args:
        used: what it sent a second of late.
        given: the rate it had then.
        fair: what its weight alone would give it.

    Returns:
        Bytes a second, or None for all it can get.
    """
    if given is None or used >= given * USED_SHARE:
        return None
    return max(used * GROWTH, fair * IDLE_SHARE)


def least(*rates: float | None) -> float | None:
    """The smallest of several limits; None where none of them limits."""
    return min((rate for rate in rates if rate is not None), default=None)


def _fill(total: float, weights: Sequence[float], caps: Sequence[float | None]) -> list[float]:
    """Water filling: by weight, and what one cannot take goes to the others by their weights."""
    rates = [0.0] * len(weights)
    left = total
    # In the order in which they would be full, each takes its part of what is left, or its cap.
    order = sorted(range(len(weights)), key=lambda number: _level(caps[number], weights[number]))
    weight_left = sum(weights)
    for number in order:
        cap = caps[number]
        part = left * (weights[number] / weight_left) if weight_left > 0 else 0.0
        rates[number] = part if cap is None else max(0.0, min(part, cap))
        left = max(0.0, left - rates[number])
        weight_left -= weights[number]
    return rates


def _level(cap: float | None, weight: float) -> float:
    return float("inf") if cap is None else cap / weight

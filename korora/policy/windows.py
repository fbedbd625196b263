"""When a rule counts: hours of the day, days of the week, in a zone's own time. Pure; the zones are the system's."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Final
from zoneinfo import ZoneInfo

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES: Final = 24 * 60
ZONE_CHARACTERS_MAX: Final = 64  # the longest of the IANA's has 32

_HOURS: Final = re.compile(r"([0-2][0-9]):([0-5][0-9])-([0-2][0-9]):([0-5][0-9])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Hours:
    """From one minute of the day up to another, which it leaves out; past midnight where ``end`` is the smaller one."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Window:
    """Times of the week.

    Attributes:
        hours: empty for the whole day.
        days: 0 is Monday. Hours that pass midnight belong to the day they began on.
        zone: whose time is meant: what its clocks show, also when they are set.
    """

    hours: tuple[Hours, ...]
    days: frozenset[int]
    zone: tzinfo

    def holds(self, now: datetime) -> bool:
        """Whether ``now``, in any zone, is within it."""
        local = now.astimezone(self.zone)
        minute, today = local.hour * 60 + local.minute, local.weekday()
        if not self.hours:
            return today in self.days
        return any(self._within(hours, minute, today) for hours in self.hours)

    def _within(self, hours: Hours, minute: int, today: int) -> bool:
        if hours.begin < hours.end:
            return hours.begin <= minute < hours.end and today in self.days
        yesterday = (today - 1) % len(DAYS)
        return (minute >= hours.begin and today in self.days) or (minute < hours.end and yesterday in self.days)


def hours_of(text: str) -> Hours:
    """``22:00-06:00``.

    Raises:
        ValueError: it is none.
    """
    match = _HOURS.fullmatch(text)
    if match is None:
        raise ValueError(f'expected "HH:MM-HH:MM", got {text!r}')
    begin, end = (int(hour) * 60 + int(minute) for hour, minute in (match.group(1, 2), match.group(3, 4)))
    if begin >= DAY_MINUTES or end > DAY_MINUTES:
        raise ValueError(f"a day ends at 24:00, got {text!r}")
    if begin == end:
        raise ValueError(f"{text!r} is either nothing or all of a day; leave hours away for all of it")
    return Hours(begin, end)


def days_of(texts: Sequence[str]) -> frozenset[int]:
    """``mon``, or ``fri-mon``; each day for none at all.

    Raises:
        ValueError: one is none.
    """
    if not texts:
        return frozenset(range(len(DAYS)))
    found: set[int] = set()
    for text in texts:
        first, dash, last = text.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f'expected a day like "mon" or days like "mon-fri", got {text!r}')
        begin = DAYS.index(first)
        count = (DAYS.index(last) - begin) % len(DAYS) if dash else 0
        found.update((begin + step) % len(DAYS) for step in range(count + 1))
    return frozenset(found)


def zone_of(name: str) -> tzinfo:
    """An IANA time zone; UTC is there on systems that have no others.

    Raises:
        ValueError: this system knows none of that name.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name[:ZONE_CHARACTERS_MAX])
    except (OSError, ValueError, LookupError):  # ZoneInfoNotFoundError is a LookupError; a directory an OSError
        raise ValueError(f"this system knows no time zone {name!r}") from None

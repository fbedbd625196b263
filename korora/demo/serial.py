"""The guest's counting, as it was heard: heartbeats on a serial line, and whether they went on across two of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

HEARTBEAT = re.compile(rb"HB (\d+) t=([\d.]+) written=(\d+) checked=(\d+) bad=(\d+)\r?\n")
LINE_BYTES_MAX = 4096  # a guest that sends no line end must not fill our memory


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One line of the guest: its number, its own clock, pages written, checks made, checks failed; `heard` is ours."""

    number: int
    uptime_seconds: float
    pages_written: int
    checked: int
    bad: int
    heard: float


@dataclass(slots=True)
class SerialLine:
    """What one QEMU's serial port has said so far. Feed it bytes; `tail` is an unfinished line."""

    beats: list[Heartbeat] = field(default_factory=list)
    head: bytes = b""  # what came before the first line end: the rest of a line that began on another host
    tail: bytes = b""
    noise: list[str] = field(default_factory=list)  # lines that are no heartbeat, e.g. a kernel's last words

    def feed(self, data: bytes, now: float) -> None:
        """Take `data` as read at time `now` (seconds, any monotonic clock)."""
        *lines, self.tail = (self.tail + data).split(b"\n")
        self.tail = self.tail[-LINE_BYTES_MAX:]
        for index, line in enumerate(lines):
            first = not self.beats and not self.noise and not self.head and index == 0
            beat = parse(line + b"\n", now)
            if beat is not None:
                self.beats.append(beat)
            elif first:
                self.head = line + b"\n"
            elif line.strip():
                self.noise.append(line.decode(errors="replace").strip())

    @property
    def last(self) -> Heartbeat | None:
        """The newest heartbeat, if any."""
        return self.beats[-1] if self.beats else None


def parse(line: bytes, heard: float) -> Heartbeat | None:
    """A whole heartbeat line, or None."""
    match = HEARTBEAT.fullmatch(line.lstrip(b"\r\x00"))
    if match is None:
        return None
    number, uptime, written, checked, bad = match.groups()
    return Heartbeat(int(number), float(uptime), int(written), int(checked), int(bad), heard)


@dataclass(frozen=True, slots=True)
class Continuity:
    """How the counting went on across a migration.

    `missing` and `repeated` name numbers; `silence_seconds` is the pause between the last beat heard on the source and
    the first heard on the destination.
    """

    first: int
    last_on_source: int
    first_on_destination: int
    last: int
    missing: list[int]
    repeated: list[int]
    bad: int
    checked: int
    silence_seconds: float

    @property
    def unbroken(self) -> bool:
        """No number missing, none twice, nothing wrong in memory, and checks were made after the migration."""
        return not self.missing and not self.repeated and self.bad == 0 and self.last > self.last_on_source


def continuity(source: SerialLine, destination: SerialLine) -> Continuity | None:
    """Join the two serial lines and look at the numbers; None when either has no heartbeat.

    A line may be cut by the switch-over, its beginning on the source and its end on the destination: it is joined.
    """
    beats = list(source.beats)
    arrived = list(destination.beats)
    if arrived and source.tail:
        joined = parse(source.tail + destination.head, arrived[0].heard)
        if joined is not None:
            arrived.insert(0, joined)
    if not beats or not arrived:
        return None
    numbers = [beat.number for beat in beats + arrived]
    seen = Counter(numbers)
    return Continuity(
        first=numbers[0],
        last_on_source=beats[-1].number,
        first_on_destination=arrived[0].number,
        last=arrived[-1].number,
        missing=[number for number in range(numbers[0], max(numbers) + 1) if number not in seen],
        repeated=sorted(number for number, times in seen.items() if times > 1),
        bad=max(beat.bad for beat in beats + arrived),
        checked=arrived[-1].checked,
        silence_seconds=arrived[0].heard - beats[-1].heard,
    )

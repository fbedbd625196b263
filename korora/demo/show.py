"""What a person sees of the demo: steps, a progress bar on a terminal (lines elsewhere), and the report as a table."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from korora.demo.scenario import BANDWIDTH_BYTES_PER_SECOND, MIB, Progress, Result

LINE_SECONDS = 1.0  # between two lines of progress where there is no terminal
COUNTED_EACH_SIDE = 4  # numbers drawn on either side of the switch-over
WIDTH_WITHOUT_TERMINAL = 110


def console_for(*, to_stderr: bool) -> Console:
    """A console on standard output or standard error; a terminal keeps its own width."""
    console = Console(stderr=to_stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=to_stderr, highlight=False, width=WIDTH_WITHOUT_TERMINAL)


def size(count: float) -> str:
    """Bytes for people."""
    if count >= MIB / 10:
        return f"{count / MIB:.1f} MiB"
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count:.0f} B"


class Show:
    """The Stage for people."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._number = 0
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._line_at = 0.0

    def step(self, title: str, detail: str = "") -> None:
        """Number and name a step."""
        self._number += 1
        self._console.print(f"[bold cyan]{self._number}[/] [bold]{escape(title)}[/]")
        if detail:
            self.detail(detail)

    def detail(self, text: str) -> None:
        """One quieter line below the step."""
        self._console.print(f"  {escape(text)}", soft_wrap=True)

    def progress(self, progress: Progress) -> None:
        """Draw the bar on a terminal, or a line a second elsewhere."""
        done = progress.total_bytes - progress.remaining_bytes
        words = (
            f"round {progress.rounds}, {size(progress.sent_bytes)} sent at {size(progress.bytes_per_second)}/s, "
            f"the guest counts {progress.beat}"
        )
        if not self._console.is_terminal:
            if time.monotonic() >= self._line_at + LINE_SECONDS:
                self._line_at = time.monotonic()
                self._console.print(f"  {done * 100 // max(progress.total_bytes, 1):3d} %  {words}")
            return
        if self._bar is None:
            columns = (TextColumn("  "), BarColumn(30), TextColumn("{task.percentage:3.0f} %  {task.description}"))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task(words, total=progress.total_bytes)
            self._bar.start()
        self._bar.update(self._task, completed=done, description=words)

    def migrated(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def report(self, result: Result, seconds: float) -> None:
        """The counting across the move, then everything measured, then the verdict."""
        guest = result.guest
        before = " ".join(str(n) for n in _last(guest.first, guest.last_on_source))
        after = " ".join(str(n) for n in _first(guest.first_on_destination, guest.last))
        self._console.print(f"  source … [bold]{before}[/] ┃ [bold green]{after}[/] … destination")
        table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows(result):
            table.add_row(name, escape(value))
        self._console.print(table)
        if result.good:
            text = "The guest counted on without a gap or a repeat, and its memory is sound."
            self._console.print(f"[bold green]{text}[/] ({seconds:.0f} s in all)")


def rows(result: Result) -> list[tuple[str, str]]:
    """The report, line by line."""
    guest, send, receive = result.guest, result.send, result.receive
    backward = send.get("bytes_out", {}).get("backward", 0)
    wire = send.get("bytes_wire", {})
    rate = result.stream_bytes / result.seconds if result.seconds else 0.0
    numbers = f"{guest.first} to {guest.last}: {_named(guest.missing)} missing, {_named(guest.repeated)} twice"
    return [
        ("time", f"{result.seconds:.2f} s in {result.migration.get('ram', {}).get('dirty-sync-count', '?')} rounds"),
        (
            "downtime",
            f"{result.downtime_seconds * 1000:.0f} ms says QEMU; {guest.silence_seconds * 1000:.0f} ms of silence on "
            "the serial line, which has a beat each 110 ms",
        ),
        ("stream", f"{size(result.stream_bytes)} forward, {size(backward)} back"),
        *_pages(send),
        ("on the network", f"{size(wire.get('forward', 0))} forward, {size(wire.get('backward', 0))} back, all sealed"),
        (
            "throughput",
            f"{size(rate)}/s (QEMU was held to {size(BANDWIDTH_BYTES_PER_SECOND)}/s, to have something to see)",
        ),
        ("cipher", str(send.get("cipher", "?"))),
        ("key exchange", str(send.get("group", "?"))),
        *_digests(send, receive),
        ("digests", "both relays saw the same bytes" if result.digests_agree else "DISAGREE"),
        ("the guest counted", numbers),
        ("its memory", f"{guest.checked} checks, {guest.bad} bad"),
    ]


def _pages(send: dict[str, object]) -> list[tuple[str, str]]:
    """What the relays made of the guest's pages."""
    pages = send.get("pages")
    if not isinstance(pages, dict) or not any(pages.values()):
        return [("pages", "carried as they are")]
    kinds = ", ".join(f"{count} {kind}" for kind, count in pages.items() if count)
    saved, stream = send.get("bytes_saved"), send.get("bytes_in")
    found = [("pages", kinds)]
    if isinstance(saved, int) and isinstance(stream, dict):
        share = 100 * saved / max(1, int(stream.get("forward", 0)))
        found.append(("saved", f"{size(saved)}, {share:.0f} % of the stream did not have to cross the network"))
    return found


def _digests(send: dict[str, object], receive: dict[str, object]) -> list[tuple[str, str]]:
    """Channel 0's forward BLAKE3 on either side."""
    found = []
    for side, report in (("source", send), ("destination", receive)):
        digests = report.get("digest_blake3")
        channel = digests.get("0") if isinstance(digests, dict) else None
        value = channel.get("forward", "?") if isinstance(channel, dict) else "?"
        found.append((f"BLAKE3, {side}", str(value)))
    return found


def _named(numbers: list[int]) -> str:
    """ "none", or the first few numbers."""
    if not numbers:
        return "none"
    return ", ".join(map(str, numbers[:5])) + (" …" if len(numbers) > 5 else "")


def _last(first: int, last: int) -> range:
    return range(max(first, last - COUNTED_EACH_SIDE + 1), last + 1)


def _first(first: int, last: int) -> range:
    return range(first, min(last, first + COUNTED_EACH_SIDE - 1) + 1)

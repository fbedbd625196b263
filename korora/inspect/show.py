"""What a person sees of an inspection: progress while it runs, then tables."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from chunking.frame import PageKind
from korora.inspect.inspection import Inspection, text
from korora.inspect.limits import MIB, RECORDS_SHOWN, ROUNDS_SHOWN

if TYPE_CHECKING:
    from collections.abc import Callable

    from korora.inspect.source import Source

_LINE_SECONDS: Final = 10.0  # between two lines of progress where there is no terminal
_WIDTH_WITHOUT_TERMINAL: Final = 110


def console_for(*, to_stderr: bool) -> Console:
    """A console on standard output or standard error; a terminal keeps its own width."""
    console = Console(stderr=to_stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=to_stderr, highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


@contextmanager
def progress(console: Console, source: Source) -> Iterator[Callable[[Source, int], None]]:
    """A bar on a terminal, a line now and then elsewhere; the callable takes the source and the stream's bytes."""
    if not console.is_terminal:
        last = time.monotonic()

        def line(source: Source, stream_bytes: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                share = f", {source.read_bytes / source.size_bytes:.0%} of the file" if source.size_bytes else ""
                console.print(f"{stream_bytes / MIB:,.0f} MiB of the stream{share}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(source.name), total=source.size_bytes)
        yield lambda source, _: bar.update(task, completed=source.read_bytes)


def report(found: Inspection) -> None:
    """Print the report to standard output."""
    console = console_for(to_stderr=False)
    if console.is_terminal:
        console.print(render(found))
        return
    with console.capture() as capture:
        console.print(render(found))
    for line in capture.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def render(found: Inspection) -> RenderableType:
    """The whole report."""
    parts: list[RenderableType] = [_summary(found), _pages(found)]
    if found.rounds:
        parts.append(_rounds(found))
    parts.append(_techniques(found))
    return Group(*parts)


def _table(title: str, *columns: str, words: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, box=None, title_justify="left", title_style="bold", header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=column != "technique")
    return table


def _summary(found: Inspection) -> RenderableType:
    facts = found.facts
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str | None) -> None:
        if value:
            table.add_row(name, escape(value))

    row("stream", f"{found.source}, {facts.format.value}, {facts.stream_bytes:,} bytes")
    row("from", ", ".join(part for part in (text(facts.hypervisor), text(facts.machine)) if part))
    row("VM", " ".join(part for part in (text(facts.vm_name), text(facts.vm_uuid)) if part))
    blocks = [f"{text(block.name)} {block.size_bytes / MIB:,.2f} MiB" for _, block in sorted(facts.blocks.items())]
    row("memory", ", ".join(blocks))
    records = [f"{text(name)} {count:,}" for name, count in facts.records.items()]
    row("records", ", ".join(records[:RECORDS_SHOWN]) + (", …" if len(records) > RECORDS_SHOWN else ""))
    for note in found.notes:
        table.add_row("[bold yellow]note[/]", f"[yellow]{escape(note)}[/]")
    return table


def _pages(found: Inspection) -> Table:
    facts = found.facts
    table = _table("\nPages", "", "pages", "of them", words=("",))
    kinds = found.kinds
    total = int(kinds.sum())
    share = "{:.1%}".format
    rows = [
        ("with their bytes", facts.pages_data, total),
        ("  all zero", int(kinds[PageKind.ZERO]), total),
        ("  duplicates of pages in the cache", int(kinds[PageKind.REF]), total),
        ("  little changed (deltas)", int(kinds[PageKind.DELTA]), total),
        ("  new or much changed (literals)", int(kinds[PageKind.LITERAL]), total),
        ("only marked as zero", facts.pages_zero_marked, 0),
        ("as the hypervisor's own deltas (XBZRLE)", facts.pages_xbzrle, 0),
        ("compressed by the hypervisor", facts.pages_compressed, 0),
        ("without content (XTAB, XALLOC, BROKEN)", facts.entries_xtab + facts.entries_xalloc + facts.entries_broken, 0),
    ]
    for name, count, of in rows:
        if count or of:
            table.add_row(name, f"{count:,}", share(count / of) if of else "")
    table.add_row("different pages of the guest", f"{found.distinct:,}", "")
    table.add_row("sent again", f"{found.again:,}", "")
    table.add_row("  unchanged", f"{found.unchanged:,}", share(found.unchanged / found.again) if found.again else "")
    return table


def _rounds(found: Inspection) -> Table:
    table = _table("\nRounds", "round", "pages", "sent again", "unchanged")
    shown = list(enumerate(found.rounds, 1))
    left_out = shown[ROUNDS_SHOWN // 2 : -ROUNDS_SHOWN // 2] if len(shown) > ROUNDS_SHOWN else []
    for number, each in shown:
        if left_out and number == left_out[0][0]:
            table.add_row("…", f"{sum(r.pages for _, r in left_out):,}", f"{sum(r.again for _, r in left_out):,}", "")
        if not (left_out and left_out[0][0] <= number <= left_out[-1][0]):
            table.add_row(str(number), f"{each.pages:,}", f"{each.again:,}", f"{each.unchanged:,}")
    return table


def _techniques(found: Inspection) -> Table:
    columns = ("", "technique", "bytes", "share", "MiB/s")
    table = _table("\nOn the wire", *columns, words=columns[:2])
    size = found.facts.stream_bytes
    for each in found.techniques:
        speed = f"{size / MIB / each.cpu_seconds:,.0f}" if each.cpu_seconds else ""
        ratio = f"{each.wire_bytes / size:.2%}" if size else ""
        table.add_row(each.name, each.words, f"{each.wire_bytes:,}", ratio, speed)
    return table

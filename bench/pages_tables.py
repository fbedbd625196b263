"""The tables of the section on page-aware encoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from bench.budget import Outcome
from bench.codecs import METHODS, PEERS, ZSTD_1, ZSTD_3
from bench.corpus import MiB
from bench.engine import EngineRow, engine_rows, speed_ups
from bench.goals import goals
from bench.linkmodel import OPAQUE, RATES_GBIT
from bench.measure import GiB
from bench.spread import Spread, number_text, spread_text, table

if TYPE_CHECKING:
    from bench.pages import PagesResult

ENCODES: Final = ("pages", "best")


def tables(result: PagesResult) -> list[str]:
    """All of them, goals first."""
    lines = ["### Pages"]
    if result.absent:
        lines += ["", *(f"- {name}: left out: {reason}" for name, reason in result.absent.items())]
    for part in (_goals, _wire, _engine, _parallel, _model, _links, _guests, _memory):
        lines += ["", *part(result)]
    return lines


def _left_out(outcome: Outcome[Any]) -> list[str]:
    lines = [f"- {name}: left out: {reason}" for name, reason in outcome.left_out.items()]
    return ["", *lines] if lines else []


def _goals(result: PagesResult) -> list[str]:
    cells = [
        [
            goal.what,
            number_text(goal.measured, 3),
            f"{'≥' if goal.at_least else '≤'} {goal.limit:g}",
            "not measured" if goal.measured is None else "met" if goal.met else "**missed**",
        ]
        for goal in goals(result)
    ]
    return table(("to reach", "measured", "limit", ""), cells)


def _wire(result: PagesResult) -> list[str]:
    streams, methods = result.streams, [name for name in PEERS if name in result.plan.methods]
    head = ("bytes on the wire ÷ the stream's", "stream MiB", "guest MiB", *methods, *(f"**{e}**" for e in ENCODES))
    cells = []
    for name in result.plan.streams:
        if name in streams:
            peers = [number_text(result.peer_ratio(name, method), 4) for method in methods]
            cells.append([name, *_sizes(result, name), *peers, *_ours(result, name)])
    remembered = {(sample.after, sample.method): sample.ratio for sample in result.peers_after.samples}
    for after in result.plan.afters:
        if after.second in streams and after.first in streams:
            # zstd keeps nothing, so what went before does not matter to it.
            peers = [
                number_text(
                    result.peer_ratio(after.second, method)
                    if method in {ZSTD_1, ZSTD_3}
                    else remembered.get((after.name, method)),
                    4,
                )
                for method in methods
            ]
            cells.append([after.name, *_sizes(result, after.second), *peers, *_ours(result, after.name)])
    note = (
        "Ours: real pairs of processes with a content store each, both directions of TLS and lanes counted. "
        f"{result.wire.cut or 'Once each'}. Peers: in this process, lengths and names of blocks counted."
    )
    return [note, "", *table(head, cells), *_left_out(result.wire), *_left_out(result.peers_after)]


def _sizes(result: PagesResult, name: str) -> list[str]:
    stream = result.streams[name]
    return [f"{stream.bytes / MiB:.0f}", f"{stream.guest_bytes / MiB:.0f}"]


def _ours(result: PagesResult, name: str) -> list[str]:
    return [number_text(result.ratio(name, encode), 4) for encode in ENCODES]


def _speeds(rows: dict[str, EngineRow], says: dict[str, str]) -> list[list[str]]:
    return [
        [
            name,
            number_text(row.ratio.median, 4),
            spread_text(row.encode_gib_per_s, 2),
            spread_text(row.decode_gib_per_s, 2),
            number_text(row.encode_cpu_s_per_gib.median, 2),
            number_text(row.decode_cpu_s_per_gib.median, 2),
            says.get(name, ""),
        ]
        for name, row in rows.items()
    ]


SPEED_HEAD: Final = (
    "", "wire ÷ stream", "encode, GiB/s", "decode, GiB/s", "encode, CPU-s/GiB", "decode, CPU-s/GiB", "is",
)  # fmt: skip


def _engine(result: PagesResult) -> list[str]:
    rows = engine_rows([*result.engine.samples, *result.slow.samples])
    captured = [name for name in result.plan.streams if name in result.streams]
    note = f"One core, GiB of guest memory, {len(captured)} streams; {result.engine.text()}"
    cells = _speeds(rows, {name: method.says for name, method in METHODS.items()})
    return [note, "", *table(SPEED_HEAD, cells), *_left_out(result.engine), *_left_out(result.slow)]


def _parallel(result: PagesResult) -> list[str]:
    rows = engine_rows(result.parallel.samples)
    ups = "; ".join(
        f"{regime}: two cores encode {encode:.2f} times as fast as one, and decode {decode:.2f} times"
        for regime, (encode, decode) in speed_ups(rows).items()
    )
    lines = [f"Two cores against one; {result.parallel.text()}", "", *table(SPEED_HEAD[:-1], _bare(rows))]
    return [*lines, *_left_out(result.parallel), "", f"{ups}."] if ups else [*lines, *_left_out(result.parallel)]


def _bare(rows: dict[str, EngineRow]) -> list[Sequence[str]]:
    return [row[:-1] for row in _speeds(rows, {})]


def _model(result: PagesResult) -> list[str]:
    modelled = result.modelled()
    ways = list(dict.fromkeys(way for way, _ in modelled))
    guest = sum(result.streams[name].guest_bytes for name in result.plan.modelled if name in result.streams)
    cells = []
    for rate in RATES_GBIT:
        opaque = modelled.get((OPAQUE, rate))
        cells.append([f"{rate:g} Gb/s", *(_against(modelled.get((way, rate)), opaque, guest) for way in ways)])
    note = (
        f"Seconds a GiB of guest memory (÷ opaque) over links modelled from the CPU time that encoding takes on one "
        f"core; {', '.join(result.plan.modelled)}, each through a pair that has seen nothing; once each."
    )
    return [note, "", *table(("link", *ways), cells), *_left_out(result.model)]


def _against(spread: Spread | None, opaque: Spread | None, guest_bytes: int) -> str:
    if spread is None or opaque is None:
        return "–"
    return f"{spread.median * GiB / guest_bytes:.2f} ({spread.median / opaque.median:.2f})"


def _links(result: PagesResult) -> list[str]:
    rows = result.rows()
    cells = []
    for case in result.plan.links:
        opaque = rows.get(f"link: {case.name}, {OPAQUE}")
        for encode in case.encodes:
            row = rows.get(f"link: {case.name}, {encode}")
            if row is None:
                continue
            ratio = None if opaque is None else row["seconds"].median / opaque["seconds"].median
            cells.append(
                [
                    case.name, case.stream, encode, spread_text(row["seconds"], 2), number_text(ratio, 2),
                    number_text(row["ratio"].median, 4),
                ]
            )  # fmt: skip
    head = ("link", "stream", "--encode", "seconds of the session", "÷ opaque", "wire ÷ stream")
    note = f"Real pairs over links shaped by a token bucket, nothing stored before; {result.links.text()}"
    return [note, "", *table(head, cells), *_left_out(result.links)]


def _guests(result: PagesResult) -> list[str]:
    rows = {name: row for name, row in result.rows().items() if name.startswith("guest: ")}
    cells = []
    for name, row in rows.items():
        guest, _, way = name.removeprefix("guest: ").partition(", ")
        cells.append([guest, way, number_text(row["wire_over_guest"].median, 4), spread_text(row["total_ms"], 0)])
    for guest in result.plan.guests:
        stream = result.streams.get(guest)
        for encode in ENCODES:
            ratio = result.ratio(guest, encode)
            if stream is not None and ratio is not None:
                over_guest = number_text(ratio * stream.bytes / stream.guest_bytes, 4)
                cells.append([guest, f"**korora, {encode}**", over_guest, "–"])
    note = f"QEMU's own ways out of the same guests, to a socket that counts; {result.guests.text()}"
    head = ("guest", "way", "wire ÷ guest memory", "QEMU's total time, ms")
    return [note, "", *table(head, cells), *_left_out(result.guests)]


def _memory(result: PagesResult) -> list[str]:
    cells = []
    samples = result.pair_samples()
    for encode in dict.fromkeys(sample.encode for sample in samples):
        of = [sample for sample in samples if sample.encode == encode]
        sender = Spread.over(sample.sender_kib / 1024 for sample in of)
        receiver = Spread.over(sample.receiver_kib / 1024 for sample in of)
        cells.append([encode, str(len(of)), spread_text(sender, 0), spread_text(receiver, 0)])
    head = ("--encode", "sessions", "sender, peak MiB", "receiver, peak MiB")
    return ["Memory of the relays above, page cache included (512 MiB at most):", "", *table(head, cells)]

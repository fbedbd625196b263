"""Page-aware encoding: fewer bytes, how fast they are made, and what a migration gains by them.

Real streams go through pairs of relays with a content store each, alone and one after another; through the engine and
its peers in this process; over links of several rates, modelled and real. Every part has its share of the section's
time and is cut where that is over. Goals that are missed are said so, first of all.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.budget import Budget, Outcome, Teller, interleave
from bench.codecs import METHODS, PEERS, ZSTD_1, ZSTD_3
from bench.corpus import (
    BUSY,
    FILES,
    IDLE_A,
    IDLE_B,
    QEMU_A,
    QEMU_B,
    QEMU_FILES,
    RANDOM,
    RANDOM_MIB,
    Stream,
    corpus_directory,
    make_random,
    unpack,
)
from bench.engine import EngineSample, engine_rows, measure_engine, measure_parallel
from bench.goals import RATIOS_MAX, goals
from bench.guests import GuestSample, measure_guests
from bench.linkmodel import WAYS, ModelSample, measure_way
from bench.links import MBIT, link
from bench.links import missing as link_missing
from bench.pages_tables import tables
from bench.processes import BenchError
from bench.spread import Spread
from bench.wire import Pair, PairSample, carry

ENCODES: Final = ("pages", "best")
LINK_ENCODES: Final = ("opaque", "auto", "pages", "best")
TOUCHED: Final = "qemu xbzrle"
GUEST_RAM_MIB: Final = {QEMU_A: 128, TOUCHED: 128, QEMU_FILES: 256}


@dataclass(frozen=True, slots=True)
class After:
    """A stream that follows another through the same two hosts.

    Args:
        name: in every table.
        first, second: streams.
        back: whether the second goes the other way.
    """

    name: str
    first: str
    second: str
    back: bool = False


AFTERS: Final = (
    After("xen idle-b after idle-a", IDLE_A, IDLE_B),
    After("xen busy after idle-a", IDLE_A, BUSY),
    After("xen idle-a back again", IDLE_A, IDLE_A, back=True),
    After("qemu idle-b after idle-a", QEMU_A, QEMU_B),
)


@dataclass(frozen=True, slots=True)
class LinkCase:
    """A link, and what goes over it.

    Args:
        name: in every table.
        mbit_per_s: None for loopback as it is.
        stream: which.
        encodes: how.
    """

    name: str
    mbit_per_s: int | None
    stream: str
    encodes: tuple[str, ...] = LINK_ENCODES


LINKS: Final = (
    LinkCase("100 Mb/s", 100, QEMU_A),
    LinkCase("1 Gb/s", 1000, BUSY),
    LinkCase("loopback", None, BUSY, ("opaque", "auto")),
    LinkCase("loopback, random guest", None, RANDOM, ("opaque", "auto")),
)
QUICK_LINKS: Final = (
    LinkCase("1 Gb/s", 1000, IDLE_A, ("opaque", "auto")),
    LinkCase("loopback", None, IDLE_A, ("opaque", "auto")),
)


# Shares of the section's time, in the order of measuring; what one leaves, the next has.
SHARES: Final = {
    "wire": 0.27, "peers after": 0.03, "engine": 0.16, "slow": 0.05, "parallel": 0.07, "model": 0.07, "links": 0.31,
    "guests": 0.04,
}  # fmt: skip
QUICK_SHARES: Final = {
    "wire": 0.45, "peers after": 0.0, "engine": 0.13, "slow": 0.0, "parallel": 0.07, "model": 0.10, "links": 0.19,
    "guests": 0.06,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PagesPlan:
    """How much of everything.

    Args:
        streams: captured streams, by name.
        alone: those that go through pairs alone.
        afters: those that follow others.
        methods: of the engine and its peers, quick ones; measured ``rounds`` times.
        slow_methods: measured once.
        links: real ones.
        modelled: streams for links that are modelled.
        guests: whose migration out of QEMU is measured.
        rounds: of what is timed.
        shares: of the time, by part.
    """

    streams: tuple[str, ...] = tuple(FILES)
    alone: tuple[str, ...] = tuple(FILES)
    afters: tuple[After, ...] = AFTERS
    methods: tuple[str, ...] = tuple(method.name for method in METHODS.values() if not method.slow)
    slow_methods: tuple[str, ...] = tuple(method.name for method in METHODS.values() if method.slow)
    links: tuple[LinkCase, ...] = LINKS
    modelled: tuple[str, ...] = (IDLE_A, BUSY)
    guests: tuple[str, ...] = (QEMU_A, TOUCHED, QEMU_FILES)
    rounds: int = 3
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)


QUICK_PAGES: Final = PagesPlan(
    streams=(IDLE_A, IDLE_B, QEMU_A),
    alone=(IDLE_A, QEMU_A),
    afters=AFTERS[:1],
    methods=("raw", "delta", "pages", "light", ZSTD_1, ZSTD_3),
    slow_methods=(),
    links=QUICK_LINKS,
    modelled=(IDLE_A,),
    guests=(QEMU_A,),
    rounds=2,
    shares=QUICK_SHARES,
)


@dataclass(frozen=True, slots=True)
class AfterSample:
    """What a peer that remembers makes of a stream that follows another."""

    item: str
    method: str
    after: str
    ratio: float


@dataclass(slots=True)
class PagesResult:
    """The section's parts."""

    plan: PagesPlan
    streams: dict[str, Stream] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wire: Outcome[PairSample] = field(default_factory=Outcome)
    peers_after: Outcome[AfterSample] = field(default_factory=Outcome)
    engine: Outcome[EngineSample] = field(default_factory=Outcome)
    slow: Outcome[EngineSample] = field(default_factory=Outcome)
    parallel: Outcome[EngineSample] = field(default_factory=Outcome)
    model: Outcome[list[ModelSample]] = field(default_factory=Outcome)
    links: Outcome[PairSample] = field(default_factory=Outcome)
    guests: Outcome[GuestSample] = field(default_factory=Outcome)

    def parts(self) -> dict[str, Outcome[Any]]:
        """By name, in the order of measuring."""
        return {
            "wire": self.wire, "peers after": self.peers_after, "engine": self.engine, "slow": self.slow,
            "parallel": self.parallel, "model": self.model, "links": self.links, "guests": self.guests,
        }  # fmt: skip

    def rows(self) -> dict[str, dict[str, Any]]:
        """Every figure, by part and item."""
        rows: dict[str, dict[str, Any]] = {}
        for item, of in _by_item(self.wire.samples).items():
            rows[f"wire: {item}"] = {"ratio": Spread.over(sample.ratio for sample in of), **_memory(of)}
        for name, row in engine_rows([*self.engine.samples, *self.slow.samples, *self.parallel.samples]).items():
            rows[f"engine: {name}"] = {
                "ratio": row.ratio,
                "encode_gib_per_s": row.encode_gib_per_s,
                "decode_gib_per_s": row.decode_gib_per_s,
                "encode_cpu_s_per_gib": row.encode_cpu_s_per_gib,
                "decode_cpu_s_per_gib": row.decode_cpu_s_per_gib,
            }
        for (way, rate), spread in self.modelled().items():
            rows[f"model: {rate:g} Gb/s, {way}"] = {"seconds": spread}
        for item, of in _by_item(self.links.samples).items():
            seconds = Spread.over(sample.seconds for sample in of)
            rows[f"link: {item}"] = {
                "seconds": seconds,
                "ratio": Spread.over(sample.ratio for sample in of),
                **_memory(of),
            }
        for item, found in _by_item(self.guests.samples).items():
            rows[f"guest: {item}"] = {
                "wire_over_guest": Spread.over(sample.wire_bytes / sample.guest_bytes for sample in found),
                "total_ms": Spread.over(sample.total_ms for sample in found),
            }
        return rows

    def modelled(self) -> dict[tuple[str, float], Spread]:
        """Seconds by way and rate."""
        found: dict[tuple[str, float], list[float]] = {}
        for samples in self.model.samples:
            for sample in samples:
                found.setdefault((sample.way, sample.gbit_per_s), []).append(sample.seconds)
        return {key: Spread.over(seconds) for key, seconds in found.items()}

    def ratio(self, item: str, encode: str) -> float | None:
        """Bytes on the wire over the stream's, of a stream or one that follows another."""
        found = [sample.ratio for sample in self.wire.samples if sample.item == wire_item(item, encode)]
        return Spread.over(found).median if found else None

    def peer_ratio(self, stream: str, method: str) -> float | None:
        """The same of a peer, in this process."""
        for sample in [*self.engine.samples, *self.slow.samples]:
            if sample.method == method and stream in sample.ratios:
                return sample.ratios[stream]
        return None

    def pair_samples(self) -> list[PairSample]:
        """All sessions of real pairs."""
        return [*self.wire.samples, *self.links.samples]

    def to_json(self) -> dict[str, Any]:
        """Rows, and each part with its samples."""
        parts, samples = self.parts(), {}
        for name, outcome in parts.items():
            samples[name] = [
                [asdict(one) for one in sample] if isinstance(sample, list) else asdict(sample)
                for sample in outcome.samples
            ]
        return {
            "rounds": self.engine.rounds,
            "planned": self.engine.planned,
            "cut": "; ".join(f"{name}: {outcome.cut}" for name, outcome in parts.items() if outcome.cut),
            "seconds": sum(outcome.seconds for outcome in parts.values()),
            "streams": {
                name: {"bytes": stream.bytes, "guest_bytes": stream.guest_bytes}
                for name, stream in self.streams.items()
            },
            "absent": self.absent,
            "goals": [{**asdict(goal), "met": goal.met} for goal in goals(self)],
            "rows": {
                name: {key: asdict(value) if isinstance(value, Spread) else value for key, value in row.items()}
                for name, row in self.rows().items()
            },
            "parts": {name: outcome.to_json() for name, outcome in parts.items()},
            "samples": samples,
        }

    def to_markdown(self) -> list[str]:
        """The tables."""
        return tables(self)


def _by_item(samples: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for sample in samples:
        found.setdefault(sample.item, []).append(sample)
    return found


def _memory(samples: Sequence[PairSample]) -> dict[str, Spread]:
    return {
        "sender_mib": Spread.over(sample.sender_kib / 1024 for sample in samples),
        "receiver_mib": Spread.over(sample.receiver_kib / 1024 for sample in samples),
    }


def wire_item(name: str, encode: str) -> str:
    """How a stream, or one that follows another, is called among the pairs' samples."""
    return f"{name}, {encode}"


def measure_pages(plan: PagesPlan, directory: Path, *, budget: Budget, teller: Teller) -> PagesResult:
    """All parts, each within its share of the time and what those before it left.

    Args:
        plan: what.
        directory: for unpacked streams, identities and stores.
        budget: of all parts.
        teller: is told each step.
    """
    teller.step("streams are unpacked")
    streams, absent = unpack(corpus_directory(), directory, plan.streams)
    result = PagesResult(plan, streams, absent)
    for name, reason in absent.items():
        teller.warn(f"{name}: {reason}; left out")
    if any(case.stream == RANDOM for case in plan.links):
        streams[RANDOM] = make_random(directory / "random.xenf", RANDOM_MIB)
    total_s, granted_s = budget.left_s, budget.spent_s

    def share(part: str) -> Budget:
        nonlocal granted_s
        granted_s += plan.shares[part] * total_s
        return Budget(min(granted_s - budget.spent_s, budget.left_s))

    captured = [stream for name, stream in streams.items() if name != RANDOM]
    result.wire = _measure_wire(result, directory, share("wire"), teller)
    result.peers_after = _measure_peers_after(result, share("peers after"), teller)
    if captured:
        result.engine = measure_engine(captured, plan.methods, plan.rounds, budget=share("engine"), teller=teller)
        result.slow = measure_engine(captured, plan.slow_methods, 1, budget=share("slow"), teller=teller)
        result.parallel = measure_parallel(captured, plan.rounds, budget=share("parallel"), teller=teller)
    modelled = [streams[name] for name in plan.modelled if name in streams]
    if modelled:
        result.model = interleave(
            WAYS, lambda way, _number: measure_way(way, modelled), rounds=1, budget=share("model"), teller=teller
        )
    result.links = _measure_links(result, directory, share("links"), teller)
    guests = {name: (streams[name], GUEST_RAM_MIB[name]) for name in plan.guests if name in streams}
    if guests:
        result.guests = measure_guests(guests, plan.rounds, budget=share("guests"), teller=teller)
    return result


def _measure_wire(result: PagesResult, directory: Path, budget: Budget, teller: Teller) -> Outcome[PairSample]:
    """Every captured stream alone, then those that follow others."""
    streams, seen = result.streams, dict[tuple[str, str], Pair]()
    items: dict[str, tuple[str, str, After | None]] = {}
    after_first = {after.first for after in result.plan.afters}
    # Those without a goal come last: they are what a section that has no time leaves out.
    aimed = [name for name in result.plan.alone if name in RATIOS_MAX or name in after_first]
    for name in aimed:
        items |= {wire_item(name, encode): (name, encode, None) for encode in ENCODES}
    for after in result.plan.afters:
        items |= {wire_item(after.name, encode): (after.second, encode, after) for encode in ENCODES}
    for name in result.plan.alone:
        items |= {wire_item(name, encode): (name, encode, None) for encode in ENCODES if name not in aimed}
    items = {
        item: (name, encode, after)
        for item, (name, encode, after) in items.items()
        if name in streams and (after is None or after.first in streams)
    }

    def act(item: str, number: int) -> PairSample:
        name, encode, after = items[item]
        scratch = Path(tempfile.mkdtemp(prefix=hashlib.sha256(item.encode()).hexdigest()[:8], dir=directory))
        if after is None:
            pair = Pair.fresh(directory, scratch)
            sample = carry(item, streams[name], encode, pair, number)
            seen[name, encode] = pair
            return sample
        if (after.first, encode) not in seen:
            raise BenchError(f"{after.first} did not go before")
        pair = seen[after.first, encode].copy_of(scratch)
        return carry(item, streams[name], encode, pair.turned() if after.back else pair, number)

    return interleave(list(items), act, rounds=1, budget=budget, teller=teller)


def _measure_peers_after(result: PagesResult, budget: Budget, teller: Teller) -> Outcome[AfterSample]:
    """What peers that deduplicate make of streams that follow others."""
    streams = result.streams
    items = {
        f"{after.name}, {method}": (after, method)
        for after in result.plan.afters
        for method in PEERS
        if method in result.plan.methods and method not in {ZSTD_1, ZSTD_3}
        if after.first in streams and after.second in streams
    }

    def act(item: str, _number: int) -> AfterSample:
        after, method = items[item]
        codec = METHODS[method].make()
        codec.encode(streams[after.first].read())
        second = streams[after.second]
        return AfterSample(item, method, after.name, codec.encode(second.read()) / second.bytes)

    return interleave(list(items), act, rounds=1, budget=budget, teller=teller)


def _measure_links(result: PagesResult, directory: Path, budget: Budget, teller: Teller) -> Outcome[PairSample]:
    """Real pairs over real links, each migration the first of its hosts."""
    cases: Mapping[str, tuple[LinkCase, str]] = {
        wire_item(case.name, encode): (case, encode)
        for case in result.plan.links
        for encode in case.encodes
        if case.stream in result.streams
    }
    left_out: dict[str, str] = {}
    if any(case.mbit_per_s is not None for case, _ in cases.values()) and (reason := link_missing()):
        left_out = {item: reason for item, (case, _) in cases.items() if case.mbit_per_s is not None}

    def act(item: str, number: int) -> PairSample:
        case, encode = cases[item]
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            pair, stream = Pair.fresh(directory, Path(scratch)), result.streams[case.stream]
            if case.mbit_per_s is None:
                return carry(item, stream, encode, pair, number)
            with link(case.mbit_per_s * MBIT) as ends:
                return carry(item, stream, encode, pair, number, ends=ends)

    return interleave(list(cases), act, rounds=result.plan.rounds, budget=budget, teller=teller, left_out=left_out)

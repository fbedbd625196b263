"""Bodies of PAGES frames made by hand, and destinations to show them to. Anything about a body can be made wrong.

Layout: header, then the meta stream's bytes (zstd, flushed), then the literals. Header, big-endian: layout u8, chain
u8, flags u8, a spare byte, runs, large, other bytes, table words (u32 each), pages by kind: zero, reference, delta,
literal, copy (u16 each), changed words, first slot, bytes of the meta stream (u32 each).
"""

import asyncio
import hmac
import struct
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from chunking.errors import PageForged, PagesMissing
from crypto.keys import Direction
from crypto.records import RecordType
from proxy.control import StoredSegment
from proxy.endpoints.sockets import TcpEgress
from proxy.paging import Encode, FramePages, PagingTerms, StoreAccess
from proxy.shell.destination import Terms
from tests.attacks.relays import BOUND_SECONDS, Identities, Receiver, StubHypervisor, noise
from tests.attacks.rogue import HandLane, RogueSource, Stream

PAGE = 4096
HEADER = struct.Struct(">BBBxIIIIHHHHHIII")
ZERO, REF, DELTA, LITERAL, COPY = range(5)
SLOTS, META_RESET, ZSTD, ZSTD_RESET, ALONE = 2, 4, 8, 16, 32
CACHE_PAGES = 64
PROLOGUE = noise(5000, 1)
INTEGRITY, LOST = 5, 6


def shuffled(numbers: list[int]) -> bytes:
    """A column of u32: differences, as four planes of bytes."""
    before = [0, *numbers][: len(numbers)]
    steps = struct.pack(f"<{len(numbers)}I", *((new - old) % 2**32 for new, old in zip(numbers, before, strict=True)))
    return b"".join(steps[plane::4] for plane in range(4))


class Chain:
    """The meta stream of one chain: a zstd stream, flushed at the end of each frame."""

    def __init__(self) -> None:
        self._stream = zstandard.ZstdCompressor(level=1).compressobj()
        self._begun = False

    def next(self, columns: bytes) -> tuple[int, bytes]:
        """The flag that the stream begins, and its next bytes."""
        flag, self._begun = 0 if self._begun else META_RESET, True
        return flag, self._stream.compress(columns) + self._stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@dataclass
class Body:
    """A body in good order, whose parts can be changed before it is packed.

    Args:
        kinds: one a page.
        located: locations of references, deltas and copies, in that order.
        slots: of new pages, as a column; None: they follow each other from ``first`` on.
        masks: of deltas.
        words: that deltas change.
        literals: as they stand behind the columns.
        other: bytes before the pages.
        counts: fields of the header that are to be something else than they should.
    """

    kinds: list[int] = field(default_factory=list)
    located: list[int] = field(default_factory=list)
    slots: list[int] | None = None
    first: int = 0
    masks: bytes = b""
    words: list[int] = field(default_factory=list)
    literals: bytes = b""
    other: bytes = b""
    columns: bytes | None = None
    meta: bytes | None = None
    chain: int = 0
    flags: int = 0
    layout: int = 1
    counts: dict[str, int] = field(default_factory=dict)

    def pack(self, chain: Chain) -> bytes:
        """Header, meta stream, literals."""
        of = self.kinds.count
        flags = self.flags | (0 if self.slots is None else SLOTS)
        columns = self.columns if self.columns is not None else self._columns()
        begins, meta = chain.next(columns)
        if self.meta is not None:
            meta = self.meta
        fields = {
            "runs": 1,
            "large": self._lengths()[1],
            "other": len(self.other),
            "words": 0,
            "zero": of(ZERO),
            "refs": of(REF),
            "deltas": of(DELTA),
            "literals": of(LITERAL),
            "copies": of(COPY),
            "changed": len(self.words),
            "first": self.first,
            "meta": len(meta),
        }
        assert self.counts.keys() <= fields.keys()
        header = HEADER.pack(self.layout, self.chain, flags | begins, *(fields | self.counts).values())
        return header + meta + self.literals

    def _lengths(self) -> tuple[bytes, int, bytes]:
        lengths = len(self.other), 0, len(self.kinds)
        large = [length for length in lengths if length >= 255]
        return bytes(min(length, 255) for length in lengths), len(large), struct.pack(f"<{len(large)}I", *large)

    def _columns(self) -> bytes:
        short, _, large = self._lengths()
        parts = [short, large, self.other, bytes(self.kinds)]
        at = 0
        for kind in (REF, DELTA, COPY):
            count = self.kinds.count(kind)
            parts.append(shuffled(self.located[at : at + count]))
            at += count
        if self.slots is not None:
            parts.append(shuffled(self.slots))
        parts += [self.masks, struct.pack(f"<{len(self.words)}Q", *self.words)]
        return b"".join(parts)


def literal(page: bytes, **changes: object) -> Body:
    """One page as it is."""
    return Body(**({"kinds": [LITERAL], "literals": page} | changes))  # type: ignore[arg-type]


SEGMENT = b"what was before!"


class Shelf:
    """A content store of one segment, in memory: as both ends think it is, and as it can be read here.

    Args:
        pages: by ordinal.
        readable: ordinals of those that are still there.
    """

    tenant = "acme"

    def __init__(self, pages: Sequence[bytes], readable: Sequence[int] = ()) -> None:
        self.stored, self.readable = list(pages), frozenset(readable)
        self.parts: list[Part] = []
        self.before_open: Callable[[], object] = bool
        """Called, in whatever thread it is, before a part is opened."""

    def offered(self, tenant: str) -> tuple[StoredSegment, ...]:
        """See ``StoreAccess``."""
        return (StoredSegment(SEGMENT, len(self.stored)),) if tenant == self.tenant else ()

    def held(
        self, tenant: str, offered: Sequence[StoredSegment], alias: Callable[[bytes], bytes]
    ) -> tuple[StoredSegment, ...]:
        """See ``StoreAccess``."""
        own = self.offered(tenant)
        return tuple(mine for mine in own if StoredSegment(alias(mine.name), mine.pages) in offered)

    def open(self, tenant: str, name: bytes, segments: Sequence[StoredSegment], slots: int) -> "Part":
        """See ``StoreAccess``."""
        assert tenant == self.tenant
        del slots
        self.before_open()
        self.parts.append(Part(self if segments else Shelf([]), name))
        return self.parts[-1]


class Part:
    """One session's part of a ``Shelf``: stored pages, and what was recorded."""

    def __init__(self, shelf: Shelf, segment: bytes) -> None:
        self._shelf, self.segment = shelf, segment
        self.recorded = 0
        self.kept: bool | None = None

    @property
    def pages(self) -> "Part":
        """See ``Stored``."""
        return self

    @property
    def count(self) -> int:
        """See ``StoredPages``."""
        return len(self._shelf.stored)

    def find(self, fingerprints: NDArray[np.uint64], raw: memoryview, offsets: NDArray[np.uint32]) -> NDArray[np.int64]:
        """See ``StoredPages``."""
        del fingerprints
        known = {page: ordinal for ordinal, page in enumerate(self._shelf.stored)}
        return np.array([known.get(bytes(raw[at : at + PAGE]), -1) for at in offsets.tolist()], np.int64)

    def bases(self, pfns: NDArray[np.uint64]) -> NDArray[np.int64]:
        """See ``StoredPages``."""
        return np.where(pfns < self.count, pfns, 2**64 - 1).astype(np.uint64).view(np.int64)

    def read(self, ordinals: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See ``StoredPages``."""
        if missing := [ordinal for ordinal in ordinals.tolist() if ordinal not in self._shelf.readable]:
            raise PagesMissing(missing)
        rows = b"".join(self._shelf.stored[ordinal] for ordinal in ordinals.tolist())
        return np.frombuffer(rows, np.uint8).reshape(-1, PAGE)

    def verify(self, ordinal: int, page: bytes) -> None:
        """See ``Stored``."""
        if page != self._shelf.stored[ordinal]:
            raise PageForged(f"not stored page {ordinal}")

    def record(self, stream: memoryview, pfns: NDArray[np.uint64], pages: FramePages) -> None:
        """See ``Stored``."""
        del stream, pfns
        self.recorded += len(pages.new.slots)

    def name(self, vm: str) -> None:
        """See ``Stored``."""

    def close(self, *, keep: bool) -> None:
        """See ``Stored``."""
        self.kept = keep


def threads() -> set[str]:
    """What the page engine's threads are doing that are alive now."""
    names = {thread.name.split()[0] for thread in threading.enumerate()}
    return names & {"plan_0", "press", "rebuild_0", "unpress"}


def alias(name: bytes, direction: Direction, exporter: bytes) -> bytes:
    """What a segment is called on one connection."""
    said = b"korora v1 segment alias" + bytes((int(direction),)) + exporter
    return hmac.digest(name, said, "sha256")[:16]


def aliases(segments: Sequence[dict[str, Any]], direction: Direction, exporter: bytes) -> list[dict[str, Any]]:
    """What segments are called on one connection."""
    return [segment | {"name": alias(segment["name"], direction, exporter)} for segment in segments]


@dataclass
class PagedScene:
    """A destination that takes pages, its hypervisor, and a rogue with an open channel 0; `PROLOGUE` was delivered."""

    receiver: Receiver
    hypervisor: StubHypervisor
    rogue: RogueSource
    lane: HandLane
    credit: int
    answer: dict[str, Any]
    stream: Stream = field(default_factory=Stream)
    chain: Chain = field(default_factory=Chain)
    order: int = 1
    good: bytes = PROLOGUE

    def frame(self, body: bytes, raw: bytes, **changes: object) -> bytes:
        """The next frame, of pages."""
        made = self.stream.paged(body, raw, self.order, **changes)
        self.order += 1
        return made

    def plain(self, data: bytes) -> bytes:
        """The next frame, of bytes as they are."""
        made = self.stream.data(data, self.order)
        self.order += 1
        return made

    async def sends(self, body: Body, raw: bytes, **changes: object) -> None:
        """Send the next frame, of pages."""
        await self.lane.frame(self.frame(body.pack(self.chain), raw, **changes))

    async def hears(self, more: bytes) -> None:
        """The hypervisor has heard this in addition."""
        self.good += more
        side = self.hypervisor.sides[0]
        async with asyncio.timeout(5.0):
            await side.until(lambda: len(side.received) >= len(self.good))
        assert side.received == self.good

    async def ends(self, code: int = INTEGRITY, seconds: float = 5.0) -> BaseException | None:
        """The session has ended so, the hypervisor knows, and has got nothing but what was good."""
        assert await self.receiver.verdict(seconds) == code, self.receiver.errors
        await self.hypervisor.settled()
        side = self.hypervisor.sides[0]
        assert bytes(side.received) == self.good
        assert side.ended == "reset"
        return self.receiver.errors[0]


@asynccontextmanager
async def paged_scene(
    identities: Identities,
    *,
    cache_pages: int = CACHE_PAGES,
    chains: int = 2,
    tenant: str = "",
    claimed: str | None = None,
    segments: Sequence[dict[str, Any]] = (),
    store: StoreAccess | None = None,
    resume_seconds: int = 0,
    reads: bool = True,
    **offered: object,
) -> AsyncIterator[PagedScene]:
    """A session in good order in which pages were agreed on.

    Args:
        identities: whose it is.
        cache_pages, chains, tenant, store, resume_seconds: the destination's terms.
        claimed: whose pages the source says that they are, if others than its egress's.
        segments: offered, under their names.
        reads: whether the hypervisor reads.
        offered: fields of the offer.
    """
    paging = PagingTerms(Encode.PAGES, cache_pages * PAGE, chains, tenant, store)
    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(reads=reads) as hypervisor,
        Receiver(
            identities.destination,
            TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress"),
            terms=Terms(resume_seconds=resume_seconds, paging=paging),
        ) as receiver,
        RogueSource(identities.source, receiver.port) as rogue,
    ):
        fields = {
            "codecs": [0, 1],
            "cache_bytes": 2**40,
            "chains": 16,
            "tenant": tenant if claimed is None else claimed,
        } | offered
        exporter = rogue.control.exporter(rogue.session)
        fields["segments"] = aliases(segments, Direction.FORWARD, exporter)
        answer = await rogue.offer(resume_seconds=resume_seconds, **fields)
        assert answer["type"] == "accept", answer
        names = {alias(segment["name"], Direction.BACKWARD, exporter): segment["name"] for segment in segments}
        answer["segments"] = [segment | {"name": names[segment["name"]]} for segment in answer["segments"]]
        lane = await rogue.lane()
        made = PagedScene(receiver, hypervisor, rogue, lane, await rogue.channel(), answer)
        await lane.frame(made.stream.data(PROLOGUE, order=0))
        kind, _ = await lane.receive()
        assert kind is RecordType.ACK
        yield made

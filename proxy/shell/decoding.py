"""The destination's decoding line: encoded frames become stream bytes beside the loop, in cache order.

    lane ──frame──▶ a thread a chain: unpress ──▶ one thread: rebuild, digest ──▶ the loop: deliver

Nothing goes on to the hypervisor before its running digest has been compared. After the first frame that is wrong
nothing comes out any more.
"""

import asyncio
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from chunking.decoder import Decoder, Rebuilt, Unpressed
from chunking.errors import ChunkingError, FrameMalformed, PagesMissing
from chunking.frame import PageKind
from chunking.pages import NO_PFN
from proxy.channel import ReceiveHalf
from proxy.errors import PeerLost, ProtocolViolation, StreamCorrupt
from proxy.guest import GuestView
from proxy.limits import (
    BUFFERS_EASY_MAX,
    FRAME_BYTES_MAX,
    FRAMES_DECODED_AHEAD,
    PAGES_GIVEN_SECONDS_MAX,
    SMALL_BODY_BYTES,
)
from proxy.paging import Stored
from proxy.shell.lane import BufferPool, FrameOwner, Lent, Record, give_back
from proxy.streams.parser import StreamParser
from proxy.tally import PageTally
from proxy.wire import ChannelId, Codec, FrameHeader, FrameKind

NOWHERE: Final = np.empty(0, np.uint64)


class Asks(Protocol):
    """How stored pages that cannot be read here are asked for; called on the loop."""

    def __call__(self, order: int, ordinals: Sequence[int]) -> None:
        """Ask the peer for the pages that frame ``order`` refers to."""


@dataclass(slots=True, eq=False)
class Job:
    """A frame that has arrived, its turn come, and whose bytes are not out yet."""

    half: ReceiveHalf
    header: FrameHeader
    owner: FrameOwner
    body: memoryview
    chain: int | None = None
    unpressed: Future[Unpressed] | None = None
    wanted: set[int] = field(default_factory=set)
    given: dict[int, bytes] = field(default_factory=dict)
    counts: list[int] | None = None
    rebuilt: Rebuilt | None = None
    seconds: float = 0.0


class DecodingLine:
    """The decoding line of one session.

    Args:
        decoder: the page engine's half.
        chains: threads that decompress.
        guest: told of all that arrives.
        stored: the session's part of the content store, if it has one.
        deliver: told of each frame in turn: its header, what owns the stream bytes, and those.
        ask: see ``Asks``.
        fail: told of what cannot be made good.
    """

    def __init__(
        self,
        decoder: Decoder,
        chains: int,
        *,
        guest: GuestView,
        stored: Stored | None,
        deliver: Callable[[FrameHeader, FrameOwner, memoryview], None],
        ask: Asks,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._decoder, self._chains = decoder, chains
        self._deliver, self._ask, self._fail = deliver, ask, fail
        self._guest, self._stored = guest, stored
        self._readers: dict[ChannelId, StreamParser] = {}
        self._unread: set[ChannelId] = set()
        self._loop = asyncio.get_running_loop()
        self._rebuilder = ThreadPoolExecutor(1, "rebuild")
        self._unpressers = [ThreadPoolExecutor(1, f"unpress {chain}") for chain in range(chains)]
        self._jobs: deque[Job] = deque()
        self._begun = self._unpacked = 0
        """How many of them the threads have, and of those how many are encoded."""
        self._pool = BufferPool(FRAME_BYTES_MAX)
        self._answers: queue.SimpleQueue[Mapping[int, bytes] | None] = queue.SimpleQueue()
        self._asking: Job | None = None
        self._answer_due: asyncio.TimerHandle | None = None
        self._closed = False
        self.tally = PageTally()

    # ---- on the loop

    @property
    def idle(self) -> bool:
        """Whether nothing is in the line."""
        return not self._jobs

    @property
    def wanted(self) -> frozenset[int]:
        """Stored pages that were asked for and have not come."""
        return frozenset() if self._asking is None else frozenset(self._asking.wanted)

    def wants(self, header: FrameHeader) -> bool:
        """Whether a frame must go through the line: it is encoded, or behind one that is. If not: ``see``."""
        return header.codec is not Codec.OPAQUE or bool(self._jobs)

    def see(self, header: FrameHeader, stream: memoryview) -> None:
        """A frame went past the line, which was empty: so nobody else reads streams at this moment."""
        self._pfns_of(header, stream)

    def put(self, half: ReceiveHalf, header: FrameHeader, owner: FrameOwner, body: memoryview) -> None:
        """Take a frame whose turn it is.

        Raises:
            StreamCorrupt: its body is none.
        """
        if isinstance(owner, Record) and len(body) < SMALL_BODY_BYTES and owner.pool.out >= BUFFERS_EASY_MAX:
            # Credit counts stream bytes: tiny frames that wait must not hold buffers made for large ones.
            small = bytearray(body)
            owner.release()
            owner, body = small, memoryview(small)
        job = Job(half, header, owner, body)
        if header.codec is Codec.PAGES:
            try:
                job.chain = self._decoder.chain_of(body)
                if job.chain >= self._chains:
                    raise FrameMalformed(f"chain {job.chain} of {self._chains}")
            except FrameMalformed as error:
                raise StreamCorrupt(f"{half}: frame {header.number}: {error}") from None
        self._jobs.append(job)
        self._begin()

    def _begin(self) -> None:
        """Give the threads what they may have now: no frame is decompressed long before its turn."""
        while self._begun < len(self._jobs) and not self._closed:
            job = self._jobs[self._begun]
            if job.chain is not None:
                if self._unpacked >= self._chains + FRAMES_DECODED_AHEAD:
                    return
                self._unpacked += 1
                job.unpressed = self._unpressers[job.chain].submit(self._unpress, job)
            self._begun += 1
            self._rebuilder.submit(self._rebuild, job)

    def given(self, order: int, pages: Mapping[int, bytes]) -> None:
        """The peer has given stored pages that were asked for.

        Raises:
            ProtocolViolation: nobody asked for them.
        """
        job = self._asking
        if job is None or job.header.cache_order != order or not pages.keys() <= job.wanted:
            raise ProtocolViolation(f"stored pages for frame {order} that nobody asked for")
        job.wanted -= pages.keys()
        job.given |= pages
        self._expect_answer(bool(job.wanted))
        if not job.wanted:
            self._asking = None
            self._answers.put(job.given)

    def ask_again(self) -> None:
        """The peer is back, and the question may have been lost on the way."""
        if self._asking is not None and not self._closed:
            self._expect_answer(True)
            self._ask(self._asking.header.cache_order, sorted(self._asking.wanted))

    def wait_for_peer(self) -> None:
        """The peer is away, and so is the answer; ``ask_again`` follows, or the session's end."""
        self._expect_answer(False)

    def close(self) -> None:
        """Nothing more is wanted of the line."""
        self._closed = True
        self._expect_answer(False)
        self._answers.put(None)
        for pool in (self._rebuilder, *self._unpressers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, job: Job, owner: FrameOwner, stream: memoryview) -> None:
        self._jobs.popleft()
        self._begun -= 1
        self._unpacked -= job.chain is not None
        if self._closed:
            return
        self._begin()
        self.tally.add(job.counts, job.header.raw_bytes, job.header.body_bytes, job.seconds)
        try:
            self._deliver(job.header, owner, stream)
        except Exception as error:  # noqa: BLE001 - as in a lane's receiver, which this stands in for
            self._broken(error)

    def _broken(self, error: BaseException) -> None:
        self._closed = True
        self._fail(error)

    def _expect_answer(self, expected: bool) -> None:
        """A peer that is there must answer in time: heartbeats alone would keep the session waiting for ever."""
        if self._answer_due is not None:
            self._answer_due.cancel()
            self._answer_due = None
        if expected:
            late = PeerLost(f"stored pages that were asked for did not come in {PAGES_GIVEN_SECONDS_MAX:.0f} s")
            self._answer_due = self._loop.call_later(PAGES_GIVEN_SECONDS_MAX, self._fail, late)

    def _wants(self, job: Job) -> None:
        if not self._closed:
            self._asking = job
            self._expect_answer(True)
            self.tally.missing += len(job.wanted)
            self._ask(job.header.cache_order, sorted(job.wanted))

    # ---- beside it

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call, *arguments)

    def _unpress(self, job: Job) -> Unpressed:
        began = perf_counter()
        unpressed = self._decoder.unpress(job.body, job.header.raw_bytes)
        job.seconds += perf_counter() - began
        return unpressed

    def _rebuild(self, job: Job) -> None:
        if self._closed:
            return
        try:
            owner, stream = self._stream_of(job)
            job.half.verify(job.header, stream)
            self._read(job, stream)
        except ChunkingError as error:
            self._closed = True
            words = f"{job.half}: frame {job.header.number}: {error}"
            self._on_loop(self._broken, StreamCorrupt(words))
        except Exception as error:  # noqa: BLE001 - whatever it is, the session must hear of it
            self._closed = True
            self._on_loop(self._broken, error)
        else:
            self._on_loop(self._done, job, owner, stream)

    def _stream_of(self, job: Job) -> tuple[FrameOwner, memoryview]:
        """The stream bytes that a frame stands for, and what owns them."""
        if job.unpressed is None:
            return job.owner, job.body
        unpressed = job.unpressed.result()
        began = perf_counter()
        lent = Lent(self._pool.take(), self._pool)
        stream = memoryview(lent.buffer)[: job.header.raw_bytes]
        rebuilt: Rebuilt | None = None
        given: Mapping[int, bytes] = {}
        while rebuilt is None:
            try:
                rebuilt = self._decoder.rebuild(unpressed, stream, given=given)
            except PagesMissing as missing:
                given = {**given, **self._fetch(job, missing.ordinals)}
        give_back(job.owner)
        job.rebuilt = rebuilt
        job.counts = np.bincount(rebuilt.kinds, minlength=len(PageKind)).tolist()
        job.seconds += perf_counter() - began
        return lent, stream

    def _read(self, job: Job, stream: memoryview) -> None:
        """See for ourselves what arrives, as the source does, and keep the pages that a frame brought."""
        pfns = self._pfns_of(job.header, stream)
        if job.rebuilt is not None and self._stored is not None:
            count = len(job.rebuilt.kinds)
            # A peer may call anything pages; those that nobody else sees in the stream have no place in the guest.
            self._stored.record(stream, pfns if len(pfns) == count else np.full(count, NO_PFN, np.uint64), job.rebuilt)

    def _pfns_of(self, header: FrameHeader, stream: memoryview) -> NDArray[np.uint64]:
        """Where the pages in a frame lie in the guest.

        Every frame of a channel must be read, in order, until it is known to have no pages.
        """
        if header.channel in self._unread or header.kind is FrameKind.END:
            return NOWHERE
        reader = self._readers.get(header.channel)
        if reader is None:
            reader = self._readers[header.channel] = StreamParser(self._guest.vtpm)
        spans = reader.feed(stream, final=False, urgent=True)
        self._guest.saw(spans, reader.facts.vm_name)
        if reader.decided and not reader.paged:
            self._unread.add(header.channel)
        return spans.pfns

    def _fetch(self, job: Job, ordinals: Sequence[int]) -> Mapping[int, bytes]:
        """Have the peer give stored pages; the session's other frames wait."""
        job.wanted, job.given = set(ordinals), {}
        self._on_loop(self._wants, job)
        answer = self._answers.get()
        if answer is None:
            raise PeerLost("the session ended while stored pages were asked for")
        for ordinal, page in answer.items():
            if self._stored is None:
                raise ProtocolViolation("stored pages, and there are none")
            self._stored.verify(ordinal, page)
        return answer

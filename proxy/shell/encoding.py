"""The source's encoding line: frames are planned and pressed beside the loop, and sent in cache order.

    pump ──job──▶ one thread: digest, plan ──▶ a thread a chain: press ──▶ the loop: send, in the order they came

Planning decides what the page cache holds, so it is serial; pressing compresses, and goes on side by side in as many
chains as there are. While the line is busy every frame of the session goes through it, for they must not overtake one
another; while it is idle a frame that needs no encoding is sent without it.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter

from chunking.adapt import Adapter
from chunking.costs import Encoded
from chunking.encoder import Encoder, Plan
from chunking.link import Departure
from chunking.pages import PAGE_BYTES, WORD_BYTES, Spans
from chunking.regime import Regime
from proxy.channel import Claim, SendHalf
from proxy.ordering import Outgoing
from proxy.paging import Stored
from proxy.session import Session
from proxy.shell.lane import Lent
from proxy.shell.waiting import Signal
from proxy.tally import PageTally
from proxy.wire import FRAME_HEADER_BYTES, Codec

_AHEAD = 2  # frames in the line beyond one a chain: one that is planned, one that waits to be sent


@dataclass(slots=True, eq=False)
class Job:
    """A frame that is being made.

    Args:
        half: whose stream it is of.
        claim: its place.
        whole: 64 bytes for a header, then the stream bytes.
        owner: what those lie in; None for bytes of their own.
        spans: what the stream bytes are; None: they are sent as they are.
        regime: how much work it gets.
        last: whether it is END, which has no stream bytes.
    """

    half: SendHalf
    claim: Claim
    whole: memoryview
    owner: Lent | None
    spans: Spans | None
    regime: Regime
    last: bool = False
    digest: bytes = b""
    plan: Plan | None = None
    frame: memoryview = field(default_factory=lambda: memoryview(b""))
    plan_seconds: float = 0.0
    press_seconds: float = 0.0
    ready: bool = False


class EncodingLine:
    """The encoding line of one session.

    Args:
        session: it counts and numbers.
        encoder: the page engine's half.
        adapter: chooses how much work a frame gets.
        chains: threads that compress.
        stored: where what the frames bring is recorded, if anywhere.
        send: puts a frame on its way.
        fail: told of what cannot be made good.
        wake: called when the line has room again, or has become idle.
    """

    def __init__(
        self,
        session: Session,
        encoder: Encoder,
        adapter: Adapter,
        chains: int,
        *,
        stored: Stored | None,
        send: Callable[[Outgoing], Awaitable[None]],
        fail: Callable[[BaseException], None],
        wake: Callable[[], None],
    ) -> None:
        self._session, self._encoder, self.adapter = session, encoder, adapter
        self._send, self._fail, self._wake = send, fail, wake
        self._stored = stored
        self._loop = asyncio.get_running_loop()
        self._planner = ThreadPoolExecutor(1, "plan")
        self._pressers = [ThreadPoolExecutor(1, f"press {chain}") for chain in range(chains)]
        self._jobs: deque[Job] = deque()
        self._moved = Signal()
        self._borrowed: dict[int, Mapping[int, bytes]] = {}
        self._under_way: dict[int, Departure] = {}
        self._room = chains + _AHEAD
        self._closed = False
        self._sending = self._behind = self._waits = False
        self.plain_bytes = 0
        """Of frames in the line that are not encoded: the network has them to carry as well as those in flight."""
        self.tally = PageTally()

    # ---- on the loop

    @property
    def idle(self) -> bool:
        """Whether nothing is in the line."""
        return not self._jobs

    @property
    def full(self) -> bool:
        """Whether there is no room for one more."""
        return len(self._jobs) >= self._room

    def put(self, job: Job) -> None:
        """Let a frame in; it is sent after all that came before."""
        self._jobs.append(job)
        self.plain_bytes += 0 if job.spans is not None else job.claim.raw_bytes
        self._planner.submit(self._guarded, self._plan, job)

    async def run(self) -> None:
        """Send what the line brings forth, until cancelled."""
        while True:
            while not self._jobs or not self._jobs[0].ready:
                await self._moved.wait()
            job = self._jobs[0]
            claim, body = job.claim, 0 if job.last else len(job.frame) - FRAME_HEADER_BYTES
            now = self._loop.time()
            departure = self._session.flight.depart(body, now, raw=claim.raw_bytes, order=claim.cache_order)
            job.half.departed(departure)
            if not job.last:
                self.left(claim.cache_order, body)
            self._sending = True
            self._tell_waiting()
            await self._send(Outgoing(claim.cache_order, job.half.channel, job.frame, job.owner))
            self._sending = False
            self._tell_waiting()
            if not job.last:
                self._account(job, body)
            self._jobs.popleft()
            self.plain_bytes -= 0 if job.spans is not None else claim.raw_bytes
            self._moved.wake()
            self._wake()

    def behind(self, is_behind: bool) -> None:
        """Whether a hypervisor is not read because the network is behind."""
        self._behind = is_behind
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        waits = self._sending or self._behind
        if waits is not self._waits:
            self._waits = waits
            self.adapter.waiting(waits, self._loop.time())

    def left(self, order: int, body: int) -> None:
        """A frame leaves, by the line or past it."""
        self._under_way[order] = self.adapter.sent(FRAME_HEADER_BYTES + body, self._loop.time())

    def borrowed(self, order: int) -> Mapping[int, bytes]:
        """Stored pages that a frame not acknowledged yet refers to, by ordinal."""
        return self._borrowed.get(order, {})

    def acknowledged(self, order: int) -> None:
        """A frame has been written onward: it will never be asked about again."""
        self._borrowed.pop(order, None)
        departure = self._under_way.pop(order, None)
        if departure is not None:
            self.adapter.acknowledged(departure, self._loop.time())

    def close(self) -> None:
        """Nothing more is wanted of the line."""
        self._closed = True
        for pool in (self._planner, *self._pressers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _account(self, job: Job, body: int) -> None:
        raw, plan = job.claim.raw_bytes, job.plan
        self.tally.add(None if plan is None else plan.counts, raw, body, job.plan_seconds + job.press_seconds)
        if plan is not None:
            self.tally.delta_bytes += plan.delta_bytes
            other = plan.header.other + WORD_BYTES * plan.header.words
            self.adapter.encoded(
                Encoded(
                    job.regime,
                    raw_bytes=raw,
                    new_bytes=PAGE_BYTES * plan.header.new + other,
                    packed_bytes=plan.delta_bytes + plan.literal_bytes + other,
                    body_bytes=body,
                    plan_seconds=job.plan_seconds,
                    press_seconds=job.press_seconds,
                )
            )

    def _done(self, job: Job) -> None:
        if job.plan is not None and job.plan.borrowed:
            self._borrowed[job.claim.cache_order] = job.plan.borrowed
        job.ready = True
        self._moved.wake()

    # ---- beside it

    def _guarded(self, work: Callable[[Job], None], job: Job) -> None:
        try:
            if not self._closed:
                work(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the session must hear of it
            self._on_loop(self._fail, error)

    def _on_loop(self, call: Callable[..., None], argument: object) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call, argument)

    def _plan(self, job: Job) -> None:
        if job.last:
            job.frame = memoryview(job.half.end_frame(job.claim))
            self._on_loop(self._done, job)
            return
        began = perf_counter()
        raw = job.whole[FRAME_HEADER_BYTES:]
        job.digest = job.half.hash(raw)
        if job.spans is None:
            job.half.head_into(job.whole, job.claim, Codec.OPAQUE, len(raw), job.digest)
            job.frame = job.whole
            job.plan_seconds = perf_counter() - began
            self._on_loop(self._done, job)
            return
        job.plan = self._encoder.plan(raw, job.spans, job.regime)
        job.plan_seconds = perf_counter() - began
        if self._stored is not None:
            self._stored.record(raw, job.plan.pfns, job.plan)
        if job.owner is not None:
            job.owner.release()  # the plan has what it needs
            job.owner = None
        self._pressers[job.plan.chain].submit(self._guarded, self._press, job)

    def _press(self, job: Job) -> None:
        began = perf_counter()
        if job.plan is None:
            raise RuntimeError("a frame was pressed before it was planned")
        frame = self._encoder.press(job.plan, prefix=FRAME_HEADER_BYTES)
        if frame is None:
            raise RuntimeError("a frame without pages went into the line to be encoded")
        job.half.head_into(frame, job.claim, Codec.PAGES, len(frame) - FRAME_HEADER_BYTES, job.digest)
        job.frame = frame
        job.press_seconds = perf_counter() - began
        self._on_loop(self._done, job)

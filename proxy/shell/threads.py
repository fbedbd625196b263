"""A lane with two threads of its own: one seals and sends, one receives and opens.

Reading a hypervisor and hashing what it says is the loop's work; sealing, opening and the network's copies go on beside
it, so that a session uses more than one core. The calls that do the work release the interpreter's lock. Threads and
loop meet in two queues only: jobs one way, opened records the other.
"""

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from crypto.errors import CryptoError
from crypto.records import HEADER_BYTES, RecordType
from proxy.errors import PeerLost, RelayError
from proxy.limits import DRAIN_SECONDS_MAX, LANE_DEPTH
from proxy.shell.lane import Lane, Record, parts_of

_DISCARD_BYTES = 64 * 1024


@dataclass(slots=True)
class _Job:
    """Something to seal and send; ``done`` is called on the loop, with what went wrong."""

    kind: RecordType
    payload: memoryview
    done: Callable[[BaseException | None], None]


class ThreadedLane(Lane):
    """A lane whose hello was exchanged by the loop, and which ``start`` gives its threads."""

    threaded = True
    _started = False

    def start(self) -> None:
        """See ``Lane.start``."""
        self._started = True
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._ready: deque[Record | BaseException] = deque()
        self._signalled = False
        self._published = (self.received_bytes, self._filled, self._missing_bytes)
        self._dropped = self._closing = False
        self._ended = asyncio.Event()
        self._alive = 2
        self._lock = threading.Lock()
        self._release()
        self._sock.setblocking(True)
        for work in (self._send_forever, self._receive_forever):
            threading.Thread(target=self._run, args=(work,), name=f"lane {self.id}", daemon=True).start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self._lock:
                self._alive -= 1
                last = self._alive == 0
            if last:
                self._sock.close()  # not before: a number that is used again would be somebody else's connection
                self._on_loop(self._ended.set)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call, *arguments)

    # ---- sending

    @property
    def free(self) -> bool:
        """See ``Lane.free``: while one thing is on its way the next can be handed over already."""
        return self.outstanding < LANE_DEPTH

    def post_frame(self, frame: memoryview, done: Callable[[BaseException | None], None]) -> None:
        """See ``Lane.post_frame``."""
        self._post(_Job(RecordType.FRAME, frame, done))

    def _post(self, job: _Job) -> None:
        if self._closing:
            self._loop.call_soon(job.done, PeerLost(f"lane {self.id} is closed"))
        else:
            self._jobs.put(job)

    async def send(self, kind: RecordType, payload: bytes = b"") -> None:
        """See ``Lane.send``."""
        if not self._started:
            await super().send(kind, payload)
            return
        sent: asyncio.Future[None] = self._loop.create_future()

        def done(error: BaseException | None) -> None:
            if sent.done():
                return
            if error is None:
                sent.set_result(None)
            else:
                sent.set_exception(error)

        self._post(_Job(kind, memoryview(payload), done))
        await sent

    def _send_forever(self) -> None:
        while (job := self._jobs.get()) is not None:
            error: BaseException | None = None
            try:
                for flags, part in parts_of(job.kind, job.payload):
                    total = self._sealer.seal_into(job.kind, flags, part, self._sealed)
                    self.sent_bytes += total
                    self._sock.sendall(self._sealed[:total])
            except OSError as broken:
                error = PeerLost(f"lane {self.id} broke ({broken.strerror})")
            except Exception as bug:  # noqa: BLE001 - whatever it is, the session must hear of it
                error = bug
            self._on_loop(job.done, error)

    # ---- receiving

    @property
    def position(self) -> tuple[int, int, int]:
        """See ``Lane.position``: three numbers of one moment."""
        return self._published if self._started else super().position

    async def receive(self) -> Record:
        """See ``Lane.receive``."""
        if not self._started:
            return await super().receive()
        while not self._ready:
            self.idle = True
            self.on_idle()
            await self._receive_gate.wait()
        self.idle = False
        came = self._ready.popleft()
        if isinstance(came, BaseException):
            self._ready.appendleft(came)  # for whoever asks again
            raise came
        return came

    def _bring(self, what: Record | BaseException) -> None:
        self._ready.append(what)
        if not self._signalled:
            self._signalled = True
            self._on_loop(self._wake)

    def _wake(self) -> None:
        self._signalled = False
        self._receive_gate.wake()

    def _receive_forever(self) -> None:
        try:
            while True:
                record = self._receive_one()
                self._bring(record)
                if record.header.type is RecordType.FINAL:
                    break
            while self._sock.recv(_DISCARD_BYTES):
                pass
        except (CryptoError, RelayError) as error:
            self._bring(error)
        except OSError as broken:
            self._bring(PeerLost(f"lane {self.id} broke ({broken.strerror})"))
        except Exception as bug:  # noqa: BLE001 - whatever it is, the session must hear of it
            self._bring(bug)

    def _receive_one(self) -> Record:
        while self._filled < HEADER_BYTES:
            self._read(HEADER_BYTES)
        header = self._opener.parse_header(self._incoming[:HEADER_BYTES])
        end = HEADER_BYTES + header.body_bytes
        most = end if header.type is RecordType.FINAL else end + HEADER_BYTES
        while self._filled < end:
            self._read(most)
        record = self._open(header, end)
        self._publish()
        return record

    def _read(self, most: int) -> None:
        got = self._sock.recv_into(self._incoming[self._filled : most])
        if got == 0:
            raise PeerLost(f"lane {self.id} ended without FINAL")
        self._filled += got
        self.received_bytes += got
        self._publish()

    def _publish(self) -> None:
        self._published = (self.received_bytes, self._filled, self._missing_bytes)

    # ---- the end

    async def close(self) -> None:
        """See ``Lane.close``."""
        if not self._started:
            await super().close()
            return
        self._end_jobs()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS_MAX):
                await self._ended.wait()
        self.drop()

    def drop(self) -> None:
        """See ``Lane.drop``; the threads end by themselves, and the last one closes the socket."""
        if not self._started:
            super().drop()
            return
        if self._dropped:
            return
        self._dropped = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._end_jobs()
        self._receive_gate.wake()

    def _end_jobs(self) -> None:
        """What was posted is still done, or fails; nothing more can be."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)

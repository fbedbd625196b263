"""Work that waits for the disk: a bounded queue, and one thread that does it. Whoever puts work in never waits."""

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread

from chunking.limits import STORE_JOBS_MAX, STORE_QUEUE_BYTES_MAX

Job = Callable[[], None]


class WriteBehind:
    """Jobs in the order they came, done one after the other by a thread that is started with the first.

    Args:
        bytes_max: of pages that may wait at once.
        jobs_max: jobs that may wait at once.
    """

    def __init__(self, bytes_max: int = STORE_QUEUE_BYTES_MAX, jobs_max: int = STORE_JOBS_MAX) -> None:
        self._bytes_max = bytes_max
        self._jobs_max = jobs_max
        self._jobs: deque[tuple[int, Job]] = deque()
        self._bytes = 0
        self._busy = False
        self._ended = False
        self._changed = Condition()
        self._thread: Thread | None = None

    def room(self, size: int) -> bool:
        """Whether a job of so many bytes would be taken now."""
        with self._changed:
            return self._fits(size)

    def offer(self, size: int, job: Job) -> bool:
        """Put in a job that holds ``size`` bytes, if there is room for it; says whether there was."""
        with self._changed:
            if not self._fits(size):
                return False
            self._put(size, job)
        return True

    def must(self, job: Job) -> None:
        """Put in a job that holds no pages, room or no room: a session has a handful of these."""
        with self._changed:
            self._put(0, job)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all is done, or for so long; says whether all is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def end(self, seconds: float | None = None) -> bool:
        """Take no more, wait as ``wait`` does, and let the thread end; says whether all was done."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        done = self.wait(seconds)
        if done and self._thread is not None:
            self._thread.join(seconds)
        return done

    def _fits(self, size: int) -> bool:
        full = self._bytes + size > self._bytes_max or len(self._jobs) >= self._jobs_max
        return not full and not self._ended

    def _put(self, size: int, job: Job) -> None:
        self._jobs.append((size, job))
        self._bytes += size
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._work, name="korora-store", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._ended)
                if not self._jobs:
                    self._thread = None
                    return
                size, job = self._jobs.popleft()
                self._busy = True
            try:
                job()
            finally:
                del job  # it holds pages
                with self._changed:
                    self._bytes -= size
                    self._busy = False
                    self._changed.notify_all()

"""Memory of a process that carries sessions: as much as this host can spare, and given back once one is over."""

import asyncio
import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger("korora")

AVAILABLE_SHARE: Final = 4  # of what is available a page cache gets one part; within one host a machine fills two

_GC_ALLOCATIONS: Final = 10_000  # the default 700 costs 3 % of a relay's time
_MIB: Final = 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_ALLOCATOR: Final = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 32 * _MIB), (_M_TRIM_THRESHOLD, 128 * _MIB))
"""For mallopt(3): one arena for all threads, which keeps what is freed until it is trimmed."""

# None where the C library has no such calls: musl gives back by itself.
_LIBC: Final = ctypes.CDLL(None) if sys.platform == "linux" else None
_TRIM: Final[Callable[[int], int] | None] = getattr(_LIBC, "malloc_trim", None)
_OPTION: Final[Callable[[int, int], int] | None] = getattr(_LIBC, "mallopt", None)


def prepare() -> None:
    """Set up this process for sessions, before its loop runs.

    What is loaded by now lives as long as the process, and a session makes no cycles worth looking for often.

    Threads share one arena: most is allocated under the interpreter's lock, so arenas of their own gain nothing,
    and of those malloc_trim(3) gives back what is free in the middle and keeps what is free at the end, several MiB in
    each. While a session lives nothing is given back, since its next frame would have to fault it in again.
    """
    gc.freeze()
    gc.set_threshold(_GC_ALLOCATIONS)
    if _OPTION is not None:
        for option, value in _ALLOCATOR:
            _OPTION(option, value)


def give_back_soon() -> None:
    """Give back, beside the loop and in its next turn, what a session held: last thing of whoever accounts for it.

    Those who carried the session name it until they return, which they do in this turn. Until then its buffers, some
    10 MiB, could not be collected, and would stand there until the next session's end.
    """
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.run_in_executor, None, _give_back)


def _give_back() -> None:
    """Collect what sessions leave, and return what is free.

    A session's runner, channels and lanes know one another and hold tens of MiB of buffers; and what they allocated
    beside larger things stays with glibc's arena, a little more with every session.
    """
    gc.collect()
    if _TRIM is not None:
        _TRIM(0)


def affordable(cache_bytes: int, meminfo: Path = Path("/proc/meminfo")) -> int:
    """As much of a page cache as this host can spare now: a quarter of what is available, if that is less.

    A dom0 may have half a gigabyte in all. The kernel would refuse a larger mapping, or give it and then kill.

    Args:
        cache_bytes: wanted; 0 stays 0.
        meminfo: of proc(5).
    """
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    spare = cache_bytes if found is None else int(found[1]) * 1024 // AVAILABLE_SHARE
    if spare >= cache_bytes:
        return cache_bytes
    log.info("the page cache is made smaller: memory is short", wanted_bytes=cache_bytes, given_bytes=spare)
    return spare

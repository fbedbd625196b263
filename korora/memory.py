"""Memory: as much as this host can spare, and given back to it once a session is over."""

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

# None where the C library has no such call: musl gives back by itself.
_TRIM: Final[Callable[[int], int] | None] = (
    getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
)


def give_back() -> None:
    """Collect what sessions leave, and return what is free.

    A session's runner, channels and lanes know one another and hold tens of MiB of buffers; and what its threads had
    allocated stays with glibc's arena of each thread, a little more with every session.
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

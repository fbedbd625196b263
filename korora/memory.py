"""Memory given back to the system once a session is over."""

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Final

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

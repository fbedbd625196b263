"""What hosts' TPMs last said of their clocks: one that has gone back since is an older state of itself, or a copy.

Kept in the state directory, a file a host, so that a relay that was started again, and all its processes, know it.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import msgspec
import structlog

from crypto.attestation.structures import Clock
from crypto.errors import ReferenceInvalid
from crypto.files import make_private_directory, read_bounded, write_private

log = structlog.get_logger("korora.attestation")

FOLDER: Final = "attested"
CLOCK_BYTES_MAX: Final = 512  # a key's name and three numbers
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which key has said it, and the counts; see ``Clock``."""

    ak: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{4,140}\Z")]
    resets: _Count
    restarts: _Count
    milliseconds: _Count

    @property
    def clock(self) -> Clock:
        return Clock(self.milliseconds, self.resets, self.restarts, safe=True)


class Clocks:
    """Of all peers.

    Args:
        state: the relay's state directory; None: they are remembered by this process alone.
    """

    def __init__(self, state: Path | None) -> None:
        self._folder = None if state is None else state / FOLDER
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def known(self, host: str, ak: str) -> Clock | None:
        """The latest that the key ``ak`` of that host has said; None where it was never seen.

        Raises:
            ReferenceInvalid: what is kept cannot be read.
        """
        with self._turn():
            seen = self._read(host)
        return seen.clock if seen is not None and seen.ak == ak else None

    def saw(self, host: str, ak: str, clock: Clock) -> None:
        """Remember the later of that and what is known; of another key than before, that.

        Raises:
            ReferenceInvalid: it cannot be kept.
        """
        with self._turn():
            seen = self._read(host)
            if seen is not None and seen.ak == ak and seen.clock.counts >= clock.counts:
                return
            now = _Seen(ak, clock.resets, clock.restarts, clock.milliseconds)
            # After a crash of this machine the milliseconds may be older; its disk is waited for where more changes.
            durably = seen is None or (seen.ak, *seen.clock.counts[:2]) != (ak, *clock.counts[:2])
            self._write(host, now, durably=durably)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One thread at a time, and one process."""
        with self._lock:
            if self._folder is None:
                yield
                return
            try:
                make_private_directory(self._folder)
                descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)  # for as long as it takes to read and write one file
                    yield
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise ReferenceInvalid(
                    f"cannot keep {self._folder}: {error.strerror}", "see to its owner, mode and disk"
                ) from None

    def _read(self, host: str) -> _Seen | None:
        if self._folder is None:
            return self._seen.get(host)
        path = self._folder / host
        try:
            return msgspec.json.decode(read_bounded(path, CLOCK_BYTES_MAX)[0], type=_Seen)
        except FileNotFoundError:
            return None
        except (ValueError, msgspec.DecodeError) as error:
            # What a crash of this machine leaves may be empty; who could have emptied it could have removed it, too.
            log.warning("a TPM's clock is not remembered", peer=host, reason=str(error))
            return None

    def _write(self, host: str, seen: _Seen, *, durably: bool) -> None:
        if self._folder is None:
            self._seen[host] = seen
        else:
            write_private(self._folder / host, msgspec.json.encode(seen), durably=durably)

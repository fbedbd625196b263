"""The stream to look at: a file, a compressed file, or standard input, in pieces of bounded size."""

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

import zstandard

from korora.inspect.limits import PIECE_BYTES, ZSTD_WINDOW_BYTES_MAX
from proxy.errors import ConfigurationError

STDIN: Final = Path("-")
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


@dataclass(slots=True)
class Source:
    """A stream that is being read.

    Args:
        name: for people.
        size_bytes: of the file as it lies there; None where nobody knows, as of a pipe.
        compressed: whether zstd is undone on the way.
        read_bytes: of the file so far.
        broken: why reading ended before the end of the file, in words; empty while it did not.
    """

    name: str
    size_bytes: int | None
    compressed: bool
    _raw: "_Counted"
    _stream: _Readable
    broken: str = ""

    @property
    def read_bytes(self) -> int:
        """Bytes of the file read so far, before decompression."""
        return self._raw.count

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes of the stream, fewer only at its end."""
        parts: list[bytes] = []
        while size > 0 and not self.broken:
            try:
                part = self._stream.read(size)
            except (OSError, zstandard.ZstdError) as error:
                self.broken = f"{self.name}: {getattr(error, 'strerror', None) or error}"
                break
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open ``path`` (``-`` is standard input), compressed by zstd or not.

    Raises:
        ConfigurationError: it cannot be opened or read, or is no file.
    """
    if path == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigurationError("no stream on standard input", "give a FILE, or let a command write into `-`")
        yield _source("standard input", None, sys.stdin.buffer)
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror or error}", "check the path and its permissions") from error
    with file:
        mode = os.fstat(file.fileno())
        yield _source(str(path), mode.st_size if stat.S_ISREG(mode.st_mode) else None, file)


def _source(name: str, size_bytes: int | None, file: BinaryIO) -> Source:
    raw = _Counted(file)
    try:
        head = raw.peek(len(_ZSTD_MAGIC))
    except OSError as error:
        raise ConfigurationError(f"{name}: {error.strerror or error}", "check the path and its permissions") from error
    if head != _ZSTD_MAGIC:
        return Source(name, size_bytes, compressed=False, _raw=raw, _stream=raw)
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    # Its stub wants a whole IO; it calls read() and nothing else.
    stream = decompressor.stream_reader(raw, read_size=PIECE_BYTES, read_across_frames=True)  # type: ignore[arg-type]
    return Source(name, size_bytes, compressed=True, _raw=raw, _stream=stream)


class _Counted(io.RawIOBase):
    """Counts what is read, and can look at the first bytes without a seek."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._ahead = b""
        self.count = 0

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, which stay there."""
        while len(self._ahead) < size:
            more = self._file.read(size - len(self._ahead))
            if not more:
                break
            self._ahead += more
        return self._ahead[:size]

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        data, self._ahead = self._ahead, b""
        if not data:
            data = self._file.read(size)
        self.count += len(data)
        return data

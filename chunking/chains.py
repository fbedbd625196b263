"""Context chains: zstd streams that live through many frames, flushed at the end of each, mirrored at the decoder.

A frame belongs to one chain. Within a chain frames are compressed, and decompressed, one after the other; chains know
nothing of each other, so that they may run in parallel. Each has two streams, one of columns and one of literals.
"""

from typing import Final, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from chunking.errors import FrameMalformed
from chunking.limits import META_WINDOW_LOG, META_WINDOW_LOG_MAX, ZSTD_WINDOW_LOG_MAX
from chunking.regime import Regime


class Effort(NamedTuple):
    """How hard zstd tries. What is not given follows from the level.

    Args:
        level: zstd's compression level.
        window_log: of how many bytes back it may find repetitions, as a power of two.
        tuned: parameters of zstd that differ from the level's.
    """

    level: int
    window_log: int
    tuned: tuple[tuple[str, int], ...] = ()

    def compressor(self, *, content_size: bool) -> zstandard.ZstdCompressor:
        """A compressor that tries this hard."""
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level, window_log=self.window_log, write_content_size=content_size, **dict(self.tuned)
        )
        return zstandard.ZstdCompressor(compression_params=parameters)


# Nearly what level 12 finds, in the time of level 10 and with far less memory (ADR 10).
_THOROUGH: Final = (("hash_log", 21), ("search_log", 5), ("min_match", 4))
_THOROUGH_META: Final = (("hash_log", 18), ("search_log", 5), ("min_match", 4))

_QUICK_META: Final = Effort(1, META_WINDOW_LOG)
META_EFFORTS: Final = {
    Regime.DEDUP: _QUICK_META,
    Regime.DELTA: _QUICK_META,
    Regime.FAST: _QUICK_META,
    Regime.LIGHT: _QUICK_META,
    Regime.FIRM: Effort(3, META_WINDOW_LOG),
    Regime.BEST: Effort(10, META_WINDOW_LOG_MAX, _THOROUGH_META),
}
LITERAL_EFFORTS: Final = {
    Regime.FAST: Effort(-3, 19),  # quicker levels save little time and leave a third more (ADR 10)
    Regime.LIGHT: Effort(1, 19),
    Regime.FIRM: Effort(3, 21),
    Regime.BEST: Effort(10, 24, _THOROUGH),
}


class CompressStream:
    """One zstd stream at the source. Another effort starts it anew."""

    def __init__(self) -> None:
        self._effort: Effort | None = None
        self._stream: zstandard.ZstdCompressionObj | None = None

    def compress(self, data: memoryview | bytes, effort: Effort) -> tuple[bytes, bytes, bool]:
        """The next block of the stream: two pieces that belong together, and whether the stream started anew."""
        reset = self._stream is None or effort != self._effort
        if reset:
            self._stream = effort.compressor(content_size=False).compressobj()
            self._effort = effort
        stream = self._stream
        if stream is None:
            raise RuntimeError("a stream that has not started")
        return stream.compress(data), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK), reset


class CompressAlone:
    """Compresses pieces that stand on nothing before them. Its tables are made once an effort."""

    def __init__(self) -> None:
        self._effort: Effort | None = None
        self._compressor: zstandard.ZstdCompressor | None = None

    def compress(self, data: memoryview | bytes, effort: Effort) -> bytes:
        """A whole zstd frame of these bytes, with their number in its header."""
        if self._compressor is None or effort != self._effort:
            self._compressor, self._effort = effort.compressor(content_size=True), effort
        return self._compressor.compress(data)


class _Exhausted(Exception):
    """The decompressor wants bytes that the frame does not have. It stays usable for the next frame."""


class _Feed:
    """The decompressor's source: each frame's piece once, then ``_Exhausted``; an end of file would be final to it."""

    def __init__(self) -> None:
        self.piece: memoryview | bytes | None = None

    def read(self, _size: int) -> memoryview | bytes:
        piece, self.piece = self.piece, None
        if not piece:
            raise _Exhausted
        return piece


class DecompressStream:
    """One zstd stream at the destination. Output never exceeds what the caller's counts allow.

    Args:
        window_log: the largest window it grants the peer, as a power of two of bytes.
    """

    def __init__(self, window_log: int = ZSTD_WINDOW_LOG_MAX) -> None:
        self._window_bytes = 1 << window_log
        self._feed = _Feed()
        self._reader: zstandard.ZstdDecompressionReader | None = None

    def decompress(self, piece: memoryview, size: int, *, reset: bool) -> NDArray[np.uint8]:
        """Decompress one frame's piece of the stream.

        Args:
            piece: all compressed bytes of the frame's part.
            size: bytes that it must decompress to, neither more nor fewer.
            reset: the stream starts anew.

        Raises:
            FrameMalformed: no zstd, another size, or too large a window.
        """
        if reset:
            self._feed = _Feed()
            decompressor = zstandard.ZstdDecompressor(max_window_size=self._window_bytes)
            # Its stub wants a whole IO; it calls read() and nothing else.
            self._reader = decompressor.stream_reader(self._feed, read_across_frames=False)  # type: ignore[arg-type]
        if self._reader is None:
            raise FrameMalformed("a chain's stream goes on that never started")
        self._feed.piece = piece
        # Room for one byte more: what would overflow shows, and nothing beyond it is ever made.
        out, made = np.empty(size + 1, np.uint8), 0
        try:
            while made <= size:
                more = self._reader.readinto1(out[made:])
                if not more:
                    raise FrameMalformed("a stream that has ended goes on")
                made += more
        except zstandard.ZstdError as error:
            raise FrameMalformed(f"no zstd stream: {error}") from error
        except _Exhausted:
            pass
        if made != size:
            raise FrameMalformed(f"{'more' if made > size else 'fewer'} bytes than the {size} that the counts say")
        return out[:size]

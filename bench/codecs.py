"""What turns a stream into fewer bytes, in one process and one thread: our page engine by regime, and its peers.

Each codec carries a stream to a list of bodies and back, and every byte that a pair of hosts would have to exchange is
counted: headers of frames and records for ours, lengths and names of blocks for the peers. Ours digest the stream with
BLAKE3 when they encode, as the relay does; of the peers those that deduplicate digest each chunk with it (the tools
themselves use slower ones), the others nothing. All digest what they decode.

A codec remembers what passed through it, so that two streams in turn are a guest after another of its image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import zstandard
from blake3 import blake3
from pyfastcdc import FastCDC

from bench.corpus import pieces
from bench.processes import BenchError, KiB
from chunking.decoder import Decoder, Unpressed
from chunking.encoder import Encoder
from chunking.limits import CACHE_BYTES_DEFAULT
from chunking.regime import Regime
from crypto.records import OVERHEAD_BYTES
from proxy.limits import FRAME_BYTES_MAX
from proxy.wire import FRAME_HEADER_BYTES

MiB: Final = 1024 * KiB
BLOCK_BYTES: Final = MiB  # of the peers that compress block by block
LENGTH_BYTES: Final = 4  # before a block
NAME_BYTES: Final = 32  # of a chunk
AHEAD: Final = 2  # frames under way beyond one a chain, as in the relay's lines


class Codec(Protocol):
    """One way to make a stream smaller."""

    def encode(self, data: memoryview) -> int:
        """Encode a whole stream and keep it; the bytes on the wire."""

    def decode(self) -> bytes:
        """Take back what was encoded last; its BLAKE3."""


@dataclass(frozen=True, slots=True)
class _Frame:
    raw: memoryview
    body: memoryview | None  # None: as it is

    @property
    def wire_bytes(self) -> int:
        size = FRAME_HEADER_BYTES + len(self.raw if self.body is None else self.body)
        return size + OVERHEAD_BYTES


class Pages:
    """Our page engine in one regime.

    Args:
        regime: RAW carries frames as they are.
        chains: context chains; with more than one, planning and each chain have a thread of their own.
        cache_bytes: of the page cache.
    """

    def __init__(self, regime: Regime, *, chains: int = 1, cache_bytes: int = CACHE_BYTES_DEFAULT) -> None:
        self._regime, self._chains = regime, chains
        self._encoder = Encoder(cache_bytes, chains)
        self._decoder = Decoder(cache_bytes)
        self._frames: list[_Frame] = []

    def encode(self, data: memoryview) -> int:
        """See ``Codec``."""
        hasher = blake3()
        frames: list[_Frame] = []
        self._frames = frames
        if self._chains == 1 or self._regime is Regime.RAW:
            for raw, spans in pieces(data):
                hasher.update(raw)
                hasher.digest()
                body = None
                if self._regime is not Regime.RAW:
                    body = self._encoder.press(self._encoder.plan(raw, spans, self._regime))
                frames.append(_Frame(raw, body))
        else:
            self._encode_in_threads(data)
        return sum(frame.wire_bytes for frame in self._frames)

    def _encode_in_threads(self, data: memoryview) -> None:
        hasher, waiting = blake3(), list[tuple[memoryview, Future[memoryview | None]]]()
        with _threads(self._chains) as press:
            for raw, spans in pieces(data):
                hasher.update(raw)
                hasher.digest()
                plan = self._encoder.plan(raw, spans, self._regime)
                waiting.append((raw, press[plan.chain].submit(self._encoder.press, plan)))
                if len(waiting) >= self._chains + AHEAD:
                    first, body = waiting.pop(0)
                    self._frames.append(_Frame(first, body.result()))
            self._frames += [_Frame(raw, body.result()) for raw, body in waiting]

    def decode(self) -> bytes:
        """See ``Codec``."""
        hasher, out = blake3(), memoryview(bytearray(FRAME_BYTES_MAX))
        if self._chains > 1:
            self._decode_in_threads(hasher, out)
            return hasher.digest()
        for frame in self._frames:
            raw: memoryview = frame.raw
            if frame.body is not None:
                raw = out[: len(frame.raw)]
                self._decoder.chain_of(frame.body)
                self._decoder.rebuild(self._decoder.unpress(frame.body, len(raw)), raw)
            hasher.update(raw)
            hasher.digest()
        return hasher.digest()

    def _decode_in_threads(self, hasher: blake3, out: memoryview) -> None:
        decoder = self._decoder
        with _threads(self._chains) as unpress:

            def begin(frame: _Frame) -> Future[Unpressed] | None:
                if frame.body is None:
                    return None
                chain = decoder.chain_of(frame.body)
                return unpress[chain].submit(decoder.unpress, frame.body, len(frame.raw))

            ahead = self._chains + AHEAD
            waiting = [begin(frame) for frame in self._frames[:ahead]]
            for number, frame in enumerate(self._frames):
                unpressed, raw = waiting.pop(0), frame.raw
                if number + ahead < len(self._frames):
                    waiting.append(begin(self._frames[number + ahead]))
                if unpressed is not None:
                    raw = out[: len(frame.raw)]
                    decoder.rebuild(unpressed.result(), raw)
                hasher.update(raw)
                hasher.digest()


@contextmanager
def _threads(count: int) -> Iterator[list[ThreadPoolExecutor]]:
    pools = [ThreadPoolExecutor(1) for _ in range(count)]
    try:
        yield pools
    finally:
        for pool in pools:
            pool.shutdown()


class ZstdBlocks:
    """zstd, each block of 1 MiB by itself.

    Args:
        level: of zstd.
    """

    def __init__(self, level: int) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._blocks: list[bytes] = []

    def encode(self, data: memoryview) -> int:
        """See ``Codec``."""
        compress = self._compressor.compress
        self._blocks = [compress(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
        return sum(LENGTH_BYTES + len(block) for block in self._blocks)

    def decode(self) -> bytes:
        """See ``Codec``."""
        decompressor, hasher = zstandard.ZstdDecompressor(), blake3()
        for block in self._blocks:
            hasher.update(decompressor.decompress(block))
        return hasher.digest()


class Chunks:
    """Content-defined chunks, each sent once, zstd -3: how borg and restic store.

    Args:
        least, mean, most: bytes of a chunk.
        level: of zstd.
    """

    def __init__(self, least: int, mean: int, most: int, *, level: int = 3) -> None:
        self._cutter = FastCDC(mean, min_size=least, max_size=most)
        self._compressor = zstandard.ZstdCompressor(level=level)
        self._known: dict[bytes, bytes] = {}
        self._names: list[bytes] = []

    def encode(self, data: memoryview) -> int:
        """See ``Codec``."""
        wire, names, known = 0, self._names, self._known
        names.clear()
        for chunk in self._cutter.cut_buf(data):
            content = data[chunk.offset : chunk.offset + chunk.length]
            name = blake3(content).digest()
            names.append(name)
            wire += NAME_BYTES
            if name not in known:
                packed = self._compressor.compress(content)
                known[name] = packed
                wire += LENGTH_BYTES + len(packed)
        return wire

    def decode(self) -> bytes:
        """See ``Codec``. A chunk that comes again is decompressed again: the stores keep it compressed."""
        decompressor, hasher = zstandard.ZstdDecompressor(), blake3()
        for name in self._names:
            hasher.update(decompressor.decompress(self._known[name]))
        return hasher.digest()


@dataclass(frozen=True, slots=True)
class Method:
    """A codec to be measured.

    Args:
        name: in every table.
        says: for people.
        make: a fresh codec that remembers nothing.
        slow: measured once a run: its turn would take the time of all others.
    """

    name: str
    says: str
    make: Callable[[], Codec]
    slow: bool = False


RAW, FAST, BEST = "raw", "pages", "best"
ZSTD_1, ZSTD_3, CDC_SMALL, CDC_LARGE = "zstd -1", "zstd -3", "cdc 16 KiB", "cdc 1 MiB"


def _regime(regime: Regime) -> Callable[[], Codec]:
    return lambda: Pages(regime)


METHODS: Final = {
    method.name: method
    for method in (
        Method(RAW, "BLAKE3 alone, as opaque frames have it", _regime(Regime.RAW)),
        Method("dedup", "zero pages and references, the rest as it is", _regime(Regime.DEDUP)),
        Method("delta", "and deltas", _regime(Regime.DELTA)),
        Method(FAST, "regime FAST: what --encode pages does on a fast link", _regime(Regime.FAST)),
        Method("light", "regime LIGHT", _regime(Regime.LIGHT)),
        Method("firm", "regime FIRM", _regime(Regime.FIRM)),
        Method(BEST, "regime BEST: --encode best", _regime(Regime.BEST), slow=True),
        Method(ZSTD_1, "zstd -1, blocks of 1 MiB", lambda: ZstdBlocks(1)),
        Method(ZSTD_3, "zstd -3, blocks of 1 MiB", lambda: ZstdBlocks(3)),
        Method(
            CDC_SMALL,
            "content-defined chunks of 4, 16, 64 KiB (least, mean, most), each once, zstd -3",
            lambda: Chunks(4 * KiB, 16 * KiB, 64 * KiB),
        ),
        Method(
            CDC_LARGE,
            "the same of 512 KiB, 1 MiB, 8 MiB, restic's sizes",
            lambda: Chunks(512 * KiB, MiB, 8 * MiB),
        ),
    )
}
PEERS: Final = (ZSTD_1, ZSTD_3, CDC_SMALL, CDC_LARGE)


def check(digest: bytes, data: memoryview) -> None:
    """Raise BenchError unless what was decoded is what was encoded."""
    if digest != blake3(data).digest():
        raise BenchError("a stream came out otherwise than it went in")

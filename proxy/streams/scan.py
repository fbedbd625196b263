"""The hot path of QEMU's main stream: long chains of pages of one block, which lie at regular distances. Sans-IO.

Headers are read one by one until a few alike have followed each other; then the next ones are read where they must lie
if the run goes on, all at once, and believed up to the first that is none.
"""

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chunking.pages import PAGE_BYTES
from proxy.streams.facts import StreamFacts
from proxy.streams.reader import Reader

WORD_OF_PAGE: Final = 0x28  # RAM_SAVE_FLAG_PAGE | RAM_SAVE_FLAG_CONTINUE
WORD_OF_ZERO: Final = 0x22  # RAM_SAVE_FLAG_ZERO | RAM_SAVE_FLAG_CONTINUE
PAGE_STRIDE_BYTES: Final = 8 + PAGE_BYTES
ZERO_STRIDE_BYTES: Final = 8 + 1

_ALIKE: Final = 6  # headers alike before a run is tried: a try costs about as much as twenty headers
_TRY: Final = 64  # headers of the first try; each that holds is followed by one of eight times as many
_TRY_GROWTH: Final = 8
_FLAGS: Final = np.uint64(PAGE_BYTES - 1)
_ZERO: Final = np.uint64(0x02)
_PAGE_SHIFT: Final = np.uint64(12)
_WORD: Final = struct.Struct(">Q")


def scan(reader: Reader, facts: StreamFacts, block: int, block_bytes: int) -> None:
    """Pass all whole records of pages and zero pages of the current block that come next in the piece.

    Args:
        reader: stands at a record.
        block: the block's number, in its place within a PFN.
        block_bytes: its size, which no page's offset reaches.
    """
    words, at = _chain(reader, block_bytes)
    if at == reader.at:
        return
    zero = (words & _ZERO) != 0
    pfns = (words >> _PAGE_SHIFT) | np.uint64(block)
    runs = np.ones((len(words), 3), np.uint32)
    runs[0, 0] = 0
    runs[1:, 0] = zero[:-1]  # a zero page's byte is the next run's
    runs[:, 2] = ~zero
    zeros = int(np.count_nonzero(zero))
    if zeros:
        facts.count("RAM_ZERO", zeros)
        facts.pages_zero_marked += zeros
    if zeros < len(words):
        facts.count("RAM_PAGE", len(words) - zeros)
    reader.records(runs, int(zero[-1]), pfns[~zero], pfns[zero], at)


def _chain(reader: Reader, block_bytes: int) -> tuple[NDArray[np.uint64], int]:
    """The records' words, and where they end."""
    piece, at, end = reader.piece, reader.at, reader.end
    unpack = _WORD.unpack_from
    parts: list[NDArray[np.uint64]] = []
    words: list[int] = []
    last = alike = 0
    while end - at >= ZERO_STRIDE_BYTES:
        (word,) = unpack(piece, at)
        flags = word & 0xFFF
        if flags == WORD_OF_PAGE:
            stride = PAGE_STRIDE_BYTES
        elif flags == WORD_OF_ZERO:
            stride = ZERO_STRIDE_BYTES
        else:
            break
        if at + stride > end or word >= block_bytes:
            break
        words.append(word)
        at += stride
        if flags != last:
            last, alike = flags, 1
            continue
        alike += 1
        if alike == _ALIKE:
            alike = 0
            run = _run(piece[at:end], flags, stride, block_bytes)
            if len(run):
                parts += (np.array(words, np.uint64), run)
                words = []
                at += stride * len(run)
    if words:
        parts.append(np.array(words, np.uint64))
    if not parts:
        return np.empty(0, np.uint64), at
    return parts[0] if len(parts) == 1 else np.concatenate(parts), at


def _run(ahead: memoryview, flags: int, stride: int, block_bytes: int) -> NDArray[np.uint64]:
    """The words of the records of this kind that come next, each ``stride`` bytes behind the one before."""
    whole = len(ahead) // stride
    found: list[NDArray[np.uint64]] = []
    done, tried = 0, _TRY
    while done < whole:
        count = min(tried, whole - done)
        lying = np.ndarray((count,), ">u8", ahead, done * stride, (stride,))
        words = lying.astype(np.uint64)
        good = ((words & _FLAGS) == flags) & (words < block_bytes)
        length = count if good.all() else int(good.argmin())
        if length:
            found.append(words[:length])
        done += length
        if length < count:
            break
        tried *= _TRY_GROWTH
    if not found:
        return np.empty(0, np.uint64)
    return found[0] if len(found) == 1 else np.concatenate(found)

"""A small made-up guest and the stream that a hypervisor would send of it. Repeatable by seed."""

import random
import struct
from collections.abc import Iterator

PAGE = 4096
BATCH_PAGES = 64

_IMAGE_HEADER = struct.pack(">QIIHHI", 2**64 - 1, 0x58454E46, 3, 0, 0, 0)
_DOMAIN_HEADER = struct.pack("<IHHII", 1, 12, 0, 4, 17)


def record(kind: int, body: bytes) -> bytes:
    """A libxc record, padded."""
    return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)


def batch(pages: list[tuple[int, bytes]]) -> bytes:
    """A PAGE_DATA record."""
    table = b"".join(struct.pack("<Q", pfn) for pfn, _ in pages)
    return record(1, struct.pack("<II", len(pages), 0) + table + b"".join(data for _, data in pages))


class Guest:
    """Guest memory: a third zero, a third of few contents, a third of its own; it changes from round to round."""

    def __init__(self, seed: int, pages: int) -> None:
        self._dice = random.Random(seed)
        common = [self._text() for _ in range(max(1, pages // 20))]
        kinds = [bytes(PAGE), *common]
        self.memory = [self._dice.choice(kinds) if self._dice.random() < 2 / 3 else self._text() for _ in range(pages)]

    def _text(self) -> bytes:
        """A page that compresses about as guest memory does."""
        words = [self._dice.randbytes(8) for _ in range(40)]
        return b"".join(self._dice.choice(words) for _ in range(PAGE // 8))

    def touch(self, share: float) -> list[int]:
        """Change a few words of some pages; which."""
        dirty = [pfn for pfn in range(len(self.memory)) if self._dice.random() < share]
        for pfn in dirty:
            page = bytearray(self.memory[pfn])
            for _ in range(self._dice.choice((1, 5, 300))):
                at = self._dice.randrange(PAGE // 8) * 8
                page[at : at + 8] = self._dice.randbytes(8)
            self.memory[pfn] = bytes(page)
        return dirty

    def stream(self, rounds: int = 3, share: float = 0.2) -> bytes:
        """A whole libxc stream: all of the memory, then what was dirtied, round by round."""
        return b"".join(self._records(rounds, share))

    def _records(self, rounds: int, share: float) -> Iterator[bytes]:
        yield _IMAGE_HEADER + _DOMAIN_HEADER
        yield record(0x10, b"")
        for number in range(rounds):
            pfns = range(len(self.memory)) if number == 0 else self.touch(share)
            chosen = [(pfn, self.memory[pfn]) for pfn in pfns]
            for start in range(0, len(chosen), BATCH_PAGES):
                yield batch(chosen[start : start + BATCH_PAGES])
        yield record(0, b"")

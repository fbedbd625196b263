"""The Merkle tree over a log (RFC 9162 §2.1), SHA-256, appended to without hashing anything twice.

The hashes of all whole subtrees are kept in the order in which they become known: an entry's leaf, then every subtree
that it completes, from the lower to the upper. After `size` entries these are `2·size - popcount(size)` hashes, and the
place of each follows from its level and number, so that the sequence is only ever appended to:

    entries   0     1        2     3                  4
    hashes    a     b (ab)   c     d (cd) (abcd)      e

Roots and proofs, also of earlier sizes, take some log₂(size) of them.
"""

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

from crypto.errors import ProofInvalid
from crypto.receipts.limits import PROOF_HASHES_MAX, TREE_SIZE_MAX

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256().digest()


class Hashes(Protocol):
    """The sequence above, wherever it is kept."""

    def __getitem__(self, place: int, /) -> bytes:
        """The hash at that place, 32 bytes."""


def leaf_hash(entry: bytes) -> bytes:
    """Of an entry (RFC 9162 §2.1.1)."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Of two subtrees (RFC 9162 §2.1.1)."""
    return hashlib.sha256(b"\1" + left + right).digest()


def stored(size: int) -> int:
    """How many hashes are kept of a tree of ``size`` entries."""
    return 2 * size - size.bit_count()


def added(index: int) -> int:
    """How many hashes the entry ``index`` adds: its leaf, and every subtree that it completes."""
    return ((index + 1) & -(index + 1)).bit_length()


class Tree:
    """A tree of ``size`` entries over kept hashes.

    Args:
        hashes: at least ``stored(size)`` of them.
        size: how many entries are meant.
    """

    def __init__(self, hashes: Hashes, size: int) -> None:
        self._hashes = hashes
        self.size = size

    def append(self, leaf: bytes) -> tuple[bytes, ...]:
        """The hashes that an entry adds, to be kept behind the others; the tree counts it from then on.

        Args:
            leaf: the entry's ``leaf_hash``.
        """
        new = [leaf]
        for level in range(1, added(self.size)):
            new.append(node_hash(self._whole(level - 1, (self.size >> (level - 1)) - 1), new[-1]))
        self.size += 1
        return tuple(new)

    def root(self, size: int | None = None) -> bytes:
        """The tree's hash, or that of its first ``size`` entries (RFC 9162 §2.1.1).

        Raises:
            ValueError: there are not as many.
        """
        size = self._sized(self.size if size is None else size)
        return self._range(0, size) if size else EMPTY_ROOT

    def inclusion(self, index: int, size: int | None = None) -> tuple[bytes, ...]:
        """The proof that an entry is among the first ``size`` (RFC 9162 §2.1.3.1).

        Raises:
            ValueError: there are not as many, or the entry is not among them.
        """
        size = self._sized(self.size if size is None else size)
        if not 0 <= index < size:
            raise ValueError(f"no entry {index} among {size}")
        path: list[bytes] = []
        start, end = 0, size
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start = middle
        return tuple(reversed(path))

    def consistency(self, old: int, new: int | None = None) -> tuple[bytes, ...]:
        """The proof that the first ``old`` entries begin the first ``new`` (RFC 9162 §2.1.4.1); empty for none or all.

        Raises:
            ValueError: there are not as many, or ``old`` is more than ``new``.
        """
        new = self._sized(self.size if new is None else new)
        if not 0 <= old <= new:
            raise ValueError(f"{old} entries do not begin {new}")
        if old in (0, new):
            return ()
        path: list[bytes] = []
        start, end, whole = 0, new, True
        while old != end:
            middle = start + _split(end - start)
            if old <= middle:
                path.append(self._range(middle, end))
                end = middle
            else:
                path.append(self._range(start, middle))
                start, whole = middle, False
        if not whole:
            path.append(self._range(start, end))
        return tuple(reversed(path))

    def _sized(self, size: int) -> int:
        if not 0 <= size <= self.size:
            raise ValueError(f"the log has {self.size} entries, not {size}")
        return size

    def _range(self, start: int, end: int) -> bytes:
        """Hash of the entries ``start`` to ``end``, a subtree of the tree of ``end``: whole, or its right edge."""
        parts: list[bytes] = []
        while start < end:
            level = (end - start).bit_length() - 1
            parts.append(self._whole(level, start >> level))
            start += 1 << level
        result = parts.pop()
        while parts:
            result = node_hash(parts.pop(), result)
        return result

    def _whole(self, level: int, number: int) -> bytes:
        """Of the subtree over the entries ``number << level`` to ``(number + 1) << level``."""
        last = ((number + 1) << level) - 1  # the entry that completes it
        return self._hashes[stored(last) + level]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """An entry stands at ``index`` among the first ``size`` of the log with that root (RFC 9162 §2.1.3.2).

    Raises:
        ProofInvalid: the proof does not show it.
    """
    _check_proof(path, size)
    if not 0 <= index < size:
        raise ProofInvalid(f"no entry {index} among {size}")
    number, last, result = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise ProofInvalid(f"the proof of entry {index} has more hashes than the tree is high")
        if number & 1 or number == last:
            result = node_hash(sibling, result)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            result = node_hash(result, sibling)
        number, last = number >> 1, last >> 1
    if last or result != root:
        raise ProofInvalid(f"entry {index} is not in the log of {size} entries with that root")


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> None:
    """The log of ``old`` entries begins that of ``new`` (RFC 9162 §2.1.4.2); the empty log begins every one.

    Raises:
        ProofInvalid: the proof does not show it.
    """
    _check_proof(path, new)
    if not 0 <= old <= new:
        raise ProofInvalid(f"{old} entries do not begin {new}")
    if old in (0, new):
        if path or (old == 0 and old_root != EMPTY_ROOT) or (old == new and old_root != new_root):
            raise ProofInvalid(f"the log of {new} entries does not continue that of {old}")
        return
    hashes = [old_root, *path] if old & (old - 1) == 0 else list(path)
    number, last = old - 1, new - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    if not path:
        raise ProofInvalid(f"there is no proof that the log of {new} entries continues that of {old}")
    first = second = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise ProofInvalid("the proof of consistency has more hashes than the tree is high")
        if number & 1 or number == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            second = node_hash(second, sibling)
        number, last = number >> 1, last >> 1
    if last or first != old_root or second != new_root:
        raise ProofInvalid(f"the log of {new} entries does not continue that of {old}")


def _check_proof(path: Sequence[bytes], size: int) -> None:
    if not 0 <= size <= TREE_SIZE_MAX:
        raise ProofInvalid(f"no log has {size} entries")
    if len(path) > PROOF_HASHES_MAX or any(len(one) != HASH_BYTES for one in path):
        raise ProofInvalid(f"a proof is at most {PROOF_HASHES_MAX} hashes of {HASH_BYTES} bytes")


def _split(size: int) -> int:
    """The largest power of two below ``size``."""
    return 1 << ((size - 1).bit_length() - 1)

"""The tree of a log is RFC 9162's: its known vectors, and proofs that show what is and nothing that is not."""

import hashlib
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from pymerkle import verify_consistency as their_consistency

from crypto.errors import ProofInvalid
from crypto.receipts.limits import PROOF_HASHES_MAX, TREE_SIZE_MAX
from crypto.receipts.merkle import (
    EMPTY_ROOT,
    Tree,
    added,
    leaf_hash,
    stored,
    verify_consistency,
    verify_inclusion,
)

# The eight entries of Certificate Transparency's reference tests, and the roots over the first 1 to 8 of them.
ENTRIES = [bytes.fromhex(one) for one in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
ENTRIES.append(bytes.fromhex("606162636465666768696a6b6c6d6e6f"))
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): INCLUSION[0, 8],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def tree_of(entries: Sequence[bytes]) -> tuple[Tree, list[bytes]]:
    hashes: list[bytes] = []
    tree = Tree(hashes, 0)
    for entry in entries:
        hashes.extend(tree.append(leaf_hash(entry)))
    return tree, hashes


def test_the_root_of_nothing() -> None:
    assert tree_of([])[0].root() == EMPTY_ROOT == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("size", range(1, 9))
def test_known_roots(size: int) -> None:
    assert tree_of(ENTRIES[:size])[0].root().hex() == ROOTS[size - 1]
    assert tree_of(ENTRIES)[0].root(size).hex() == ROOTS[size - 1]


@pytest.mark.parametrize("known", INCLUSION)
def test_known_proofs_of_inclusion(known: tuple[int, int]) -> None:
    index, size = known
    path = tree_of(ENTRIES)[0].inclusion(index, size)
    assert [one.hex() for one in path] == INCLUSION[known]
    verify_inclusion(leaf_hash(ENTRIES[index]), index, size, path, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize("known", CONSISTENCY)
def test_known_proofs_of_consistency(known: tuple[int, int]) -> None:
    old, new = known
    path = tree_of(ENTRIES)[0].consistency(old, new)
    assert [one.hex() for one in path] == CONSISTENCY[known]
    verify_consistency(old, bytes.fromhex(ROOTS[old - 1]), new, bytes.fromhex(ROOTS[new - 1]), path)


def naive(entries: Sequence[bytes]) -> bytes:
    """RFC 9162 §2.1.1, word for word."""
    if not entries:
        return hashlib.sha256().digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\0" + entries[0]).digest()
    k = 1
    while 2 * k < len(entries):
        k *= 2
    return hashlib.sha256(b"\1" + naive(entries[:k]) + naive(entries[k:])).digest()


def test_every_size_keeps_as_many_hashes_as_are_said() -> None:
    for size in range(260):
        entries = [b"%d" % number for number in range(size)]
        tree, hashes = tree_of(entries)
        assert len(hashes) == stored(size) == sum(added(index) for index in range(size))
        assert tree.root() == naive(entries)


SIZES = st.integers(1, 200)


@given(SIZES, st.data())
def test_proofs_of_inclusion_hold_and_of_nothing_else(size: int, data: st.DataObject) -> None:
    tree, _ = tree_of([b"%d" % number for number in range(size)])
    index = data.draw(st.integers(0, size - 1))
    path, root = tree.inclusion(index), tree.root()
    verify_inclusion(leaf_hash(b"%d" % index), index, size, path, root)
    for other in {0, size - 1, data.draw(st.integers(0, size - 1))} - {index}:
        with pytest.raises(ProofInvalid):
            verify_inclusion(leaf_hash(b"%d" % other), index, size, path, root)
        with pytest.raises(ProofInvalid):
            verify_inclusion(leaf_hash(b"%d" % index), other, size, path, root)
    refuse_altered(lambda proof: verify_inclusion(leaf_hash(b"%d" % index), index, size, proof, root), path, data)


@given(SIZES, st.data())
def test_proofs_of_consistency_hold_and_of_nothing_else(new: int, data: st.DataObject) -> None:
    tree, _ = tree_of([b"%d" % number for number in range(new)])
    old = data.draw(st.integers(0, new))
    path, old_root, root = tree.consistency(old), tree.root(old), tree.root()
    verify_consistency(old, old_root, new, root, path)
    if old:
        changed = data.draw(st.integers(0, old - 1))
        entries = [b"%d" % number for number in range(new)]
        entries[changed] = b"another"
        forked, _ = tree_of(entries)
        for proof in (path, forked.consistency(old)):
            with pytest.raises(ProofInvalid):
                verify_consistency(old, old_root, new, forked.root(), proof)
    refuse_altered(lambda proof: verify_consistency(old, old_root, new, root, proof), path, data)


def refuse_altered(verify: Callable[[Sequence[bytes]], None], path: Sequence[bytes], data: st.DataObject) -> None:
    """A proof with a hash more, less, altered, in another place or of another length shows nothing."""
    with pytest.raises(ProofInvalid):
        verify((*path, bytes(32)))
    with pytest.raises(ProofInvalid):
        verify([bytes(32)] * (PROOF_HASHES_MAX + 1))
    if not path:
        return
    place = data.draw(st.integers(0, len(path) - 1))
    bit = data.draw(st.integers(0, 255))
    flipped = (int.from_bytes(path[place], "big") ^ (1 << bit)).to_bytes(32, "big")
    altered = [
        [*path[:place], flipped, *path[place + 1 :]],
        [*path[:place], path[place] + b"\0", *path[place + 1 :]],
        [*path[:place], *path[place + 1 :]],
        [*path[:place], path[place], *path[place:]],
    ]
    if len(path) > 1:
        altered.append([*path[1:], path[0]])
    for proof in altered:
        with pytest.raises(ProofInvalid):
            verify(proof)


@pytest.mark.parametrize(("index", "size"), [(-1, 8), (8, 8), (0, 0), (0, TREE_SIZE_MAX + 1)])
def test_no_such_entry(index: int, size: int) -> None:
    with pytest.raises(ProofInvalid):
        verify_inclusion(bytes(32), index, size, [], bytes(32))


@pytest.mark.parametrize(("old", "new"), [(9, 8), (-1, 8), (0, -1), (3, TREE_SIZE_MAX + 1)])
def test_no_such_sizes(old: int, new: int) -> None:
    with pytest.raises(ProofInvalid):
        verify_consistency(old, EMPTY_ROOT, new, EMPTY_ROOT, [])


def test_the_empty_log_begins_every_other_and_only_with_its_own_root() -> None:
    verify_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    verify_consistency(0, EMPTY_ROOT, 5, bytes(32), [])
    for old_root, new, new_root in ((bytes(32), 5, bytes(32)), (EMPTY_ROOT, 0, bytes(32))):
        with pytest.raises(ProofInvalid):
            verify_consistency(0, old_root, new, new_root, [])


def test_what_is_asked_of_a_tree_must_be_in_it() -> None:
    tree, _ = tree_of(ENTRIES)
    for call in (lambda: tree.root(9), lambda: tree.inclusion(8), lambda: tree.inclusion(3, 2)):
        with pytest.raises(ValueError, match="entr"):
            call()
    for old, new in ((9, 8), (-1, 4), (5, 4), (0, 9)):
        with pytest.raises(ValueError, match="entries"):
            tree.consistency(old, new)


# ---- another implementation


def test_pymerkle_has_the_same_roots_and_paths() -> None:
    hashes: list[bytes] = []
    tree, theirs = Tree(hashes, 0), InmemoryTree(algorithm="sha256")
    for number in range(70):
        entry = entry_of(number)
        hashes.extend(tree.append(leaf_hash(entry)))
        theirs.append_entry(entry)
        size = number + 1
        assert tree.root() == theirs.get_root(size)
        for index in range(size):
            path = theirs.prove_inclusion(index + 1, size).path
            assert path == [leaf_hash(entry_of(index)), *tree.inclusion(index, size)]


def test_pymerkle_accepts_our_roots_and_we_its_for_every_pair_of_sizes() -> None:
    """Its proofs of consistency are finer than the RFC's, so that the hashes themselves cannot be compared."""
    theirs = InmemoryTree(algorithm="sha256")
    for number in range(40):
        theirs.append_entry(entry_of(number))
    tree, _ = tree_of([entry_of(number) for number in range(40)])
    for new in range(1, 41):
        for old in range(1, new + 1):
            their_consistency(tree.root(old), tree.root(new), theirs.prove_consistency(old, new))
            verify_consistency(old, theirs.get_root(old), new, theirs.get_root(new), tree.consistency(old, new))
            assert tree.consistency(old, new) == tuple(proof_of(old, [entry_of(number) for number in range(new)]))


def entry_of(number: int) -> bytes:
    return hashlib.sha512(b"%d" % number).digest()[: number % 40]


def proof_of(old: int, entries: Sequence[bytes], *, whole: bool = True) -> list[bytes]:
    """RFC 9162 §2.1.4.1, word for word."""
    if old == len(entries):
        return [] if whole else [naive(entries)]
    k = 1
    while 2 * k < len(entries):
        k *= 2
    if old <= k:
        return [*proof_of(old, entries[:k], whole=whole), naive(entries[k:])]
    return [*proof_of(old - k, entries[k:], whole=False), naive(entries[:k])]


# ---- what only whoever makes up the root can try


def test_a_proof_within_a_tree_of_another_size_shows_nothing() -> None:
    """The hashes lead to the root, and the log is said to be larger or smaller than the tree that they are of."""
    four, _ = tree_of(ENTRIES[:4])
    root = four.root()
    verify_inclusion(leaf_hash(ENTRIES[0]), 0, 4, four.inclusion(0), root)
    for size in (1, 2, 5, 8):
        with pytest.raises(ProofInvalid):
            verify_inclusion(leaf_hash(ENTRIES[0]), 0, size, four.inclusion(0), root)
    above = hashlib.sha256(b"\1" + root + leaf_hash(ENTRIES[0])).digest()
    with pytest.raises(ProofInvalid, match="more hashes"):  # a log of one entry has no hash above it
        verify_inclusion(leaf_hash(ENTRIES[0]), 0, 1, [root], above)
    verify_consistency(2, four.root(2), 4, root, four.consistency(2))
    for new in (5, 8, 1 << 20):
        with pytest.raises(ProofInvalid):
            verify_consistency(2, four.root(2), new, root, four.consistency(2))


def test_hashes_of_another_length_show_nothing() -> None:
    leaf = leaf_hash(ENTRIES[0])
    for length in (0, 31, 33, 64):
        other = bytes(length)
        made_up = hashlib.sha256(b"\1" + leaf + other).digest()
        with pytest.raises(ProofInvalid, match="32 bytes"):
            verify_inclusion(leaf, 0, 2, [other], made_up)
        with pytest.raises(ProofInvalid, match="32 bytes"):
            verify_consistency(1, leaf, 2, made_up, [other])

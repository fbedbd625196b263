"""Notes and summaries are what they were, or a ValueError; places in the files neither overlap nor leave gaps."""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunking.limits import SEGMENT_PAGES_MAX
from chunking.store import Agreed
from chunking.store.keys import SEAL_BYTES
from chunking.store.layout import (
    ID_BYTES,
    ID_CHUNK_PAGES,
    KEY_FILE_BYTES,
    MAGIC,
    NOTE_BYTES,
    SUMMARY_BYTES,
    Note,
    Summary,
    block_place,
    column_places,
    data_bytes,
    id_chunk_place,
    index_bytes,
    is_folder,
    pack_note,
    pack_summary,
    parsed,
    summary_place,
    unpack_note,
    unpack_summary,
)
from tests.chunking.store.support import FIRST, SECOND, TENANT, VM, opened, ordinals

VECTORS = Path(__file__).parents[2] / "vectors" / "store"

names = st.text(max_size=60)
summaries = st.integers(0, SEGMENT_PAGES_MAX).flatmap(
    lambda pages: st.builds(
        Summary,
        pages=st.just(pages),
        kept=st.integers(0, pages),
        block_pages=st.integers(1, 1024),
        runs=st.integers(0, 2**32 - 1),
        references=st.lists(st.binary(min_size=16, max_size=16), max_size=16).map(tuple),
        vm=st.none() | names,
    )
)


@given(st.floats(allow_nan=False), names, st.none() | names)
def test_a_note_is_read_as_it_was_written(created: float, tenant: str, vm: str | None) -> None:
    note = Note(created, tenant, vm)
    assert unpack_note(pack_note(note)) == note
    assert len(pack_note(note)) == NOTE_BYTES


@given(summaries)
def test_a_summary_is_read_as_it_was_written(summary: Summary) -> None:
    assert unpack_summary(pack_summary(summary)) == summary
    assert len(pack_summary(summary)) == SUMMARY_BYTES


@given(st.binary(max_size=2 * SUMMARY_BYTES), st.integers(0, 60), st.binary(max_size=8))
def test_anything_else_is_a_value_error(content: bytes, at: int, changed: bytes) -> None:
    for read, good in ((unpack_note, pack_note(Note(1.0, "t", None))), (unpack_summary, pack_summary(SMALL))):
        for attempt in (content, content.ljust(len(good), b"\x00")[: len(good)], _put(good, at, changed)):
            with contextlib.suppress(ValueError):
                read(attempt)


SMALL = Summary(40, 40, 16, 3, (), "vm")


def _put(content: bytes, at: int, changed: bytes) -> bytes:
    return content[:at] + changed + content[at + len(changed) :]


@given(summaries)
def test_pieces_follow_each_other(summary: Summary) -> None:
    blocks = -(-summary.kept // summary.block_pages)
    if blocks:
        offset, pages = block_place(summary, blocks - 1)
        assert offset + pages * 4096 + SEAL_BYTES == data_bytes(summary)
        assert 1 <= pages <= summary.block_pages
    end = sum(summary_place())
    assert end == len(MAGIC) + SUMMARY_BYTES + SEAL_BYTES
    chunks = -(-summary.kept // ID_CHUNK_PAGES)
    for chunk in {0, chunks - 1} if chunks else ():
        offset, ids = id_chunk_place(summary.kept, chunk)
        assert offset == end + chunk * (ID_CHUNK_PAGES * ID_BYTES + SEAL_BYTES)
        assert 1 <= ids <= ID_CHUNK_PAGES
    end += summary.kept * ID_BYTES + chunks * SEAL_BYTES
    for offset, size in column_places(summary):
        assert offset == end
        end += size + SEAL_BYTES if size else 0
    assert end == index_bytes(summary)


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("00" * 16 + ".key", (bytes(16), ".key")),
        ("00" * 16 + ".index", (bytes(16), ".index")),
        ("00" * 16, None),
        ("00" * 15 + ".key", None),
        ("AA" * 16 + ".key", None),
        ("00" * 16 + ".key.old", None),
        ("00" * 16 + ".key\n", None),
        ("../" + "00" * 16 + ".key", None),
    ],
)
def test_only_our_own_files_are_ours(name: str, segment: tuple[bytes, str] | None) -> None:
    assert parsed(name) == segment


@pytest.mark.parametrize(("name", "ours"), [("0f" * 16, True), ("0F" * 16, False), ("0f" * 15, False), ("lock", False)])
def test_only_our_own_folders_are_ours(name: str, ours: bool) -> None:
    assert is_folder(name) == ours


def test_the_sizes_are_frozen() -> None:
    """Stores of before must be readable: these change only with a new version of the layout."""
    assert (KEY_FILE_BYTES, SUMMARY_BYTES, MAGIC) == (712, 1024, b"KORORA\x00\x01")
    assert (data_bytes(SMALL), index_bytes(SMALL)) == (163888, 2292)


def test_a_store_of_before_opens(tmp_path: Path) -> None:
    """tests/vectors/store was written by the first version: two pages, the second of an older segment's making."""
    shutil.copytree(VECTORS, tmp_path / "store")
    for path in (tmp_path / "store", *(tmp_path / "store").iterdir()):
        path.chmod(0o700)
    with opened(tmp_path) as store:
        assert [(info.name, info.pages, info.vm) for info in store.segments(TENANT)] == [
            (SECOND, 2, VM),
            (FIRST, 1, VM),
        ]
        with store.view(TENANT, [Agreed(FIRST, 1), Agreed(SECOND, 2)]) as view:
            assert [page.tobytes() for page in view.read(ordinals(0, 1, 2))] == [
                letter * 4096 for letter in (b"a", b"b", b"c")
            ]
            assert view.bases(np.array([4, 5, 6], np.uint64)).tolist() == [0, 1, 2]

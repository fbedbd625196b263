"""Whoever holds the disk learns nothing and passes nothing off; one tenant learns nothing of another."""

import random
import stat
from pathlib import Path

import numpy as np
import pytest

from chunking.errors import PagesMissing, SegmentUnknown, StoreUnusable
from chunking.store import Agreed
from chunking.store.view import page_id
from chunking.store.writer import _SegmentFile
from crypto.at_rest import HostKeys
from tests.chunking.store.support import (
    FIRST,
    KEYS,
    SECOND,
    SECONDS,
    SLOTS,
    TENANT,
    VM,
    files_in,
    fingerprint,
    literals,
    offsets,
    opened,
    ordinals,
    pages_of,
    written,
)

COUNT = 40
PAGES = pages_of(1, COUNT)
PFN = 0x1234_5678_9A00


def pristine(folder: Path) -> dict[Path, bytes]:
    """A store with one segment, and the content of its files."""
    with opened(folder) as store:
        written(store, PAGES)
    return {path: path.read_bytes() for path in files_in(folder)}


def restore(folder: Path, files: dict[Path, bytes]) -> None:
    for path in (folder / "store").glob("*/*"):
        path.unlink()
    for path, content in files.items():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_bytes(content)


def use_it(folder: Path) -> bool:
    """All that a session does with a store. Nothing wrong may come of it; says whether all was as if nothing was."""
    with opened(folder) as store:
        try:
            view = store.view(TENANT, [Agreed(FIRST, COUNT)], VM)
        except SegmentUnknown:
            assert FIRST not in {info.name for info in store.segments(TENANT)}
            return False
        with view:
            found = view.find(fingerprint(PAGES), PAGES.data.cast("B"), offsets(COUNT))
            assert all(ordinal in {-1, at} for at, ordinal in enumerate(found.tolist()))
            bases = view.bases(np.arange(100, 100 + COUNT, dtype=np.uint64))
            assert all(ordinal in {-1, at} for at, ordinal in enumerate(bases.tolist()))
            missing: set[int] = set()
            for at in range(COUNT):
                try:
                    assert (view.read(ordinals(at))[0] == PAGES[at]).all()
                except PagesMissing as error:
                    missing |= set(error.ordinals)
                view.verify(at, PAGES[at].tobytes())
        assert missing <= set(range(COUNT))
        whole = not missing and found.tolist() == bases.tolist() == list(range(COUNT))
        # Once damage has shown, nobody is offered the segment again.
        assert (FIRST in {info.name for info in store.segments(TENANT)}) == whole
        with pytest.raises(SegmentUnknown) if not whole else store.view(TENANT, [Agreed(FIRST, COUNT)]):
            store.view(TENANT, [Agreed(FIRST, COUNT)]).close()
    return whole


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, seed: int) -> None:
    """In every file; never a wrong page, ordinal or base, and never an error but those that say so."""
    files = pristine(tmp_path)
    assert sorted(path.suffix for path in files) == [".data", ".index", ".key"]
    assert use_it(tmp_path)
    choice = random.Random(seed)
    for path, content in files.items():
        for _ in range(12):
            restore(tmp_path, files)
            changed = bytearray(content)
            changed[choice.randrange(len(changed))] ^= 1 << choice.randrange(8)
            path.write_bytes(changed)
            assert not use_it(tmp_path), path


@pytest.mark.parametrize("suffix", [".data", ".index", ".key"])
def test_a_file_cut_short_lengthened_or_lost_is_noticed(tmp_path: Path, suffix: str) -> None:
    files = pristine(tmp_path)
    (path,) = (path for path in files if path.suffix == suffix)
    content = files[path]
    for wrong in (b"", content[:7], content[: len(content) // 2], content[:-1], None):
        restore(tmp_path, files)
        path.unlink() if wrong is None else path.write_bytes(wrong)
        assert not use_it(tmp_path)
    restore(tmp_path, files)
    path.write_bytes(content + b"\x00")
    assert use_it(tmp_path) == (suffix == ".key")  # what follows a key is not read


def test_a_flipped_block_costs_its_own_pages_only(tmp_path: Path) -> None:
    files = pristine(tmp_path)
    (data,) = (path for path in files if path.suffix == ".data")
    with opened(tmp_path) as store, store.view(TENANT, [Agreed(FIRST, COUNT)]) as view:
        changed = bytearray(files[data])
        changed[len(changed) - 1] ^= 1  # the tag of the last block, which holds pages 32 to 39
        data.write_bytes(changed)
        with pytest.raises(PagesMissing) as missing:
            view.read(ordinals(39, 2, 35, 39))
        assert missing.value.ordinals == (35, 39)
        assert (view.read(ordinals(2, 31)) == PAGES[[2, 31]]).all()
        assert store.counters.segments_damaged == 1
        assert store.counters.pages_missing == 2


def test_memory_that_failed_before_a_page_was_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal is good and the page is not: its id says so, and no later session meets it."""
    seal = _SegmentFile._flush_block

    def flipped(self: _SegmentFile, plain: memoryview) -> None:
        changed = bytearray(plain)
        changed[3 * 4096] ^= 1
        seal(self, memoryview(changed))

    monkeypatch.setattr(_SegmentFile, "_flush_block", flipped)
    with opened(tmp_path) as store:
        written(store, PAGES[:10])
        with store.view(TENANT, [Agreed(FIRST, 10)]) as view:
            with pytest.raises(PagesMissing) as missing:
                view.read(ordinals(*range(10)))
            assert missing.value.ordinals == (3,)
            assert (view.read(ordinals(2, 4)) == PAGES[[2, 4]]).all()
        assert store.segments(TENANT) == []


def test_blocks_segments_and_keys_do_not_change_places(tmp_path: Path) -> None:
    """Each sealed piece opens in its own place only."""
    with opened(tmp_path) as store:
        written(store, PAGES)
        written(store, pages_of(2, COUNT), SECOND)
    files = {path: path.read_bytes() for path in files_in(tmp_path)}
    (data,) = (path for path in files if path.suffix == ".data" and path.stem == FIRST.hex())
    block = 16 * 4096 + 16
    content = files[data]
    data.write_bytes(content[block : 2 * block] + content[:block] + content[2 * block :])
    assert not use_it(tmp_path)
    for suffix in (".data", ".index", ".key"):
        restore(tmp_path, files)
        data.with_suffix(suffix).write_bytes(files[data.with_name(SECOND.hex() + suffix)])
        assert not use_it(tmp_path), suffix


def test_a_segment_of_one_tenant_does_not_open_for_another(tmp_path: Path) -> None:
    """Its files moved over by somebody who can write to the disk."""
    pristine(tmp_path)
    other = tmp_path / "store" / KEYS.folder("another")
    (tmp_path / "store" / KEYS.folder(TENANT)).rename(other)
    with opened(tmp_path) as store:
        assert store.segments("another") == []
        with pytest.raises(SegmentUnknown):
            store.view("another", [Agreed(FIRST, COUNT)])


def test_dedup_does_not_cross_tenants(tmp_path: Path) -> None:
    """The same pages of two tenants lie there twice, under ids that tell nobody that they are the same."""
    with opened(tmp_path) as store:
        for tenant, name in ((TENANT, FIRST), ("another", SECOND)):
            writer = store.writer(tenant, name, VM, now=1.0, slots=SLOTS)
            writer.add(PAGES)
            writer.finish()
            assert writer.wait(SECONDS)
        assert [info.name for info in store.segments(TENANT)] == [FIRST]
        assert [info.name for info in store.segments("another", VM)] == [SECOND]
        assert store.held("another", [Agreed(FIRST, COUNT)]) == []
        for agreed in ([Agreed(FIRST, COUNT)], [Agreed(SECOND, COUNT), Agreed(FIRST, COUNT)]):
            with pytest.raises(SegmentUnknown):
                store.view("another", agreed)
        keys = [KEYS.page_key(KEYS.folder(tenant)) for tenant in (TENANT, "another")]
        assert page_id(keys[0], PAGES[0].data) != page_id(keys[1], PAGES[0].data)
        sizes = [path.stat().st_size for path in files_in(tmp_path) if path.suffix == ".data"]
        assert sizes == [3 * 16 + COUNT * 4096] * 2
        forgotten = store.forget(tenant="another")
        assert forgotten.segments == 1
        assert [info.name for info in store.segments(TENANT)] == [FIRST]


def test_nothing_of_a_guest_is_found_on_the_disk(tmp_path: Path) -> None:
    """No page, id, fingerprint, PFN or name; the plainest guest there is: every page full of one letter."""
    pages = np.repeat(np.frombuffer(b"abcdefgh", np.uint8), 4096).reshape(8, 4096)
    with opened(tmp_path) as store:
        writer = store.writer(TENANT, FIRST, VM, now=1.0, slots=SLOTS)
        writer.add(pages)
        writer.place(literals(range(PFN, PFN + 8)))
        writer.finish()
        assert writer.wait(SECONDS)
    key = KEYS.page_key(KEYS.folder(TENANT))
    told = [TENANT.encode(), VM.encode(), TENANT.encode()[:6], VM.encode()[:6]]
    told += [bytes([letter]) * 8 for letter in b"abcdefgh"]
    told += [page_id(key, page.data)[:8] for page in pages]
    told += [number.tobytes() for number in fingerprint(pages)]
    told += [number.to_bytes(8, order) for number in range(PFN, PFN + 8) for order in ("little", "big")]  # type: ignore[arg-type]
    for path in files_in(tmp_path):
        content = path.read_bytes()
        assert not [secret for secret in told if secret in content], path
        assert TENANT not in str(path.relative_to(tmp_path))
        assert VM not in str(path.relative_to(tmp_path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    folders = [tmp_path / "store", *(path for path in (tmp_path / "store").iterdir() if path.is_dir())]
    assert len(folders) == 2
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    assert stat.S_IMODE((tmp_path / "store" / "lock").stat().st_mode) == 0o600


def test_without_the_host_key_nothing_is_left(tmp_path: Path) -> None:
    """Another host's store, or a lost key: the segments are of no use to anybody, and are removed."""
    pristine(tmp_path)
    with opened(tmp_path) as store:
        store._keys = HostKeys(bytes(32))
        assert store.segments(TENANT) == []
    (tmp_path / "store" / KEYS.folder(TENANT)).rename(tmp_path / "store" / HostKeys(bytes(32)).folder(TENANT))
    with opened(tmp_path):
        assert files_in(tmp_path) == []


def test_a_forgotten_key_is_overwritten_where_it_lay(tmp_path: Path) -> None:
    """Through a name of its own the old content is looked for: it is gone even so."""
    files = pristine(tmp_path)
    (key,) = (path for path in files if path.suffix == ".key")
    (tmp_path / "kept").hardlink_to(key)
    with opened(tmp_path) as store:
        forgotten = store.forget(vm=VM)
        assert (forgotten.segments, forgotten.bytes, forgotten.in_use) == (1, sum(map(len, files.values())), 0)
    left = (tmp_path / "kept").read_bytes()
    assert len(left) == len(files[key])
    assert not any(left[at : at + 16] == files[key][at : at + 16] for at in range(0, len(left) - 16, 16))
    restore(tmp_path, {path: content for path, content in files.items() if path != key})
    key.write_bytes(left)
    assert not use_it(tmp_path)


def test_links_and_pipes_in_the_folder_are_not_followed(tmp_path: Path) -> None:
    import os

    files = pristine(tmp_path)
    (data,) = (path for path in files if path.suffix == ".data")
    for suffix in (".data", ".index", ".key"):
        path = data.with_suffix(suffix)
        restore(tmp_path, files)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert not use_it(tmp_path), suffix
        assert (tmp_path / "elsewhere").exists()  # nor is what they point at removed
        restore(tmp_path, files)
        path.unlink()
        os.mkfifo(path)
        assert not use_it(tmp_path), suffix


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    pristine(tmp_path)
    folder = tmp_path / "store" / KEYS.folder(TENANT)
    strangers = [tmp_path / "store" / "notes.txt", folder / "notes.txt", folder / (FIRST.hex() + ".backup")]
    for stranger in strangers:
        stranger.write_text("mine")
    assert use_it(tmp_path)
    with opened(tmp_path) as store:
        store.forget(tenant=TENANT)
    assert files_in(tmp_path) == sorted(strangers)


def test_a_folder_that_others_may_look_into_is_refused(tmp_path: Path) -> None:
    pristine(tmp_path)
    (tmp_path / "store").chmod(0o750)
    with pytest.raises(StoreUnusable, match="0750") as refused:
        opened(tmp_path)
    assert refused.value.remedy == f"chmod 700 {tmp_path / 'store'}"
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable):
        opened(tmp_path / "file")

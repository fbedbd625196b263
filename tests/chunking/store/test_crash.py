"""A process may die at any step, and the machine with it; a disk may be full at any step; processes share a store."""

import contextlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chunking.errors import SegmentUnknown
from chunking.store import Agreed, Store
from tests.chunking.store.actors import CROWD_BYTES_MAX, FullDisk
from tests.chunking.store.support import (
    FIRST,
    SECOND,
    SECONDS,
    SLOTS,
    TENANT,
    THIRD,
    VM,
    files_in,
    opened,
    ordinals,
    pages_of,
    written,
)

ROOT = Path(__file__).parents[3]
CONTENTS = {FIRST: pages_of(1, 40), THIRD: pages_of(3, 70), SECOND: pages_of(2, 20)}


Actor = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def actor() -> Iterator[Actor]:
    """Start an actor; none outlives its test."""
    with contextlib.ExitStack() as ends:

        def start(*arguments: object) -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.chunking.store.actors", *map(str, arguments)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            ends.enter_context(process)
            ends.callback(process.kill)
            return process

        yield start


def said(process: "subprocess.Popen[str]", line: str = "") -> str:
    out, err = process.communicate(line, timeout=SECONDS * 2)
    assert (process.returncode, err) == (0, "")
    return out


def check_whole(store: Store) -> list[bytes]:
    """Every segment that is offered reads as it was written; says which there are."""
    names = []
    for info in store.segments(TENANT):
        want = CONTENTS[info.name]
        assert info.pages == len(want)
        with store.view(TENANT, [Agreed(info.name, info.pages)]) as view:
            assert (view.read(ordinals(*range(info.pages))) == want).all()
        names.append(info.name)
    return names


@pytest.fixture
def quick_path() -> Iterator[Path]:
    """A folder in memory, where there is one: a sync costs nothing there, and hundreds of processes do several."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("how", ["kill", "unplug"])
def test_a_process_dies_at_any_step(quick_path: Path, actor: Actor, how: str) -> None:
    tmp_path = quick_path
    steps = int(said(actor("crash", tmp_path, how)))
    assert steps > 90
    seen = set()
    for step in range(1, steps + 1):
        with opened(tmp_path / str(step), bytes_max=500_000) as store:
            names = check_whole(store)
            # Nothing is left but what is whole, and all of that can be read.
            assert len(files_in(tmp_path / str(step))) == 3 * len(names)
            status = store.status()
            assert (status.segments, status.unfinished, status.damaged) == (len(names), 0, 0)
            assert status.bytes <= 500_000
            seen.add(tuple(names))
            written(store, pages_of(2, 20), b"new name, sixteen"[:16], now=9.0)  # and the store takes new ones
    assert {(), (FIRST,), (THIRD,), (SECOND, THIRD)} <= seen


def test_a_disk_is_full_from_any_step_on(tmp_path: Path) -> None:
    """The session goes on and notices nothing; the store gives its segment up and leaves nothing of it."""
    step, outcome = 0, False
    while not outcome:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        opened(folder).close()
        disk = FullDisk(step + 1)  # the first step is the opening's
        with opened(folder, disk=disk) as store:
            writer = store.writer(TENANT, FIRST, VM, now=1.0, slots=SLOTS)
            for start in range(0, 40, 10):
                writer.add(pages_of(1, 40)[start : start + 10])
            writer.finish()
            assert writer.wait(SECONDS)
            outcome = writer.stored
            if not outcome:
                assert isinstance(writer.failure, OSError)
                assert files_in(folder) == []
                assert store.counters.segments_finished == 0
    assert step > 12


def test_a_file_may_not_grow_any_further(tmp_path: Path) -> None:
    """The same by the system's own refusal: a limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            writer = store.writer(TENANT, FIRST, VM, now=1.0, slots=SLOTS)
            writer.add(pages_of(1, 40))
            writer.finish()
            assert writer.wait(SECONDS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(writer.failure, OSError)
        assert files_in(tmp_path) == []
        written(store, pages_of(1, 40))


def test_processes_share_a_store(tmp_path: Path, actor: Actor) -> None:
    """Three at once write, read each other's, and push each other's out; none reads a wrong page or misses one."""
    processes = [actor("crowd", tmp_path, seed) for seed in (1, 2, 3)]
    read = [int(said(process)) for process in processes]  # all of them, lest one fail unseen
    assert min(read) > 0
    with opened(tmp_path, bytes_max=CROWD_BYTES_MAX) as store:
        status = store.status()
        assert 0 < status.bytes <= CROWD_BYTES_MAX
        assert (status.unfinished, status.damaged) == (0, 0)


def test_another_process_reads_on_what_is_pushed_out_or_forgotten(tmp_path: Path, actor: Actor) -> None:
    with opened(tmp_path, bytes_max=300_000) as store:
        written(store, pages_of(1, 10))
        process = actor("hold", tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        written(store, pages_of(3, 60), THIRD, vm="another", now=5.0)
        assert {info.name for info in store.segments(TENANT)} == {FIRST, THIRD}  # both fit
        writer = store.writer(TENANT, SECOND, VM, now=6.0, slots=SLOTS)
        writer.add(pages_of(2, 20))
        writer.finish()
        assert writer.wait(SECONDS)
        # The oldest is in use: the next oldest went.
        assert [info.name for info in store.segments(TENANT)] == [SECOND, FIRST]
        forgotten = store.forget(vm=VM)
        assert (forgotten.segments, forgotten.in_use) == (2, 1)
        assert files_in(tmp_path) == []
        with pytest.raises(SegmentUnknown):
            store.view(TENANT, [Agreed(FIRST, 10)])
        assert said(process, "\n") == "right\n"

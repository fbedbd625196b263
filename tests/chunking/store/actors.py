"""Processes that use one store at once, or die as they do: `python -m tests.chunking.store.actors ROLE FOLDER …`.

crash FOLDER HOW        for each step on the disk, in a folder of its own, a process that dies at it; prints how many
crowd FOLDER SEED       one of several processes that write, offer, read and push each other's segments out
hold FOLDER             opens a view, says so, and reads it once more when a line comes in
"""

import errno
import os
import random
import signal
import sys
from pathlib import Path

from chunking.errors import PagesMissing, SegmentUnknown
from chunking.store import Agreed, Disk, Store
from tests.chunking.store.support import (
    FIRST,
    KEYS,
    SECOND,
    SECONDS,
    SLOTS,
    TENANT,
    THIRD,
    VM,
    fingerprint,
    literals,
    ordinals,
    pages_of,
    written,
)

CROWD_BYTES_MAX = 1_000_000
CROWD_ROUNDS = 25


class CountingDisk(Disk):
    """Does something at the n-th step; ``at`` is told the step's name, and the descriptor and content of a write."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.taken: list[str] = []

    def strike(self, name: str, *arguments: object) -> None:
        """What happens at the step."""
        raise NotImplementedError

    def _count(self, name: str, *arguments: object) -> None:
        self.taken.append(name)
        if len(self.taken) == self.step:
            self.strike(name, *arguments)

    def make_folder(self, path: Path) -> None:
        self._count("make_folder")
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._count("create")
        return super().create(path)

    def write(self, descriptor: int, content: bytes | bytearray | memoryview, offset: int) -> None:
        self._count("write", descriptor, content, offset)
        super().write(descriptor, content, offset)

    def resize(self, descriptor: int, size: int) -> None:
        self._count("resize")
        super().resize(descriptor, size)

    def sync(self, descriptor: int) -> None:
        self._count("sync")
        super().sync(descriptor)

    def sync_folder(self, path: Path) -> None:
        self._count("sync_folder")
        super().sync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._count("rename")
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._count("remove")
        super().remove(path)

    def remove_folder(self, path: Path) -> None:
        self._count("remove_folder")
        super().remove_folder(path)


class DyingDisk(CountingDisk):
    """The process is killed; a write is half done then."""

    def strike(self, name: str, *arguments: object) -> None:
        if name == "write":
            descriptor, content, offset = arguments
            os.pwrite(descriptor, memoryview(content)[: len(content) // 2], offset)  # type: ignore[arg-type]
        self.lose()
        os.kill(os.getpid(), signal.SIGKILL)

    def lose(self) -> None:
        """What goes with the process: nothing, the system lives on."""


class UnpluggedDisk(DyingDisk):
    """The machine dies with the process: what was not synced is empty afterwards, while names have come to last."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self._unsynced: set[int] = set()

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._unsynced.add(descriptor)
        return descriptor

    def write(self, descriptor: int, content: bytes | bytearray | memoryview, offset: int) -> None:
        self._unsynced.add(descriptor)
        super().write(descriptor, content, offset)

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self._unsynced.discard(descriptor)

    def lose(self) -> None:
        for descriptor in self._unsynced:
            try:
                os.ftruncate(descriptor, 0)
            except OSError:  # closed meanwhile, or for reading only: its number is another file's
                continue


class FullDisk(CountingDisk):
    """From the step on, nothing can be made or lengthened."""

    failing = ("create", "write", "resize", "sync", "make_folder", "rename")

    def strike(self, name: str, *_: object) -> None:
        if name in self.failing:
            raise OSError(errno.ENOSPC, "no space left on device")

    def _count(self, name: str, *arguments: object) -> None:
        self.taken.append(name)
        if len(self.taken) >= self.step:
            self.strike(name, *arguments)


def life(folder: Path, disk: Disk) -> None:
    """All that changes the disk: a segment finished, one aborted, one pushed out, one forgotten."""
    store = Store(folder / "store", KEYS, bytes_max=500_000, fingerprint=fingerprint, free_bytes_min=0, disk=disk)
    written(store, pages_of(1, 40))
    writer = store.writer(TENANT, SECOND, VM, now=2.0, slots=SLOTS)
    writer.add(pages_of(2, 40))
    writer.abort()
    written(store, pages_of(3, 70), THIRD, vm="another", now=3.0)
    store.forget(vm=VM)
    written(store, pages_of(2, 20), SECOND, now=4.0)
    store.close(SECONDS)


def crash(folder: Path, how: str) -> None:
    kind = {"kill": DyingDisk, "unplug": UnpluggedDisk}[how]
    step = 0
    while True:
        step += 1
        (folder / str(step)).mkdir()
        child = os.fork()
        if child == 0:
            try:
                life(folder / str(step), kind(step))
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        _, status = os.waitpid(child, 0)
        if status == 0:
            print(step - 1)
            return
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"a process ended with {status} before step {step}")


def crowd(folder: Path, seed: int) -> None:
    choice = random.Random(seed)
    store = Store(folder / "store", KEYS, bytes_max=CROWD_BYTES_MAX, fingerprint=fingerprint, free_bytes_min=0)
    read = 0
    for number in range(CROWD_ROUNDS):
        # The name is the seed of the pages, so that any process knows what another's segment must hold.
        name = (seed * 1000 + number).to_bytes(16, "big")
        pages = pages_of(seed * 1000 + number, choice.randint(1, 60))
        writer = store.writer(TENANT, name, VM, now=float(number), slots=SLOTS)
        writer.add(pages)
        if choice.random() < 0.2:
            writer.abort()
        else:
            writer.place(literals(range(len(pages))))
            writer.finish()
        writer.wait(SECONDS)
        infos = store.segments(TENANT)
        agreed = [Agreed(info.name, info.pages) for info in choice.sample(infos, min(3, len(infos)))]
        try:
            view = store.view(TENANT, agreed)
        except SegmentUnknown:
            continue  # pushed out between the two calls
        with view:
            start = 0
            for segment, count in agreed:
                want = pages_of(int.from_bytes(segment, "big"), count)
                try:
                    got = view.read(ordinals(*range(start, start + count)))
                except PagesMissing:
                    raise SystemExit("a page of a view that is open went missing") from None
                if (got != want).any():
                    raise SystemExit("wrong pages")
                start, read = start + count, read + count
        with store._folder.locked():  # else what is pushed out and what takes its room may both be counted
            total = store.status().bytes
        if total > CROWD_BYTES_MAX:
            raise SystemExit("the store outgrew its limit")
    if not store.close(SECONDS):
        raise SystemExit("not written in time")
    print(read)


def hold(folder: Path) -> None:
    store = Store(folder / "store", KEYS, fingerprint=fingerprint, free_bytes_min=0)
    with store.view(TENANT, [Agreed(FIRST, 10)]) as view:
        print("open", flush=True)
        sys.stdin.readline()
        print("right" if (view.read(ordinals(*range(10))) == pages_of(1, 10)).all() else "wrong", flush=True)
    store.close()


def main(role: str, folder: str, *rest: str) -> None:
    if role == "crash":
        crash(Path(folder), *rest)
    elif role == "crowd":
        crowd(Path(folder), int(rest[0]))
    else:
        hold(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])

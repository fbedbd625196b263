"""Which machine a stream carries is known before what tells it is passed on, and whoever has a say is asked then."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from proxy.errors import HypervisorFailed, PolicyRefused
from proxy.hypervisors.base import Vm
from proxy.shell.naming import Naming
from tests.proxy.support import run
from tests.standins.xen_host import guest_stream

NAMES = ["vm\nDomain-0", "vm\x1b[2J", "vm\r", "vm\x00x", "", "x" * 256]


class Asked:
    """Somebody with a say, who answers when told to."""

    def __init__(self, refuses: bool = False) -> None:
        self.machines: list[Vm | None] = []
        self.answer = asyncio.Event()
        self.refuses = refuses

    async def __call__(self, vm: Vm | None) -> None:
        self.machines.append(vm)
        await self.answer.wait()
        if self.refuses:
            raise PolicyRefused("no")


class Session:
    """What serves, and what failed in it."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def serve(self, work: Coroutine[Any, Any, None], name: str) -> None:
        del name
        self.tasks.append(asyncio.create_task(work))


def told(stream: bytes, sizes: Callable[[int], int] = lambda _: 1 << 20) -> tuple[list[Vm], int]:
    """The names that a stream told, and how many of its bytes had been seen by then."""
    names: list[Vm] = []
    naming = Naming(lambda work, _: work.close(), told=names.append)
    at = 0
    while at < len(stream) and not naming.known:
        size = sizes(at)
        naming.saw(memoryview(stream)[at : at + size])
        at += size
    return names, at


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_is_an_error_where_it_is_needed(name: str) -> None:
    with pytest.raises(HypervisorFailed, match="rename it"):
        told(guest_stream(name))


@pytest.mark.parametrize("name", ["vm1", "a name with spaces", "Kororā"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_any_other_is_told_once_however_the_stream_is_cut(name: str, size: int) -> None:
    names, _ = told(guest_stream(name), lambda _: size)
    assert [vm.name for vm in names] == [name]


def test_nothing_is_held_before_the_name_is_complete_and_all_after_it_until_the_answer() -> None:
    stream = guest_stream("vm1")

    async def story() -> None:
        asked, session = Asked(), Session()
        naming = Naming(session.serve, ask=asked)
        at = 0
        while not naming.holds:
            assert not naming.passed
            await naming.released()
            naming.saw(memoryview(stream)[at : at + 1])
            at += 1
        assert b"vm1" in stream[:at]
        waiting = asyncio.create_task(naming.released())
        await asyncio.sleep(0)
        assert [vm and vm.name for vm in asked.machines] == ["vm1"]
        assert not waiting.done()
        asked.answer.set()
        await waiting
        await naming.until_passed()

    run(story())


def test_a_no_releases_nothing_and_fails_the_session() -> None:
    async def story() -> None:
        asked, session = Asked(refuses=True), Session()
        naming = Naming(session.serve, ask=asked)
        naming.saw(memoryview(guest_stream("vm1")))
        asked.answer.set()
        with pytest.raises(PolicyRefused):
            await session.tasks[0]
        assert naming.holds
        assert not naming.passed

    run(story())


@pytest.mark.parametrize(
    "stream", [b"nothing that anybody knows", guest_stream(""), b"LibxlFmt" + bytes(64), b"QEVM\0\0\0\3" + bytes(64)]
)
def test_a_stream_without_a_name_is_asked_about_as_that(stream: bytes) -> None:
    async def story() -> None:
        asked, session = Asked(), Session()
        naming = Naming(session.serve, ask=asked)
        naming.saw(memoryview(stream))
        asked.answer.set()
        await naming.until_passed()
        assert [vm and vm.name for vm in asked.machines] in ([None], [""])

    run(story())


def test_a_stream_that_ends_early_or_never_tells_is_asked_about() -> None:
    async def story() -> None:
        for last in (Naming.ended, lambda naming: naming.saw(memoryview(bytes(1 << 20)))):
            asked, session = Asked(), Session()
            naming = Naming(session.serve, ask=asked)
            naming.saw(memoryview(b"Xen saved domain, xl format\n \0 \r"))
            assert not naming.holds
            last(naming)
            assert naming.holds
            asked.answer.set()
            await naming.until_passed()
            assert asked.machines == [None]

    run(story())

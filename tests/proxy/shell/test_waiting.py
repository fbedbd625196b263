"""Gates: one waiter, several causes, and a descriptor that wakes only who waits for it."""

import asyncio
import socket
import time

import pytest

from proxy.shell.waiting import Gate
from tests.proxy.support import run

A_FEW_TURNS = 20


async def turns() -> None:
    """Some turns of the loop, in which whatever is ready has its say."""
    for _ in range(A_FEW_TURNS):
        await asyncio.sleep(0)


def pair() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.setblocking(False)
    return near, far


def test_a_wake_up_wakes_the_waiter() -> None:
    async def story() -> None:
        gate = Gate()
        waiting = asyncio.ensure_future(gate.wait())
        await turns()
        assert not waiting.done()
        gate.wake()
        gate.wake()
        await waiting

    run(story())


def test_a_wake_up_without_a_waiter_is_not_kept() -> None:
    async def story() -> None:
        gate = Gate()
        gate.wake()
        waiting = asyncio.ensure_future(gate.wait())
        await turns()
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.wake()

    run(story())


def test_a_descriptor_wakes_who_waits_for_it() -> None:
    async def story() -> None:
        near, far = pair()
        with near, far:
            gate = Gate(near.fileno())
            waiting = asyncio.ensure_future(gate.wait_readable())
            await turns()
            assert not waiting.done()
            far.send(b"x")
            await waiting
            await gate.wait_readable()  # it can be read still
            await gate.wait_writable()
            gate.release()

    run(story())


def test_another_cause_wakes_who_waits_for_a_descriptor() -> None:
    async def story() -> None:
        near, far = pair()
        with near, far:
            gate = Gate(near.fileno())
            waiting = asyncio.ensure_future(gate.wait_readable())
            await turns()
            gate.wake()
            await waiting
            gate.release()

    run(story())


def test_a_descriptor_does_not_wake_who_waits_for_something_else() -> None:
    """A pump without credit beside a hypervisor that has more to say: it must sleep, not spin."""

    async def story() -> float:
        near, far = pair()
        with near, far:
            gate = Gate(near.fileno())
            waiting = asyncio.ensure_future(gate.wait_readable())
            await turns()
            far.send(b"more")
            await waiting
            began = time.process_time()
            waiting = asyncio.ensure_future(gate.wait())
            await asyncio.sleep(0.2)
            assert not waiting.done()
            spent = time.process_time() - began
            gate.wake()
            await waiting
            await gate.wait_readable()
            gate.release()
            return spent

    assert run(story()) < 0.1


def test_a_released_descriptor_may_be_closed_and_its_number_used_again() -> None:
    async def story() -> None:
        near, far = pair()
        gate = Gate(near.fileno())
        waiting = asyncio.ensure_future(gate.wait_readable())
        await turns()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.release()
        gate.release()
        near.close()
        other, another = pair()
        with far, other, another:
            again = Gate(other.fileno())
            waiting = asyncio.ensure_future(again.wait_readable())
            await turns()
            assert not waiting.done()
            another.send(b"x")
            await waiting
            again.release()

    run(story())


@pytest.mark.parametrize("wait", ["wait_readable", "wait_writable"])
def test_a_gate_without_a_descriptor_waits_for_events_only(wait: str) -> None:
    async def story() -> None:
        gate = Gate()
        waiting = asyncio.ensure_future(getattr(gate, wait)())
        await turns()
        assert not waiting.done()
        gate.wake()
        await waiting

    run(story())

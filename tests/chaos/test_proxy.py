"""The chaos proxy and the stand-ins do what they say: otherwise every scenario here could pass for nothing.

Why: a fault that is never injected, or a check that never fails, looks exactly like a robust relay.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from tests.attacks.relays import on_uvloop
from tests.attacks.wire import Kind, Way
from tests.chaos.faults import CALM, Faults, Link, Plan, only
from tests.chaos.load import KIB, MIB, Backend, Ends, Talk, WrongBytes, eventually, talk_through
from tests.chaos.proxy import ChaosProxy
from tests.chaos.proxy_process import ChaosProcess

CONTROL = b"\x16" + bytes(range(256)) * 8
SECONDS_MAX = 10.0
SILENCE_SECONDS = 0.4  # what takes longer than that
LANE = b"K" + bytes(range(256)) * 8


@dataclass(eq=False)
class Echo:
    """What stands behind the proxy: sends back all it gets, and remembers it."""

    port: int = 0
    got: list[bytearray] = field(default_factory=list)

    async def serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock:
            mine = bytearray()
            self.got.append(mine)
            try:
                while data := await loop.sock_recv(sock, 65536):
                    mine += data
                    await loop.sock_sendall(sock, data)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                return


@asynccontextmanager
async def echo() -> AsyncIterator[Echo]:
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    made = Echo(listener.getsockname()[1])

    async def accept() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                sock, _ = await loop.sock_accept(listener)
                sock.setblocking(False)
                group.create_task(made.serve(sock))

    task = asyncio.ensure_future(accept())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        listener.close()


async def through(port: int, words: bytes, seconds: float = SECONDS_MAX) -> tuple[bytes, str]:
    """Say that, half-close, and hear to the end: what came back, and how it ended."""
    loop = asyncio.get_running_loop()
    heard = bytearray()
    with socket.socket() as sock:
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
        except ConnectionRefusedError:
            return b"", "refused"
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_sendall(sock, words)
                sock.shutdown(socket.SHUT_WR)
                while data := await loop.sock_recv(sock, 65536):
                    heard += data
        except TimeoutError:
            return bytes(heard), "silence"
        except OSError:
            return bytes(heard), "reset"
    return bytes(heard), "eof"


def bits(a: bytes, b: bytes) -> list[int]:
    """Where two strings of one length differ, in bits."""
    assert len(a) == len(b)
    return [8 * at + bit for at, (x, y) in enumerate(zip(a, b, strict=True)) for bit in range(8) if (x ^ y) >> bit & 1]


FAULTS: dict[str, tuple[Faults, int | None, str]] = {
    "nothing": (Faults(), None, "eof"),
    "split": (Faults(split_bytes=5), None, "eof"),
    "delay": (Faults(delay_seconds=0.02, jitter_seconds=0.02), None, "eof"),
    "rate": (Faults(bytes_per_second=20_000), None, "eof"),
    "reset": (Faults(reset_at=1000), 1000, "reset"),
    "reset at once": (Faults(reset_at=0), 0, "reset"),
    "shut": (Faults(shut_at=1000), 1000, "eof"),
    "stall and swallow": (Faults(stall_at=1000), 1000, "silence"),
    "stall and hold": (Faults(stall_at=1000, swallow=False), 1000, "silence"),
}


@pytest.mark.parametrize("way", [Way.FORWARD, Way.BACKWARD])
@pytest.mark.parametrize("name", FAULTS)
@on_uvloop
async def test_each_fault_at_its_offset(name: str, way: Way) -> None:
    faults, arrives, ended = FAULTS[name]
    plan = Plan(forward=faults) if way is Way.FORWARD else Plan(backward=faults)
    async with echo() as behind, ChaosProxy(("127.0.0.1", behind.port), plan=only(Kind.LANE, plan)) as proxy:
        loop = asyncio.get_running_loop()
        began = loop.time()
        heard, how = await through(proxy.port, LANE, SILENCE_SECONDS if ended == "silence" else SECONDS_MAX)
        elapsed = loop.time() - began
        got = bytes(behind.got[0])
        assert how == ended
        assert LANE.startswith(got)
        assert LANE.startswith(heard)
        if ended == "reset":
            assert len(got) <= len(LANE)  # what was on its way may be lost with a reset
        elif arrives is None:
            assert got == heard == LANE
        else:
            assert len(got if way is Way.FORWARD else heard) == arrives
        assert (proxy.did.splits > len(LANE) // 5) == (name == "split")
        if name in {"delay", "rate"}:
            assert elapsed > 0.02
        # The other kind is left alone.
        assert await through(proxy.port, CONTROL) == (CONTROL, "eof")
        assert proxy.did.links == 2


@pytest.mark.parametrize("offset", [0, 1, 1000, len(LANE) - 1])
@on_uvloop
async def test_exactly_one_bit_is_flipped(offset: int) -> None:
    plan = only(Kind.LANE, Plan(forward=Faults(flip_at=offset)), range(1))
    async with echo() as behind, ChaosProxy(("127.0.0.1", behind.port), seed=offset, plan=plan) as proxy:
        heard, how = await through(proxy.port, LANE)
        assert how == "eof"
        (wrong,) = bits(heard, LANE)
        assert wrong // 8 == offset
        assert proxy.did.flips == 1
        assert await through(proxy.port, LANE) == (LANE, "eof"), "only the first lane"


@on_uvloop
async def test_a_seed_reproduces() -> None:
    plan = only(Kind.LANE, Plan(forward=Faults(flip_odds=1.0)))
    results = []
    async with echo() as behind:
        for seed in (1, 1, 2):
            async with ChaosProxy(("127.0.0.1", behind.port), seed=seed, plan=plan) as proxy:
                results.append((await through(proxy.port, LANE))[0])
    assert results[0] == results[1] != results[2]


@on_uvloop
async def test_orders() -> None:
    """Each hits what is open now, and what it says it did is what it did."""
    async with echo() as behind, ChaosProxy(("127.0.0.1", behind.port)) as proxy:
        loop = asyncio.get_running_loop()

        async def opened(words: bytes) -> socket.socket:
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", proxy.port))
            await loop.sock_sendall(sock, words)
            assert await loop.sock_recv(sock, 100) == words
            return sock

        control, lane = await opened(b"\x16"), await opened(b"K")
        with control, lane:
            assert [link.kind for link in proxy.links] == [Kind.CONTROL, Kind.LANE]
            proxy.flip(Kind.LANE, Way.BACKWARD)
            await loop.sock_sendall(lane, b"same")
            assert len(bits(await loop.sock_recv(lane, 4), b"same")) == 1
            proxy.stall(Kind.LANE, swallow=False)
            await loop.sock_sendall(lane, b"late")
            await loop.sock_sendall(control, b"soon")
            assert await loop.sock_recv(control, 100) == b"soon"
            proxy.release()
            assert await loop.sock_recv(lane, 100) == b"late"
            assert proxy.reset(Kind.LANE) == 1
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(lane, 100)
            await proxy.blackout(0.2, silence=False)
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(control, 100)
        assert (await through(proxy.port, LANE))[1] == "refused"
        await proxy.calm_again()
        assert await through(proxy.port, LANE) == (LANE, "eof")
        began = loop.time()
        await proxy.blackout(0.2, silence=True)
        assert await through(proxy.port, LANE) == (LANE, "eof")
        assert loop.time() - began >= 0.2
        assert (proxy.did.resets, proxy.did.blackouts, proxy.did.refusals, proxy.did.flips) == (2, 2, 1, 1)
        await eventually(lambda: not proxy.links)


@on_uvloop
async def test_as_a_process() -> None:
    async with echo() as behind, ChaosProcess(("127.0.0.1", behind.port), seed=3) as proxy:
        assert await through(proxy.port, LANE) == (LANE, "eof")
        await proxy.order("weather", forward={"reset_at": 100})
        assert (await through(proxy.port, LANE))[1] == "reset"
        await proxy.order("weather")
        await proxy.order("refuse", seconds=0.1)
        assert (await through(proxy.port, LANE))[1] == "refused"
        did = await proxy.order("reset", kind="lane")
        assert (did["links"], did["resets"], did["refusals"]) == (2, 1, 1)


# ------------------------------------------------------------------ the stand-ins


async def talked(plan: Plan, talk: Talk) -> Ends:
    """A talk with nothing between the hypervisors but the proxy."""
    async with Backend() as backend, ChaosProxy(("127.0.0.1", backend.port), plan=lambda _: plan) as proxy:
        return await talk_through(proxy.port, backend, talk)


@on_uvloop
async def test_a_talk_without_relays() -> None:
    ends = await talked(CALM, Talk(1, 3 * MIB, 2 * MIB, writes=(1, 1000, 100 * KIB)))
    assert ends.whole
    assert not ends.cut


@pytest.mark.parametrize("plan", [Plan(Faults(flip_at=100_000)), Plan(backward=Faults(flip_at=0))])
@on_uvloop
async def test_a_wrong_bit_is_an_error(plan: Plan) -> None:
    with pytest.raises(WrongBytes, match="other bytes than were sent"):
        await talked(plan, Talk(1, MIB, MIB))


@pytest.mark.parametrize("plan", [Plan(Faults(shut_at=MIB)), Plan(backward=Faults(shut_at=1000))])
@on_uvloop
async def test_a_clean_end_too_early_is_an_error(plan: Plan) -> None:
    with pytest.raises(WrongBytes, match="a clean end too early"):
        await talked(plan, Talk(1, 2 * MIB, MIB))


@pytest.mark.parametrize("plan", [Plan(Faults(reset_at=MIB)), Plan(backward=Faults(reset_at=1000))])
@on_uvloop
async def test_a_reset_is_a_cut(plan: Plan) -> None:
    ends = await talked(plan, Talk(1, 2 * MIB, MIB))
    assert ends.cut
    assert not ends.whole


@on_uvloop
async def test_a_hypervisor_that_dies() -> None:
    async with Backend() as backend:
        ends = await talk_through(backend.port, backend, Talk(1, 9 * MIB, MIB, near_dies_at=MIB))
        async with asyncio.timeout(SECONDS_MAX):
            far = await ends.coming  # it may hear of it later than we
    assert (ends.near.ended, far.ended) == ("died", "reset")
    assert ends.cut


def test_only_takes_the_first_few() -> None:
    plan = Plan(Faults(reset_at=1))
    choose = only(Kind.LANE, plan, range(2))
    with socket.socket() as sock:
        links = [Link(0, kind, index, sock, sock) for kind in (Kind.LANE, Kind.CONTROL) for index in range(3)]
        assert [choose(link) is plan for link in links] == [True, True, False, False, False, False]

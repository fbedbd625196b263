"""The chaos proxy in a process of its own, for load that should not share a loop with it.

    python -m tests.chaos.proxy_process --target 127.0.0.1:8010 --seed 7

It says its port as a line of JSON; then each line in is an order, each line out what it has done so far.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from typing import Any, Final, Self

import uvloop

from tests.attacks.wire import Kind, Way
from tests.chaos.faults import Faults, Plan
from tests.chaos.proxy import ChaosProxy

ORDER_SECONDS_MAX: Final = 20.0  # for an answer


class ChaosProcess:
    """Starts that process and gives it orders; an async context manager that ends it.

    Args:
        target: where the destination's relay listens.
        seed: see `ChaosProxy`.
    """

    def __init__(self, target: tuple[str, int], *, seed: int) -> None:
        self._target, self._seed = target, seed
        self._process: asyncio.subprocess.Process | None = None
        self._ordering = asyncio.Lock()
        self.port = 0
        self.did: dict[str, int] = {}
        """What it had done when it was last asked."""

    async def __aenter__(self) -> Self:
        """Start it and learn its port."""
        pipe = asyncio.subprocess.PIPE
        words = ("-m", "tests.chaos.proxy_process", "--target", f"{self._target[0]}:{self._target[1]}")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *words, "--seed", str(self._seed), stdin=pipe, stdout=pipe
        )
        self.port = (await self._answer())["port"]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End it."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(ORDER_SECONDS_MAX):
                await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    async def order(self, name: str, **arguments: Any) -> dict[str, int]:
        """Give one order, by the name of ChaosProxy's method; "tell" does nothing. What it has done so far."""
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._ordering:
            self._process.stdin.write(json.dumps({"order": name, **arguments}).encode() + b"\n")
            await self._process.stdin.drain()
            self.did = await self._answer()
        return self.did

    async def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(ORDER_SECONDS_MAX):
            line = await self._process.stdout.readline()
        assert line, "the chaos proxy has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


async def _obey(proxy: ChaosProxy, order: dict[str, Any]) -> None:
    """Carry out one order of the process's standard input."""
    name = order.pop("order")
    if "kind" in order:
        order["kind"] = Kind(order["kind"])
    if "way" in order:
        order["way"] = Way(order["way"])
    if name == "weather":
        proxy.weather(Plan(Faults(**order.get("forward", {})), Faults(**order.get("backward", {}))))
    elif name != "tell":
        assert name in {"reset", "shut", "stall", "release", "flip", "blackout", "refuse", "calm"}, name
        done = getattr(proxy, name)(**order)
        if asyncio.iscoroutine(done):
            await done


async def _serve_orders(target: str, seed: int) -> None:
    host, _, port = target.rpartition(":")
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with ChaosProxy((host, int(port)), seed=seed) as proxy:
        print(json.dumps({"port": proxy.port}), flush=True)
        while line := await reader.readline():
            await _obey(proxy, json.loads(line))
            print(json.dumps(asdict(proxy.did)), flush=True)


def main() -> int:
    """Serve orders until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.proxy_process")
    parser.add_argument("--target", required=True, metavar="HOST:PORT")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve_orders(options.target, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())

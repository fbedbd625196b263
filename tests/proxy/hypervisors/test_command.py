"""A short command: what it says, how it ends, and that nothing of it is left."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from proxy.hypervisors.command import run_command
from tests.attacks.relays import on_uvloop
from tests.proxy.support import until

SECONDS, BYTES = 20.0, 4096


async def say(script: str, *, seconds: float = SECONDS, bytes_max: int = BYTES) -> tuple[int, str | None, str | None]:
    return tuple(await run_command(["sh", "-c", script], seconds=seconds, bytes_max=bytes_max))


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def noted(path: Path) -> int:
    """The process id that a command writes down."""
    await until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())  # noqa: ASYNC240 - a few bytes


@on_uvloop
async def test_what_it_says_and_how_it_ends() -> None:
    before = descriptors()
    assert await say("echo out; echo err >&2; exit 3") == (3, "out\n", "err\n")
    assert await say("kill -9 $$") == (-9, "", "")
    assert await say("cat") == (0, "", "")  # it has no standard input
    assert descriptors() == before


@on_uvloop
async def test_much_on_both_streams_at_once() -> None:
    """More than a pipe holds: whoever read one after the other would wait for ever."""
    script = (
        f'{sys.executable} -c \'import os\nfor _ in range(64):\n  os.write(2, b"e" * 8192); os.write(1, b"o" * 8192)\''
    )
    assert await say(script, bytes_max=1 << 20) == (0, "o" * 524288, "e" * 524288)


@pytest.mark.parametrize("stream", ["1", "2"])
@on_uvloop
async def test_one_that_says_too_much_is_killed(stream: str) -> None:
    code, *said = await say(f"exec yes >&{stream}")
    assert (code, said[int(stream) - 1], said[2 - int(stream)]) == (-9, None, "")


@on_uvloop
async def test_one_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    before = descriptors()
    with pytest.raises(TimeoutError):
        await say(f"sleep 60 & echo $! >{tmp_path}/pid; wait", seconds=1.0)
    child = await noted(tmp_path / "pid")
    await until(lambda: not alive(child))
    assert descriptors() == before


@on_uvloop
async def test_nobody_waits_for_it_any_more(tmp_path: Path) -> None:
    before = descriptors()
    running = asyncio.create_task(say(f"sleep 60 & echo $! >{tmp_path}/pid; wait"))
    child = await noted(tmp_path / "pid")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not alive(child))
    assert descriptors() == before


@on_uvloop
async def test_the_relay_is_not_held_up_by_it() -> None:
    running = asyncio.create_task(say("sleep 60", seconds=1.0))
    turns = 0
    while not running.done():
        turns += 1
        await asyncio.sleep(0.01)
    assert turns > 10
    with pytest.raises(TimeoutError):
        await running


@on_uvloop
async def test_one_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        await run_command(["/nonexistent/xl"], seconds=SECONDS, bytes_max=BYTES)


@on_uvloop
async def test_without_a_descriptor_for_it_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", none)
    with pytest.raises(OSError, match="Too many"):
        await say(f"echo $$ >{tmp_path}/pid; exec sleep 60")
    if (tmp_path / "pid").exists():
        assert not alive(int((tmp_path / "pid").read_text()))

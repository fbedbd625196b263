"""exec: endpoints: a command's exit decides, and a failed session never looks like an end to it."""

import asyncio
import errno
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from crypto.tls import TlsConfig
from proxy.endpoints import pipes
from proxy.endpoints.base import Egress, Ingress
from proxy.endpoints.pipes import ExecEndpoint, ProcessConnection, StdioEndpoint, _ReadEnd, _WriteEnd, start
from proxy.errors import EXIT_HYPERVISOR, HypervisorFailed, exit_code_of
from tests.proxy.support import Ended, over_tcp, relays, run, until

STREAM = bytes(range(256)) * 5000
SECONDS_MAX = 10.0


def command(text: str) -> ExecEndpoint:
    return ExecEndpoint(text, f"exec:{text}")


def python(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def both(client: TlsConfig, server: TlsConfig, ingress: Ingress, egress: Egress) -> list[Ended]:
    """A session that begins and ends by itself."""

    async def session() -> list[Ended]:
        async with relays(client, server, ingress, egress) as pair:
            return list(await pair.ended())

    return run(session())


def into(client: TlsConfig, server: TlsConfig, egress: Egress, stream: bytes) -> tuple[list[Ended], bytes]:
    """A stream from a TCP hypervisor into a command; the ends, and what the command answered."""

    async def session() -> tuple[list[Ended], bytes]:
        hypervisors = over_tcp()
        try:
            async with relays(client, server, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                answer = b""
                try:
                    await near.send(stream)
                    near.shut()
                    answer = await near.to_end()
                except OSError:
                    answer = b"(reset)"
                return list(await pair.ended()), answer
        finally:
            hypervisors.close()

    return run(session())


def failures(ended: list[Ended]) -> list[str]:
    """What both sides say; each must have ended with code 7."""
    words = []
    for side in ended:
        assert side.error is not None
        assert exit_code_of(side.error) == EXIT_HYPERVISOR
        words.append(str(side.error))
    return words


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------ a command that works


def test_a_command_into_a_command(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    origin, target = tmp_path / "origin", tmp_path / "target"
    origin.write_bytes(STREAM)
    ended = both(client_tls, server_tls, command(f"cat {origin}"), command(f"cat > {target}"))
    assert [side.error for side in ended] == [None, None]
    assert target.read_bytes() == STREAM


def test_a_command_that_answers(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    ended, answer = into(client_tls, server_tls, command("wc -c"), STREAM)
    assert [side.error for side in ended] == [None, None]
    assert int(answer) == len(STREAM)


def test_a_command_that_closes_its_output_early_and_reads_on(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exec: of QEMU's own documentation: output closed is a half-close, its status is judged at its end."""
    monkeypatch.setattr(pipes, "EXEC_EXIT_SECONDS_MAX", 0.05)
    target = tmp_path / "target"
    ended, answer = into(client_tls, server_tls, command(f"exec >&-; cat > {target}"), STREAM)
    assert [side.error for side in ended] == [None, None]
    assert answer == b""
    assert target.read_bytes() == STREAM


def test_a_command_that_closes_its_output_early_and_then_fails(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "EXEC_EXIT_SECONDS_MAX", 0.05)
    ended, _ = into(client_tls, server_tls, command("exec >&-; cat > /dev/null; exit 9"), STREAM)
    assert all("status 9" in words for words in failures(ended))


# ------------------------------------------------------------------ a command that does not


def test_a_destination_command_that_fails(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """The migration is not done until the command has ended with status 0; the source is told."""
    ended, _ = into(client_tls, server_tls, command("cat > /dev/null; exit 3"), STREAM)
    assert all("status 3" in words for words in failures(ended))


def test_a_destination_command_that_is_killed(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    ended, _ = into(client_tls, server_tls, command("cat > /dev/null; kill -9 $$"), STREAM)
    assert all("SIGKILL" in words for words in failures(ended))


def test_a_destination_command_that_stops_reading(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    ended, answer = into(client_tls, server_tls, command("head -c 10 > /dev/null; exit 4"), STREAM * 4)
    failures(ended)
    assert answer == b"(reset)"


def test_a_destination_command_that_is_not_there(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    ended, _ = into(client_tls, server_tls, command("/nonexistent/command 2>/dev/null"), b"")
    assert all("status 127" in words for words in failures(ended))


@pytest.mark.parametrize(("end", "words"), [("exit 5", "status 5"), ("kill -9 $$", "SIGKILL")])
def test_a_source_command_that_fails_is_no_clean_end(
    client_tls: TlsConfig, server_tls: TlsConfig, end: str, words: str
) -> None:
    """A pipe ends the same way for a finished and a dead command; its status comes before END."""

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, command(f"echo begun; {end}"), hypervisors.egress) as pair:
                far = await hypervisors.accept()
                assert await far.exactly(6) == b"begun\n"
                assert await far.broken()
                source, destination = await pair.ended()
                assert words in str(source.error)
                failures([source, destination])
        finally:
            hypervisors.close()

    run(session())


# ------------------------------------------------------------------ a session that fails


def test_a_command_is_killed_before_its_input_closes(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """`cat > disk; boot` must not boot half a disk: it never sees the end of its input."""
    target, booted = tmp_path / "disk", tmp_path / "booted"

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            egress = command(f"cat > {target}; touch {booted}")
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.send(b"half of it")
                await until(lambda: target.exists() and target.read_bytes() == b"half of it")
                connection = pair.arriving[0].channels[next(iter(pair.arriving[0].channels))].connection
                assert isinstance(connection, ProcessConnection)
                near.reset()
                failures(list(await pair.ended()))
                assert not alive(connection._process.pid)
                assert connection._process.returncode == -signal.SIGKILL
        finally:
            hypervisors.close()

    run(session())
    assert not booted.exists()


def test_all_of_a_command_is_killed(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """What it has started is killed with it: the command leads a session of its own."""
    pids = tmp_path / "pids"

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            egress = command(f"sleep 600 & echo $! $$ > {pids}; wait")
            async with relays(client_tls, server_tls, hypervisors.ingress, egress) as pair:
                near = await hypervisors.connect()
                await near.send(b"x")
                await until(lambda: pids.exists() and pids.read_text().endswith("\n"))
                near.reset()
                await pair.ended()
                for pid in map(int, pids.read_text().split()):
                    assert os.getpgid(0) != pid
                    await until(lambda pid=pid: not alive(pid))
        finally:
            hypervisors.close()

    run(session())


def test_a_command_that_never_ends_is_ended(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the stream it has HANDOVER_SECONDS_MAX; then the session fails and nothing of it is left running."""
    monkeypatch.setattr(pipes, "HANDOVER_SECONDS_MAX", 0.2)
    monkeypatch.setattr(pipes, "EXEC_EXIT_SECONDS_MAX", 0.05)
    started: list[int] = []
    real = start

    def noted(argv: list[str], label: str, *, wind_down: bool) -> ProcessConnection:
        connection = real(argv, label, wind_down=wind_down)
        started.append(connection._process.pid)
        return connection

    monkeypatch.setattr(pipes, "start", noted)
    ended, _ = into(client_tls, server_tls, command("exec >&-; cat > /dev/null; exec sleep 600"), b"x")
    assert any("did not end" in words for words in failures(ended))
    (pid,) = started
    deadline = time.monotonic() + SECONDS_MAX
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_commands_leave_no_descriptor_behind(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "EXEC_EXIT_SECONDS_MAX", 0.02)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    into(client_tls, server_tls, command("cat"), b"x")
    before = descriptors()
    for text in ("cat", "cat > /dev/null; exit 1", "exit 0", "kill -9 $$", "exec >&-; cat > /dev/null; exit 2"):
        into(client_tls, server_tls, command(text), b"x")
    assert descriptors() <= before


def refuse(pid: int, number: int) -> None:
    del pid, number
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("how", ["abort", "settle"])
def test_a_command_that_may_not_be_killed_sees_no_clean_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It runs as another user: all that can be done is not to close its input, to say so, and not to wait for ever."""
    monkeypatch.setattr(pipes, "ABORT_SECONDS_MAX", 0.1)
    monkeypatch.setattr(pipes, "HANDOVER_SECONDS_MAX", 0.1)
    target, booted = tmp_path / "disk", tmp_path / "booted"
    text = f"cat > {target}; touch {booted}"

    async def story() -> None:
        connection = await command(text if how == "abort" else "exec sleep 600").connect("")
        process = connection._process
        try:
            connection.write(memoryview(b"half of it"))
            with monkeypatch.context() as patch, capture_logs() as logs:
                patch.setattr(os, "killpg", refuse)
                if how == "abort":
                    await until(lambda: target.exists() and target.read_bytes() == b"half of it")
                    await connection.abort()
                    assert "could not be killed" in logs[0]["event"]
                else:
                    with pytest.raises(HypervisorFailed, match="did not end"):
                        await connection.settle()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await asyncio.shield(connection._ended)
            assert not booted.exists()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await connection._ended
            connection._close()

    run(story())


def test_what_outlives_a_killed_command_sees_no_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sh -c 'sudo …'`: the shell is ours to kill, what it has started is not."""

    async def story() -> None:
        connection = await command("cat > /dev/null").connect("")
        real = os.killpg
        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(os, "killpg", lambda pid, number: real(pid, number) if number else refuse(pid, number))
            await connection.abort()
        assert connection._ended.done()
        assert [entry["log_level"] for entry in logs] == ["warning"]
        os.fstat(connection._writer.fd)
        connection._close()

    run(story())


# ------------------------------------------------------------------ a pipe that could not be reopened


def within(seconds: float, work: Callable[[], object]) -> object:
    """What the work gives; an error if it blocks."""
    got: list[object] = []
    worker = threading.Thread(target=lambda: got.append(work()), daemon=True)
    worker.start()
    worker.join(seconds)
    assert got, "it blocks"
    return got[0]


def test_a_blocking_pipe_is_never_waited_for() -> None:
    """Another user's standard stream cannot be reopened, and its O_NONBLOCK is its owner's."""
    near, far = os.pipe()
    reader, writer = _ReadEnd(near), _WriteEnd(far)
    buffer, chunk = memoryview(bytearray(1 << 20)), memoryview(bytes(1 << 20))
    assert within(SECONDS_MAX, lambda: reader.read_into(buffer)) is None

    def fill() -> int:
        taken = 0
        while count := writer.write(chunk):
            taken += count
        return taken

    taken = within(SECONDS_MAX, fill)
    assert isinstance(taken, int)
    assert taken >= select.PIPE_BUF
    assert within(SECONDS_MAX, lambda: reader.read_into(buffer)) == taken
    assert within(SECONDS_MAX, lambda: reader.read_into(buffer)) is None
    assert os.get_blocking(near)
    assert os.get_blocking(far)
    writer.close()
    assert within(SECONDS_MAX, lambda: reader.read_into(buffer)) == 0
    reader.close()


# ------------------------------------------------------------------ after the close


@pytest.mark.parametrize("kind", [_ReadEnd, _WriteEnd])
def test_a_closed_end_touches_no_descriptor_that_has_its_number_now(
    tmp_path: Path, kind: type[_ReadEnd] | type[_WriteEnd]
) -> None:
    innocent = tmp_path / "innocent"
    innocent.write_bytes(b"innocent")
    pair = os.pipe()
    number = pair[0] if kind is _ReadEnd else pair[1]
    end = kind(number)
    end.close()
    other = os.open(innocent, os.O_RDWR)
    os.dup2(other, number)
    try:
        act = end.read_into if isinstance(end, _ReadEnd) else end.write
        with pytest.raises(OSError, match="Bad file descriptor"):
            act(memoryview(bytearray(8)))
        end.close()
        assert os.fstat(number).st_ino == innocent.stat().st_ino, "closed once, not twice"
        assert innocent.read_bytes() == b"innocent"
    finally:
        for fd in {*pair, other}:
            os.close(fd)


# ------------------------------------------------------------------ standard input and output


@contextmanager
def streams() -> Iterator[tuple[int, int]]:
    """Pipes as the process's standard streams: what writes to its input, what reads from its output."""
    kept = os.dup(0), os.dup(1)
    (input_end, far_input), (far_output, output_end) = os.pipe(), os.pipe()
    os.dup2(input_end, 0)
    os.dup2(output_end, 1)
    os.close(input_end)
    os.close(output_end)
    try:
        yield far_input, far_output
    finally:
        os.dup2(kept[0], 0)
        os.dup2(kept[1], 1)
        for fd in (*kept, far_input, far_output):
            os.close(fd)


@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_the_standard_streams_serve_one_session(side: str) -> None:
    """What a second one wrote would go to /dev/null, and be called done."""
    endpoint = StdioEndpoint()

    async def story(far_input: int, far_output: int) -> None:
        first = await (endpoint.accept() if side == "ingress" else endpoint.connect(""))
        os.write(far_input, b"asked")
        assert first.read_into(memoryview(bytearray(8))) == 5
        assert first.write(memoryview(b"answered")) == 8
        await first.settle()
        assert os.read(far_output, 100) == b"answered"
        with pytest.raises(HypervisorFailed, match="stdio:: the standard streams have been used by an earlier session"):
            await (endpoint.accept() if side == "ingress" else endpoint.connect(""))

    with streams() as (far_input, far_output):
        run(story(far_input, far_output))

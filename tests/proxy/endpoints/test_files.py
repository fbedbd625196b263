"""file: endpoints: a file appears whole or not at all; FIFOs and devices are used directly."""

import asyncio
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from crypto.tls import TlsConfig
from proxy.endpoints import files
from proxy.endpoints.files import FileEgress, FileIngress, FileReader, FileWriter, SpecialWriter
from proxy.errors import EXIT_HYPERVISOR, ConfigurationError, HypervisorFailed, exit_code_of
from tests.proxy.support import Ended, Hypervisors, over_tcp, relays, run, until

needs_ordinary_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")

STREAM = bytes(range(256)) * 5000  # over one frame


def egress(path: Path) -> FileEgress:
    return FileEgress(str(path), f"file:{path}")


def ingress(path: Path) -> FileIngress:
    return FileIngress(str(path), f"file:{path}")


def partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


# ------------------------------------------------------------------ writing a regular file


def test_a_file_is_partial_until_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "guest"

    async def story() -> None:
        writer = await egress(target).connect("")
        assert isinstance(writer, FileWriter)
        assert writer.write(memoryview(b"half")) == 4
        assert partial(target).read_bytes() == b"half"
        assert stat.S_IMODE(partial(target).stat().st_mode) == 0o600
        writer.finish()
        assert not target.exists(), "the end of the stream is not yet the end of the session"
        await writer.settle()
        assert target.read_bytes() == b"half"
        assert not partial(target).exists()

    run(story())


def test_a_failed_session_leaves_nothing_and_what_stood_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "guest"
    target.write_bytes(b"yesterday's")

    async def story() -> None:
        writer = await egress(target).connect("")
        writer.write(memoryview(b"today's"))
        assert target.read_bytes() == b"yesterday's"
        await writer.abort()
        assert not partial(target).exists()
        assert target.read_bytes() == b"yesterday's"

    run(story())


def test_a_leftover_partial_file_is_begun_anew(tmp_path: Path) -> None:
    target = tmp_path / "guest"
    partial(target).write_bytes(b"left by a crash, and longer")

    async def story() -> None:
        writer = await egress(target).connect("")
        writer.write(memoryview(b"new"))
        await writer.settle()
        assert target.read_bytes() == b"new"

    run(story())


def test_two_sessions_do_not_write_one_file(tmp_path: Path) -> None:
    target = tmp_path / "guest"

    async def story() -> None:
        first = await egress(target).connect("")
        first.write(memoryview(b"first"))
        with pytest.raises(HypervisorFailed, match="another session is writing it"):
            await egress(target).connect("")
        await first.settle()
        assert target.read_bytes() == b"first"
        again = await egress(target).connect("")
        await again.abort()

    run(story())


def test_a_file_that_was_renamed_while_its_lock_was_awaited_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between another session's open and its lock the first may end: the name then belongs to a whole migration."""
    target = tmp_path / "guest"

    async def story() -> None:
        first = await egress(target).connect("")
        first.write(memoryview(b"a whole migration"))
        lock = fcntl.flock

        def slow(fd: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", lock)
            first._commit()  # type: ignore[union-attr]
            lock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", slow)
        second = await egress(target).connect("")
        assert target.read_bytes() == b"a whole migration"
        second.write(memoryview(b"the next one"))
        assert target.read_bytes() == b"a whole migration"
        await second.settle()
        assert target.read_bytes() == b"the next one"

    run(story())


def test_a_symbolic_link_is_not_followed_by_the_partial_file(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "guest"
    victim.write_bytes(b"precious")
    partial(target).symlink_to(victim)
    with pytest.raises(HypervisorFailed, match="cannot write"):
        run(egress(target).connect(""))
    assert victim.read_bytes() == b"precious"


def test_a_disk_that_refuses_at_the_end_fails_the_session_and_leaves_nothing(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "guest"

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    source, destination = into(client_tls, server_tls, egress(target), STREAM)
    for ended in (source, destination):
        assert ended.error is not None
        assert exit_code_of(ended.error) == EXIT_HYPERVISOR
    assert "No space left" in str(destination.error)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ through a pair


def to_partial(to: FileEgress) -> bytes:
    """What stands in the partial file by now."""
    path = partial(Path(to._path))
    return path.read_bytes() if path.exists() else b""


def into(client: TlsConfig, server: TlsConfig, to: FileEgress, stream: bytes, *, cut: bool = False) -> list[Ended]:
    """A stream from a TCP hypervisor into a file; `cut` resets it instead of ending it."""

    async def session() -> list[Ended]:
        hypervisors = over_tcp()
        try:
            async with relays(client, server, hypervisors.ingress, to) as pair:
                near = await hypervisors.connect()
                await near.send(stream)
                if cut:
                    await until(lambda: len(to_partial(to)) > 0)
                    near.reset()
                else:
                    near.shut()
                    assert await near.to_end() == b""
                return list(await pair.ended())
        finally:
            hypervisors.close()

    return run(session())


def test_a_stream_into_a_file(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    target = tmp_path / "guest"
    source, destination = into(client_tls, server_tls, egress(target), STREAM)
    assert (source.error, destination.error) == (None, None)
    assert target.read_bytes() == STREAM
    assert not partial(target).exists()
    assert destination.report.bytes_out == {"forward": len(STREAM), "backward": 0}


def test_an_empty_stream_into_a_file(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    target = tmp_path / "guest"
    source, destination = into(client_tls, server_tls, egress(target), b"")
    assert (source.error, destination.error) == (None, None)
    assert target.read_bytes() == b""


def test_a_cut_stream_into_a_file(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    target = tmp_path / "guest"
    target.write_bytes(b"yesterday's")
    for ended in into(client_tls, server_tls, egress(target), STREAM, cut=True):
        assert ended.error is not None
        assert exit_code_of(ended.error) == EXIT_HYPERVISOR
    assert target.read_bytes() == b"yesterday's"
    assert not partial(target).exists()


def test_a_second_channel_into_a_file_is_refused(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    target = tmp_path / "guest"

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, egress(target)) as pair:
                first = await hypervisors.connect()
                await first.send(b"one")
                second = await hypervisors.connect()
                await first.refused()
                assert await second.broken()
                for ended in await pair.ended():
                    assert ended.error is not None
                    assert exit_code_of(ended.error) == EXIT_HYPERVISOR
                    assert "one channel" in str(ended.error)
        finally:
            hypervisors.close()

    run(session())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, len(STREAM)])
def test_a_file_to_a_file(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig, size: int) -> None:
    origin, target = tmp_path / "origin", tmp_path / "target"
    origin.write_bytes(STREAM[:size])

    async def session() -> None:
        async with relays(client_tls, server_tls, ingress(origin), egress(target)) as pair:
            await pair.ended_well()

    run(session())
    assert target.read_bytes() == origin.read_bytes() == STREAM[:size]


def test_a_file_that_is_answered(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """A saved domain cannot hear: bytes that come back are a failure, not something to drop silently."""
    origin = tmp_path / "origin"
    origin.write_bytes(STREAM)

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, ingress(origin), hypervisors.egress) as pair:
                far = await hypervisors.accept()
                await far.send(b"hello?")
                source, destination = await pair.ended()
                assert "one-way" in str(source.error)
                assert destination.error is not None
                assert exit_code_of(destination.error) == EXIT_HYPERVISOR
        finally:
            hypervisors.close()

    run(session())


# ------------------------------------------------------------------ FIFOs and devices


async def in_thread(work: Callable[[], bytes]) -> bytes:
    return await asyncio.to_thread(work)


def test_a_fifo_into_a_fifo(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    origin, target = tmp_path / "origin", tmp_path / "target"
    os.mkfifo(origin)
    os.mkfifo(target)

    def write() -> bytes:
        origin.write_bytes(STREAM)
        return b""

    async def session() -> None:
        async with relays(client_tls, server_tls, ingress(origin), egress(target)) as pair:
            _, got = await asyncio.gather(in_thread(write), in_thread(target.read_bytes))
            assert got == STREAM
            await pair.ended_well()

    run(session())
    assert stat.S_ISFIFO(target.stat().st_mode), "written directly, never replaced"
    assert not partial(target).exists()


def test_a_fifo_that_nobody_has_opened_yet_is_waited_for(tmp_path: Path) -> None:
    """Without a writer a FIFO reads as ended: that must not be taken for an empty migration."""
    origin = tmp_path / "origin"
    os.mkfifo(origin)
    reader = FileReader(str(origin), "fifo")
    buffer = memoryview(bytearray(100))
    assert reader.read_into(buffer) is None
    descriptor = os.open(origin, os.O_WRONLY)
    assert reader.read_into(buffer) is None
    os.write(descriptor, b"begun")
    assert reader.read_into(buffer) == 5
    assert reader.read_into(buffer) is None
    os.close(descriptor)
    assert reader.read_into(buffer) == 0
    run(reader.settle())


def test_a_fifo_whose_writer_says_nothing_has_ended(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    origin = tmp_path / "origin"
    os.mkfifo(origin)

    def touch() -> bytes:
        os.close(os.open(origin, os.O_WRONLY))
        return b""

    async def session() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, ingress(origin), hypervisors.egress) as pair:
                far = await hypervisors.accept()
                await in_thread(touch)
                assert await far.to_end() == b""
                far.shut()
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(session())


def test_a_fifo_without_a_reader_fails_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    os.mkfifo(target)
    monkeypatch.setattr(files, "CONNECT_SECONDS_MAX", 0.15)
    with pytest.raises(HypervisorFailed, match="no answer in time"):
        run(egress(target).connect(""))


def test_a_fifo_whose_reader_goes_fails_the_session(
    tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    target = tmp_path / "target"
    os.mkfifo(target)

    async def session() -> None:
        hypervisors: Hypervisors = over_tcp()
        try:
            async with relays(client_tls, server_tls, hypervisors.ingress, egress(target)) as pair:
                reader = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
                near = await hypervisors.connect()
                await near.send(b"x")
                await until(lambda: pair.arriving and pair.arriving[0].session.receivers)
                os.close(reader)
                await near.refused()
                for ended in await pair.ended():
                    assert ended.error is not None
                    assert exit_code_of(ended.error) == EXIT_HYPERVISOR
        finally:
            hypervisors.close()

    run(session())


def test_a_device_is_written_directly(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    source, destination = into(client_tls, server_tls, FileEgress("/dev/null", "file:/dev/null"), STREAM)
    assert (source.error, destination.error) == (None, None)
    assert destination.report.bytes_out["forward"] == len(STREAM)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_full_device_fails_the_session(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    source, destination = into(client_tls, server_tls, FileEgress("/dev/full", "file:/dev/full"), b"x")
    assert "No space left" in str(destination.error)
    assert source.error is not None
    assert exit_code_of(source.error) == EXIT_HYPERVISOR


def test_a_device_as_ingress(tmp_path: Path, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    target = tmp_path / "target"

    async def session() -> None:
        async with relays(client_tls, server_tls, ingress(Path("/dev/null")), egress(target)) as pair:
            await pair.ended_well()

    run(session())
    assert target.read_bytes() == b""


# ------------------------------------------------------------------ checked before the first session


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path, tmp_path / "absent" / "deeper"):
        with pytest.raises(ConfigurationError, match="cannot read") as refused:
            run(ingress(path).open())
        assert refused.value.remedy


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "file"):
        with pytest.raises(ConfigurationError, match="cannot write") as refused:
            run(egress(path).check())
        assert refused.value.remedy
    run(egress(tmp_path / "fine").check())
    assert list(tmp_path.iterdir()) == [], "a check leaves no trace"


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/file", "x" * 250])
def test_a_name_too_long_is_found_out_before_the_migration(tmp_path: Path, name: str) -> None:
    """The third is so only with what is appended to a file that is not whole."""
    with pytest.raises(ConfigurationError, match="cannot write"):
        run(egress(tmp_path / name).check())


def test_a_directory_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    async def story() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", refuse)
            patch.setattr(os, "lstat", refuse)
            await egress(tmp_path / "file").check()

    with pytest.raises(ConfigurationError, match="cannot write"):
        run(story())


@needs_ordinary_user
def test_what_may_not_be_read_or_written(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"")
    secret.chmod(0)
    with pytest.raises(ConfigurationError):
        run(ingress(secret).open())
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError):
        run(egress(tmp_path / "new").check())


def test_a_file_that_vanishes_before_it_is_opened(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.write_bytes(b"x")
    run(ingress(origin).open())
    origin.unlink()
    with pytest.raises(HypervisorFailed, match="cannot read"):
        run(ingress(origin).accept())


def test_special_files_are_told_from_regular_ones(tmp_path: Path) -> None:
    async def story() -> None:
        assert isinstance(await FileEgress("/dev/null", "null").connect(""), SpecialWriter)
        writer = await egress(tmp_path / "regular").connect("")
        assert isinstance(writer, FileWriter)
        assert writer.read_into(memoryview(bytearray(1))) == 0
        await writer.abort()

    run(story())


# ------------------------------------------------------------------ after the close


async def opened(tmp_path: Path, kind: str) -> FileReader | FileWriter | SpecialWriter:
    origin = tmp_path / "origin"
    match kind:
        case "reader":
            origin.write_bytes(b"x")
            return await ingress(origin).accept()
        case "fifo":
            os.mkfifo(origin)
            return await ingress(origin).accept()
        case "writer":
            return await egress(tmp_path / "target").connect("")
    return await egress(Path("/dev/null")).connect("")


@pytest.mark.parametrize("kind", ["reader", "fifo", "writer", "special"])
@pytest.mark.parametrize("how", ["settle", "abort"])
def test_a_closed_file_touches_no_descriptor_that_has_its_number_now(tmp_path: Path, kind: str, how: str) -> None:
    async def story() -> None:
        connection = await opened(tmp_path, kind)
        number = connection._fd
        await getattr(connection, how)()
        innocent = tmp_path / "innocent"
        innocent.write_bytes(b"innocent")
        other = os.open(innocent, os.O_RDWR)
        os.dup2(other, number)
        try:
            act = connection.read_into if isinstance(connection, FileReader) else connection.write
            with pytest.raises(OSError, match="Bad file descriptor"):
                act(memoryview(bytearray(8)))
            await connection.abort()
            assert innocent.read_bytes() == b"innocent"
            assert os.fstat(number).st_ino == innocent.stat().st_ino, "closed once, not twice"
        finally:
            for fd in {number, other}:
                os.close(fd)

    run(story())


def test_a_file_called_off_while_it_is_made_final_stays_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next session may have begun its own partial file by then: that must not be renamed into place."""
    target = tmp_path / "guest"
    syncing, go_on = threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        del fd
        syncing.set()
        go_on.wait(10)

    async def story() -> None:
        first = await egress(target).connect("")
        first.write(memoryview(b"called off"))
        monkeypatch.setattr(os, "fsync", slow)
        settling = asyncio.ensure_future(first.settle())
        await asyncio.to_thread(syncing.wait, 10)
        await first.abort()
        second = await egress(target).connect("")
        second.write(memoryview(b"half of the next"))
        go_on.set()
        with pytest.raises(HypervisorFailed):
            await settling
        assert not target.exists()
        assert partial(target).read_bytes() == b"half of the next"
        await second.abort()

    run(story())

"""tcp: and unix: endpoints: who may listen, what is left behind, and what a hypervisor sees when a relay goes."""

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from proxy.endpoints import sockets
from proxy.endpoints.sockets import (
    SocketConnection,
    TcpEgress,
    TcpIngress,
    UnixEgress,
    UnixIngress,
    dial_tcp,
    explain,
    listen_tcp,
)
from proxy.errors import ConfigurationError, HypervisorFailed
from tests.proxy.support import Wire, run

LOOPBACK = "127.0.0.1"


def unix_ingress(path: Path) -> UnixIngress:
    return UnixIngress(str(path), f"unix:{path}")


async def tcp_pair() -> tuple[SocketConnection, Wire]:
    """A relay's connection, and the hypervisor's end of it."""
    loop = asyncio.get_running_loop()
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.setblocking(False)
        connecting = asyncio.ensure_future(dial_tcp(LOOPBACK, listener.getsockname()[1]))
        sock, _ = await loop.sock_accept(listener)
        return SocketConnection(await connecting, "tcp:test"), Wire(sock)


# ------------------------------------------------------------------ listening on TCP


def test_a_port_in_use_is_a_configuration_error() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        ingress = TcpIngress(LOOPBACK, port, f"tcp:{LOOPBACK}:{port}")
        with pytest.raises(ConfigurationError, match="in use") as refused:
            run(ingress.open())
        assert "another port" in refused.value.remedy


def test_a_port_is_free_again_at_once() -> None:
    first = listen_tcp(LOOPBACK, 0, "first")
    port = first.getsockname()[1]
    with socket.create_connection((LOOPBACK, port)):
        accepted, _ = _accept(first)
        accepted.close()
    first.close()
    listen_tcp(LOOPBACK, port, "second").close()


def _accept(listener: socket.socket) -> tuple[socket.socket, object]:
    listener.setblocking(True)
    return listener.accept()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        listen_tcp(host, 0, f"{host}:0")
    assert "address of this host" in refused.value.remedy


def test_port_0_is_named_once_it_is_known() -> None:
    async def story() -> None:
        ingress = TcpIngress(LOOPBACK, 0, f"tcp:{LOOPBACK}:0")
        await ingress.open()
        port = int(ingress.label.rpartition(":")[2])
        assert port > 0
        accepting = asyncio.ensure_future(ingress.accept())
        wire = Wire(await dial_tcp(LOOPBACK, port))
        connection = await accepting
        assert connection.label == ingress.label
        await connection.settle()
        wire.close()
        await ingress.close()

    run(story())


def test_ipv6() -> None:
    async def story() -> None:
        try:
            listener = listen_tcp("::1", 0, "[::1]:0")
        except ConfigurationError:
            pytest.skip("no IPv6 here")
        dialled = await dial_tcp("::1", listener.getsockname()[1])
        dialled.close()
        listener.close()

    run(story())


def test_a_closed_ingress_accepts_nothing() -> None:
    async def story() -> None:
        ingress = TcpIngress(LOOPBACK, 0, "tcp:x")
        await ingress.open()
        await ingress.close()
        await ingress.close()
        with pytest.raises(HypervisorFailed):
            await ingress.accept()

    run(story())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_an_ingress_outlives_a_shortage(number: int) -> None:
    """A long-lived `send` must not end because other sessions have every descriptor for a moment."""

    class Short(socket.socket):
        refusals = 2

        def accept(self) -> tuple[socket.socket, object]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(number, os.strerror(number))
            return super().accept()

    async def story() -> None:
        ingress = TcpIngress(LOOPBACK, 0, f"tcp:{LOOPBACK}:0")
        await ingress.open()
        assert ingress._sock is not None
        ingress._sock = Short(fileno=ingress._sock.detach())
        ingress._sock.setblocking(False)
        wire = Wire(await dial_tcp(LOOPBACK, ingress._sock.getsockname()[1]))
        connection = await ingress.accept()
        assert ingress._sock.refusals == 0
        await connection.settle()
        wire.close()
        await ingress.close()

    run(story())


# ------------------------------------------------------------------ listening on a unix socket


def test_a_unix_socket_is_its_owners_alone_and_goes_with_its_listener(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "vm.sock"
        before = os.umask(0)
        try:
            ingress = unix_ingress(path)
            await ingress.open()
        finally:
            assert os.umask(before) == 0, "the process's umask is as it was"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await ingress.close()
        assert not path.exists()

    run(story())


def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    assert path.exists()

    async def story() -> None:
        ingress = unix_ingress(path)
        await ingress.open()
        accepting = asyncio.ensure_future(ingress.accept())
        near = await UnixEgress(str(path), "unix:test").connect("")
        assert near.write(memoryview(b"x")) == 1
        far = await accepting
        await near.settle()
        await far.settle()
        await ingress.close()

    run(story())


def test_a_living_unix_socket_is_neither_taken_nor_probed(tmp_path: Path) -> None:
    """A QEMU that waits there would take a connection for its migration."""
    path = tmp_path / "vm.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        other.setblocking(False)
        for spelled in (path, tmp_path / "." / "vm.sock"):
            with pytest.raises(ConfigurationError, match="another process listens there"):
                run(unix_ingress(spelled).open())
        with pytest.raises(BlockingIOError):
            other.accept()
    assert path.exists()


def test_a_living_unix_socket_by_another_name_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound by a relative path, or reached through a link: the kernel's table knows only the name it was bound by."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind("vm.sock")
        other.listen()
        (tmp_path / "link").symlink_to(tmp_path)
        for spelled in (tmp_path / "vm.sock", Path("vm.sock"), tmp_path / "link" / "vm.sock"):
            with pytest.raises(ConfigurationError):
                run(unix_ingress(spelled).open())
        assert (tmp_path / "vm.sock").exists()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "vm.sock"
    path.write_bytes(b"precious")
    with pytest.raises(ConfigurationError, match="no socket"):
        run(unix_ingress(path).open())
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("path", ["/nonexistent/vm.sock", "/" + "x" * 200])
def test_a_path_that_cannot_be_bound(path: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen") as refused:
        run(unix_ingress(Path(path)).open())
    assert refused.value.remedy


def test_another_relays_socket_is_not_removed_at_close(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "vm.sock"
        first = unix_ingress(path)
        await first.open()
        path.unlink()
        second = unix_ingress(path)
        await second.open()
        await first.close()
        assert path.exists()
        await second.close()
        assert not path.exists()

    run(story())


# ------------------------------------------------------------------ connecting


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))
        egress = TcpEgress(LOOPBACK, unused.getsockname()[1], "tcp:nobody")
        with pytest.raises(HypervisorFailed, match="tcp:nobody: Connection refused"):
            run(egress.connect(""))
    with pytest.raises(HypervisorFailed, match="No such file"):
        run(UnixEgress(str(tmp_path / "absent"), "unix:absent").connect(""))


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(HypervisorFailed, match="does not resolve"):
        run(TcpEgress("no-such-host.invalid", 1, "tcp:no-such-host.invalid:1").connect(""))


def test_a_hypervisor_whose_backlog_is_full_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unix socket has no connection in progress: a full backlog refuses at once, and must not pass for connected."""
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        egress = UnixEgress(str(path), "unix:full")

        async def story() -> None:
            first = await egress.connect("")
            waiting = asyncio.ensure_future(egress.connect(""))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            ends = [_accept(listener)[0]]
            second = await waiting
            assert second.write(memoryview(b"through")) == 7
            ends.append(_accept(listener)[0])
            assert ends[1].recv(100) == b"through"
            third = await egress.connect("")
            monkeypatch.setattr(sockets, "CONNECT_SECONDS_MAX", 0.1)
            with pytest.raises(HypervisorFailed, match="cannot connect to the hypervisor at unix:full: no answer"):
                await egress.connect("")
            for end in ends:
                end.close()
            for connection in (first, second, third):
                await connection.settle()

        run(story())


def test_checks_touch_nothing() -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.setblocking(False)
        run(TcpEgress(LOOPBACK, listener.getsockname()[1], "tcp:x").check())
        with pytest.raises(BlockingIOError):
            listener.accept()


# ------------------------------------------------------------------ a connection


def test_a_connection_never_blocks() -> None:
    async def story() -> None:
        connection, wire = await tcp_pair()
        buffer = memoryview(bytearray(100))
        assert connection.read_into(buffer) is None
        chunk, taken = memoryview(bytes(1 << 20)), 0
        while count := connection.write(chunk):
            taken += count
        assert taken > 0
        assert connection.read_fd == connection.write_fd
        await connection.abort()
        wire.close()

    run(story())


def test_an_abort_is_a_reset_and_a_settlement_is_not() -> None:
    async def story() -> None:
        connection, wire = await tcp_pair()
        connection.write(memoryview(b"cut"))
        await connection.abort()
        assert await wire.broken()
        wire.close()

        connection, wire = await tcp_pair()
        connection.write(memoryview(b"whole"))
        connection.finish()
        await connection.settle()
        assert await wire.to_end() == b"whole"
        wire.close()

    run(story())


def test_whatever_closes_it_before_its_end_is_a_reset() -> None:
    """A crash of the relay is a close by the kernel: SO_LINGER 0 from the first moment makes a reset of it."""

    async def story() -> None:
        connection, wire = await tcp_pair()
        connection.write(memoryview(b"cut"))
        os.close(connection._sock.detach())
        assert await wire.broken()
        wire.close()

    run(story())


def test_half_closing_towards_one_who_has_gone() -> None:
    async def story() -> None:
        connection, wire = await tcp_pair()
        wire.reset()
        loop = asyncio.get_running_loop()
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(connection._sock, 1)
        connection.finish()
        await connection.settle()

    run(story())


async def delivering(folder: Path, kind: str) -> tuple[SocketConnection, socket.socket]:
    """An egress's connection, and the destination's hypervisor at its other end."""
    family, address = (socket.AF_INET, (LOOPBACK, 0)) if kind == "tcp" else (socket.AF_UNIX, str(folder / "vm.sock"))
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        port = listener.getsockname()[1]
        egress = TcpEgress(LOOPBACK, port, "tcp:test") if kind == "tcp" else UnixEgress(str(address), "unix:test")
        connection = await egress.connect("")
        return connection, listener.accept()[0]


def test_a_destination_that_was_gone_before_the_last_write_is_a_failure(tmp_path: Path) -> None:
    """It has closed, everything read until then: the kernel takes what is written next, and throws it away."""

    async def story() -> None:
        connection, hypervisor = await delivering(tmp_path, "tcp")
        connection.write(memoryview(b"most"))
        assert hypervisor.recv(100) == b"most"
        hypervisor.close()
        assert connection.read_into(memoryview(bytearray(8))) == 0
        assert connection.write(memoryview(b"the tail")) == 8
        with pytest.raises(HypervisorFailed, match="tcp:test was gone before the end of the stream"):
            connection.finish()
        await connection.abort()

    run(story())


def test_a_destination_that_closes_without_reading_the_end_is_a_failure(tmp_path: Path) -> None:
    async def story() -> None:
        connection, hypervisor = await delivering(tmp_path, "unix")
        hypervisor.shutdown(socket.SHUT_WR)
        assert connection.read_into(memoryview(bytearray(8))) == 0
        assert connection.write(memoryview(b"the tail")) == 8
        connection.finish()
        hypervisor.close()
        with pytest.raises(HypervisorFailed, match="unix:test did not take the end of the stream"):
            await connection.settle()
        await connection.abort()

    run(story())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_destination_that_closes_with_everything_read_is_none(tmp_path: Path, kind: str) -> None:
    async def story() -> None:
        connection, hypervisor = await delivering(tmp_path, kind)
        connection.write(memoryview(b"all of it"))
        assert hypervisor.recv(100) == b"all of it"
        hypervisor.close()
        assert connection.read_into(memoryview(bytearray(8))) == 0
        connection.finish()
        await connection.settle()

    run(story())


def test_connections_are_tuned() -> None:
    async def story() -> None:
        connection, wire = await tcp_pair()
        sock = connection._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == b"\1\0\0\0\0\0\0\0"
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        await connection.settle()
        wire.close()

    run(story())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "no answer in time"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), "Connection refused"),
        (socket.gaierror(-2, "Name or service not known"), "the name does not resolve (Name or service not known)"),
        (HypervisorFailed("it left"), "it left"),
        (ValueError(), "ValueError"),
        (TimeoutError(errno.ETIMEDOUT, "x"), "Connection timed out"),
    ],
)
def test_reasons_for_people(error: Exception, words: str) -> None:
    assert explain(error) == words

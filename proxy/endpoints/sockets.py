"""tcp: and unix: endpoints, on raw non-blocking sockets.

Every TCP connection to a hypervisor carries SO_LINGER 0 from its first moment to its clean end: whatever else closes
it, a crash or SIGKILL of the relay included, the hypervisor sees a reset and never a clean end of a cut stream.
"""

import asyncio
import errno
import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import structlog

from proxy.errors import ConfigurationError, HypervisorFailed
from proxy.limits import CONNECT_SECONDS_MAX, LISTEN_BACKLOG

_LINGER_RESET: Final = struct.pack("ii", 1, 0)
_LINGER_NORMAL: Final = struct.pack("ii", 0, 0)
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_BACKLOG_POLL_SECONDS: Final = 0.02  # a full backlog can only be asked again
_ACCEPT_AGAIN_SECONDS: Final = 0.1  # for descriptors or memory to become free; the connection waits in the backlog
_SHORT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

log = structlog.get_logger("korora.endpoints")


def tune(sock: socket.socket) -> None:
    """Make a connected socket non-blocking, without Nagle's delay, watched by keep-alives.

    Where both ends are on this host the congestion control becomes reno: a pacing one (BBR, a common default) sends
    by timer what loopback could take at once, at up to twice the CPU time. A real network keeps what its
    administrator chose.
    """
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    with suppress(OSError):  # the peer may have gone already, or a kernel may not offer the choice
        if sock.getpeername()[0] == sock.getsockname()[0]:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _user_behind(sock: socket.socket) -> int | None:
    """The uid of the process at the other end of a unix socket (``SO_PEERCRED``, unix(7)); None of any other."""
    if sock.family != socket.AF_UNIX:
        return None
    uid: int = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
    return uid


class SocketConnection:
    """A connected stream socket.

    Args:
        sock: connected; this object owns it from now on.
        label: the endpoint as the operator wrote it.
        delivers: whether its hypervisor receives the migration. It must then have taken all of it; a source may go
            without reading its tail.
    """

    def __init__(self, sock: socket.socket, label: str, *, delivers: bool = False) -> None:
        tune(sock)
        self._delivers = delivers
        self._sock = sock
        self._tcp = sock.family != socket.AF_UNIX
        self.label = label
        self.user = _user_behind(sock)
        self.read_fd: int | None = sock.fileno()
        self.write_fd: int | None = sock.fileno()
        self._linger(_LINGER_RESET)

    def _linger(self, value: bytes) -> None:
        if self._tcp:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)

    def read_into(self, buffer: memoryview) -> int | None:
        """See ``Connection.read_into``."""
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            return None

    def write(self, data: memoryview) -> int:
        """See ``Connection.write``."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    def finish(self) -> None:
        """Shut the write side down; a source's hypervisor may have gone already, which is its right.

        Raises:
            HypervisorFailed: a destination's has, and what was written last went nowhere.
        """
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            if self._delivers:
                raise HypervisorFailed(f"{self.label} was gone before the end of the stream") from None

    async def settle(self) -> None:
        """Close in peace: both directions have ended.

        Raises:
            HypervisorFailed: the destination's hypervisor has thrown away what was written last.
        """
        if self._delivers and (number := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            raise HypervisorFailed(f"{self.label} did not take the end of the stream: {os.strerror(number)}")
        self._linger(_LINGER_NORMAL)
        self._sock.close()

    async def abort(self) -> None:
        """Reset (TCP) or close (unix, where known formats notice that the end is short)."""
        self._sock.close()


class _SocketIngress:
    """What the two listening ingresses share."""

    single = False

    def __init__(self, label: str) -> None:
        self.label = label
        self._sock: socket.socket | None = None

    @property
    def listener(self) -> socket.socket | None:
        """The listening socket, still ours; None while there is none."""
        return self._sock

    async def accept(self) -> SocketConnection:
        """See ``Ingress.accept``."""
        if self._sock is None:
            raise HypervisorFailed(f"{self.label} is closed")
        while True:
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                await readable(self._sock.fileno())
                continue
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno in _SHORT_OF_RESOURCES:
                    log.warning("a hypervisor's connection must wait", endpoint=self.label, reason=explain(error))
                    await asyncio.sleep(_ACCEPT_AGAIN_SECONDS)
                    continue
                raise HypervisorFailed(f"{self.label} takes no connection: {explain(error)}") from None
            return SocketConnection(sock, self.label)

    async def close(self) -> None:
        """See ``Ingress.close``."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class GivenIngress(_SocketIngress):
    """Takes the local hypervisor's connections from a socket that somebody else has bound.

    Args:
        sock: listening and non-blocking; this object owns it from now on. Its address is its giver's to remove.
        label: the endpoint as the operator wrote it.
    """

    def __init__(self, sock: socket.socket, label: str) -> None:
        super().__init__(label)
        self._sock = sock

    async def open(self) -> None:
        """It is open already."""


async def readable(fd: int) -> None:
    """Wait until a descriptor can be read, or has failed.

    Not the loop's sock_accept: cancelled between its accept and our waking, it would drop whom it had accepted.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def listen_tcp(host: str, port: int, label: str) -> socket.socket:
    """A non-blocking listening socket.

    Raises:
        ConfigurationError: the address cannot be resolved or bound.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigurationError(
            f"{label}: {host!r} is no local address ({error})", "give an address of this host"
        ) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        remedy = "choose another port, or stop what listens there (ss -ltnp shows it)"
        if error.errno == errno.EACCES:
            remedy = "choose a port of 1024 or higher, or grant CAP_NET_BIND_SERVICE"
        elif error.errno == errno.EADDRNOTAVAIL:
            remedy = "give an address of this host (ip address shows them)"
        raise ConfigurationError(f"cannot listen on {label}: {os.strerror(error.errno or 0)}", remedy) from None
    sock.setblocking(False)
    return sock


class TcpIngress(_SocketIngress):
    """Listens for the local hypervisor on TCP."""

    def __init__(self, host: str, port: int, label: str) -> None:
        super().__init__(label)
        self._host, self._port = host, port

    async def open(self) -> None:
        """See ``Ingress.open``. With port 0 the label then names the port chosen."""
        self._sock = listen_tcp(self._host, self._port, self.label)
        if self._port == 0:
            self.label = f"tcp:{self._host}:{self._sock.getsockname()[1]}"


class UnixIngress(_SocketIngress):
    """Listens for the local hypervisor on a unix socket, mode 0600."""

    def __init__(self, path: str, label: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        super().__init__(label)
        self._path, self._kind = path, kind
        self._inode: int | None = None

    async def open(self) -> None:
        """See ``Ingress.open``. A socket nobody listens on any more is replaced, a living one is not."""
        _clear_stale(self._path, self.label)
        sock = socket.socket(socket.AF_UNIX, self._kind)
        try:
            before = os.umask(0o177)
            try:
                sock.bind(self._path)
            finally:
                os.umask(before)
            sock.listen(LISTEN_BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigurationError(
                f"cannot listen on {self.label}: {error.strerror or error}",
                "give a path (at most 107 bytes) in a directory that exists and that you may write",
            ) from None
        sock.setblocking(False)
        self._sock = sock
        self._inode = os.stat(self._path).st_ino

    async def close(self) -> None:
        """See ``Ingress.close``. Removes the socket's file if it is still ours."""
        await super().close()
        try:
            if self._inode is not None and os.stat(self._path).st_ino == self._inode:
                Path(self._path).unlink()
        except OSError:
            return


def _clear_stale(path: str, label: str) -> None:
    """Remove a socket file that nobody answers on.

    Raises:
        ConfigurationError: something else is there, or somebody listens.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"cannot listen on {label}: the path exists and is no socket", "choose another path")
    # Asked of the kernel, never by connecting: a QEMU that waits there would take the probe for its migration.
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
        bound = [fields[7].rstrip("\n") for line in table if len(fields := line.split(None, 7)) > 7]
    if not any(_same_socket(name, path) for name in bound):
        Path(path).unlink(missing_ok=True)
        return
    raise ConfigurationError(
        f"cannot listen on {label}: another process listens there", "choose another path, or stop that process"
    )


def _same_socket(name: str, path: str) -> bool:
    """Whether a socket bound by ``name`` may be the one at ``path``; nobody knows where a relative name belongs."""
    real = os.path.realpath(path)
    if not os.path.isabs(name):
        return os.path.basename(name) == os.path.basename(real)
    return os.path.realpath(name) == real


class TcpEgress:
    """Connects to the local hypervisor on TCP; never probes it."""

    single = False
    exclusive = False
    handover: Literal["", "xl"] = ""
    paused = False

    def __init__(self, host: str, port: int, label: str) -> None:
        self._host, self._port, self.label = host, port, label

    async def check(self) -> None:
        """Nothing can be checked: QEMU takes its first connection as the migration."""

    async def connect(self, xl_flags: str) -> SocketConnection:
        """See ``Egress.connect``."""
        del xl_flags
        try:
            sock = await dial_tcp(self._host, self._port, reset=True)
        except (OSError, TimeoutError) as error:
            raise HypervisorFailed(f"cannot connect to the hypervisor at {self.label}: {explain(error)}") from None
        return SocketConnection(sock, self.label, delivers=True)


class UnixEgress:
    """Connects to the local hypervisor on a unix socket."""

    single = False
    exclusive = False
    handover: Literal["", "xl"] = ""
    paused = False

    def __init__(self, path: str, label: str) -> None:
        self._path, self.label = path, label

    async def check(self) -> None:
        """Nothing can be checked before the hypervisor is connected to."""

    async def connect(self, xl_flags: str) -> SocketConnection:
        """See ``Egress.connect``."""
        del xl_flags
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                while not _connected(sock, self._path):  # noqa: ASYNC110 - nothing tells when there is room
                    await asyncio.sleep(_BACKLOG_POLL_SECONDS)
        except (OSError, TimeoutError) as error:
            sock.close()
            raise HypervisorFailed(f"cannot connect to the hypervisor at {self.label}: {explain(error)}") from None
        except BaseException:
            sock.close()
            raise
        return SocketConnection(sock, self.label, delivers=True)


def _connected(sock: socket.socket, path: str) -> bool:
    """Connect now, or say that the listener's backlog is full: unix(7) has no connection in progress to wait for.

    The loops' ``sock_connect`` takes that answer for one, and gives back a socket that is not connected.
    """
    try:
        sock.connect(path)
    except BlockingIOError:
        return False
    return True


async def dial_tcp(host: str, port: int, *, reset: bool = False) -> socket.socket:
    """A connected, non-blocking TCP socket; the addresses of ``host`` are tried in turn.

    Args:
        host: a name or an address.
        port: 1 to 65535.
        reset: closing it resets the connection, from before it exists: a hypervisor that has accepted it must not take
            a cancellation on our side for a clean end.

    Raises:
        OSError: none of them answered; the last one's reason.
        TimeoutError: not within ``CONNECT_SECONDS_MAX``.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(CONNECT_SECONDS_MAX):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        failure: OSError = OSError(errno.EHOSTUNREACH, "no address")
        for family, kind, proto, _, address in found:
            sock = socket.socket(family, kind, proto)
            sock.setblocking(False)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            try:
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
            else:
                tune(sock)
                return sock
        raise failure


def explain(error: BaseException) -> str:
    """A short reason for people."""
    if isinstance(error, TimeoutError) and not getattr(error, "errno", None):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return f"the name does not resolve ({error.strerror})"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__

"""stdio: and exec: endpoints, and what xl: has in common with them: pipes, and the processes behind them."""

import asyncio
import errno
import os
import select
import signal
import socket
import stat
import subprocess
from contextlib import suppress
from typing import Final, Literal

import structlog

from proxy.endpoints.files import grow_pipe
from proxy.endpoints.sockets import explain
from proxy.errors import ConfigurationError, HypervisorFailed
from proxy.limits import ABORT_SECONDS_MAX, EXEC_EXIT_SECONDS_MAX, HANDOVER_SECONDS_MAX, WIND_DOWN_SECONDS_MAX

log = structlog.get_logger("korora.endpoints")

_CLOSED: Final = -1  # in place of a number that may be somebody else's descriptor by now
_DRAIN_BYTES: Final = 64 * 1024
_DRAIN_POLL_SECONDS: Final = 0.02


def own_description(fd: int, flags: int) -> int:
    """A descriptor for the same stream that can be used without waiting, and without harm to who else has it.

    O_NONBLOCK belongs to the description, which a standard stream shares with whoever started us: setting it there
    would break them. A socket cannot be reopened; it is duplicated and used with MSG_DONTWAIT. A file never blocks, and
    reopened it would begin at its start: what ``>>`` was to follow would be overwritten.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        return os.dup(fd)
    try:
        own = os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # A pipe of another user, or a terminal that is not ours to open: share it, blocking or not.
        return os.dup(fd)
    if stat.S_ISFIFO(mode):
        grow_pipe(own)
    return own


def _asked_first(fd: int, event: int) -> "select.poll | None":
    """What tells whether a descriptor can be used now, for one whose use would wait; None where it would not.

    Only what could not be reopened waits: its O_NONBLOCK is not ours to set.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode) or not os.get_blocking(fd):
        return None
    poll = select.poll()
    poll.register(fd, event)
    return poll


class _ReadEnd:
    """One descriptor to read from."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        mode = os.fstat(fd).st_mode
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(mode) else None
        self.wait_fd = None if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else fd
        self._poll = _asked_first(fd, select.POLLIN)

    def read_into(self, buffer: memoryview) -> int | None:
        if self._poll is not None and self.fd != _CLOSED and not self._poll.poll(0):
            return None
        try:
            if self._socket is not None:
                return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            return os.readv(self.fd, [buffer])
        except BlockingIOError:
            return None

    def close(self) -> None:
        fd, self.fd = self.fd, _CLOSED
        if fd != _CLOSED:
            if self._socket is not None:
                self._socket.close()
            os.close(fd)


class _WriteEnd:
    """One descriptor to write to."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        mode = os.fstat(fd).st_mode
        self._socket = socket.socket(fileno=os.dup(fd)) if stat.S_ISSOCK(mode) else None
        self.wait_fd = None if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else fd
        self._poll = _asked_first(fd, select.POLLOUT)

    def write(self, data: memoryview) -> int:
        if self._poll is not None and self.fd != _CLOSED:
            if not self._poll.poll(0):
                return 0
            data = data[: select.PIPE_BUF]  # no more is sure to fit into a pipe that is writable
        try:
            if self._socket is not None:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            return os.write(self.fd, data)
        except BlockingIOError:
            return 0

    def finish(self) -> None:
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
        else:
            self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, _CLOSED
        if fd != _CLOSED:
            if self._socket is not None:
                self._socket.close()
            os.close(fd)


class PipeConnection:
    """Two descriptors, one each way: standard input and output, or a command's."""

    def __init__(self, reader: _ReadEnd, writer: _WriteEnd, label: str, user: int | None = None) -> None:
        self.label = label
        self.user: int | None = os.getuid() if user is None else user
        self._reader, self._writer = reader, writer
        self.read_fd: int | None = reader.wait_fd
        self.write_fd: int | None = writer.wait_fd

    def read_into(self, buffer: memoryview) -> int | None:
        """See ``Connection.read_into``."""
        return self._reader.read_into(buffer)

    def write(self, data: memoryview) -> int:
        """See ``Connection.write``."""
        return self._writer.write(data)

    def finish(self) -> None:
        """Close what the other end reads; the last bytes are in its pipe already."""
        self._writer.finish()

    async def settle(self) -> None:
        """Close both."""
        self._close()

    async def abort(self) -> None:
        """Close both: the end stays short, which known formats notice and the exit code says."""
        self._close()

    def _close(self) -> None:
        self._writer.close()
        self._reader.close()


def ends(reader: int, writer: int) -> tuple[_ReadEnd, _WriteEnd]:
    """What a ``PipeConnection`` is made of; it owns both descriptors from then on."""
    made = _ReadEnd(reader)
    try:
        return made, _WriteEnd(writer)
    except BaseException:
        made.close()
        raise


class StdioEndpoint:
    """Standard input and output, as ingress and as egress."""

    single = True
    exclusive = True
    handover: Literal["", "xl"] = ""
    paused = False

    def __init__(self, label: str = "stdio:") -> None:
        self.label = label
        self._used = False

    async def open(self) -> None:
        """See ``Ingress.open``."""
        self._check(0, "standard input")

    async def check(self) -> None:
        """See ``Egress.check``."""
        self._check(1, "standard output")

    def _check(self, stream: int, name: str) -> None:
        """The stream the migration takes must not be a terminal, and neither may be closed."""
        for fd in (0, 1):
            try:
                os.fstat(fd)
            except OSError:
                raise ConfigurationError(
                    f"{self.label}: descriptor {fd} is closed", "redirect it to a pipe, a file or /dev/null"
                ) from None
        if os.isatty(stream):
            raise ConfigurationError(f"{self.label}: {name} is a terminal", "redirect it: a migration is no text")

    async def accept(self) -> PipeConnection:
        """See ``Ingress.accept``."""
        return self._connection()

    async def connect(self, xl_flags: str) -> PipeConnection:
        """See ``Egress.connect``."""
        del xl_flags
        return self._connection()

    def _connection(self) -> PipeConnection:
        if self._used:
            # They lead to /dev/null by now: a migration written there would be called done, and be lost.
            raise HypervisorFailed(f"{self.label}: the standard streams have been used by an earlier session")
        self._used = True
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # Nobody migrates from a keyboard: a terminal as the far side's standard input has nothing to say.
        reader = os.dup(null) if os.isatty(0) else own_description(0, os.O_RDONLY)
        writer = own_description(1, os.O_WRONLY)
        # Our own copies would keep the pipes open after we have finished with them.
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        return PipeConnection(_ReadEnd(reader), _WriteEnd(writer), self.label)

    async def close(self) -> None:
        """Nothing was left behind."""


class ProcessConnection(PipeConnection):
    """A command's standard input and output; the command is a session leader of its own.

    Args:
        process: started with pipes on both.
        label: the endpoint as the operator wrote it.
        wind_down: end it on failure by closing its input and reading on (xl), not by killing it.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", label: str, *, wind_down: bool) -> None:
        if process.stdin is None or process.stdout is None:
            raise HypervisorFailed(f"{label}: started without pipes")
        ends = []
        for stream in (process.stdout, process.stdin):
            fd = os.dup(stream.fileno())
            stream.close()
            os.set_blocking(fd, False)
            grow_pipe(fd)
            ends.append(fd)
        super().__init__(_ReadEnd(ends[0]), _WriteEnd(ends[1]), label)
        self._process = process
        self.pid = process.pid
        self._wind_down = wind_down
        self._ended = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        if not self._ended.done():
            self._ended.set_result(status)

    async def ended_well(self) -> None:
        """The output has ended: if the command ends too, its status decides whether that was a clean end.

        Raises:
            HypervisorFailed: it ended with a status other than 0.
        """
        try:
            async with asyncio.timeout(EXEC_EXIT_SECONDS_MAX):
                self._judge(await asyncio.shield(self._ended))
        except TimeoutError:
            return  # it reads on: half-closed, and judged in settle()

    def _judge(self, status: int) -> None:
        if status < 0:
            raise HypervisorFailed(f"{self.label} was killed by {signal.Signals(-status).name}")
        if status > 0:
            raise HypervisorFailed(f"{self.label} ended with status {status}")

    async def settle(self) -> None:
        """Close its input, wait for it, read its status.

        Raises:
            HypervisorFailed: it does not end, or ends with a status other than 0.
        """
        self._writer.close()
        try:
            async with asyncio.timeout(HANDOVER_SECONDS_MAX):
                status = await asyncio.shield(self._ended)
        except TimeoutError:
            raise HypervisorFailed(f"{self.label} did not end in {HANDOVER_SECONDS_MAX:.0f} s") from None
        finally:
            if not self._wind_down:
                await self._kill()  # nothing if it has ended; xl is never killed once it may have taken the domain
            self._reader.close()
        self._judge(status)

    async def abort(self) -> None:
        """Kill it before its input closes, so that it cannot take the end for a clean one; or wind it down."""
        if self._wind_down:
            await self._unwind()
        await self._kill()
        if self._ended.done() and not self._outlived():
            self._close()
            return
        # It runs as another user, or hangs in the kernel: a closed input would be a clean end to it.
        log.warning(
            "a command could not be killed; its input stays open until this process ends",
            command=self.label,
            pid=self._process.pid,
        )
        self._reader.close()

    def leave(self) -> None:
        """Kill it, then close: it must not see an end, at which xl migrate-receive would destroy what it has received.

        What it has made stays as it is, for whoever goes on.
        """
        if not self._ended.done():
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._close()

    async def _kill(self) -> None:
        """Kill all of it, and wait a little for its end."""
        if not self._ended.done():
            with suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.wait({self._ended}, timeout=ABORT_SECONDS_MAX)

    def _outlived(self) -> bool:
        """Whether something it has started as another user (sudo) lives on without it."""
        try:
            os.killpg(self._process.pid, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return False  # ours, and killed

    async def _unwind(self) -> None:
        """xl migrate-receive's only clean abort: shut its input, read its answer, let it destroy its copy."""
        self._writer.close()
        buffer = memoryview(bytearray(_DRAIN_BYTES))
        try:
            async with asyncio.timeout(WIND_DOWN_SECONDS_MAX):
                while not self._ended.done():
                    match self._reader.read_into(buffer):
                        case None:
                            await asyncio.wait({self._ended}, timeout=_DRAIN_POLL_SECONDS)
                        case 0:
                            await asyncio.wait({self._ended})
                        case _:
                            await asyncio.sleep(0)
        except (OSError, TimeoutError):
            return


class ExecEndpoint:
    """A shell command, as ingress and as egress."""

    single = True
    exclusive = True
    handover: Literal["", "xl"] = ""
    paused = False

    def __init__(self, command: str, label: str) -> None:
        self._command, self.label = command, label

    async def open(self) -> None:
        """See ``Ingress.open``: a command cannot be tried."""

    async def check(self) -> None:
        """See ``Egress.check``: a command cannot be tried."""

    async def accept(self) -> ProcessConnection:
        """See ``Ingress.accept``."""
        return start(["/bin/sh", "-c", self._command], self.label, wind_down=False)

    async def connect(self, xl_flags: str) -> ProcessConnection:
        """See ``Egress.connect``."""
        del xl_flags
        return await self.accept()

    async def close(self) -> None:
        """The command belongs to its connection."""


def start(command: list[str], label: str, *, wind_down: bool) -> ProcessConnection:
    """Start a command with pipes, in a session of its own.

    Raises:
        HypervisorFailed: it cannot be started.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
        )
    except OSError as error:
        raise HypervisorFailed(f"cannot start {label}: {explain(error)}") from None
    return ProcessConnection(process, label, wind_down=wind_down)

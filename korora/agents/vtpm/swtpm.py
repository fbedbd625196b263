"""swtpm, asked and told over its sockets. Everything blocks, for a bounded time: callers are in threads.

swtpm serves one client at a time: whoever comes second is not refused, but waits. So a connection lasts as long as one
question, and silence is told apart from a refusal.
"""

import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from korora.agents.vtpm import commands, ctrl
from korora.agents.vtpm.ctrl import Blob, Command, Config, StateBlob
from proxy.errors import VtpmFailed

ANSWER_SECONDS_MAX: Final = 5.0  # a TPM's slowest commands make RSA keys, and nothing here asks for one
GONE_SECONDS_MAX: Final = 5.0  # from SHUTDOWN to the end of the process: it writes a few KiB
_POLL_SECONDS: Final = 0.005
_PIECE_BYTES: Final = 64 * 1024
_NOT_RUNNING: Final = 0x0A  # TPM_BAD_ORDINAL, by which swtpm says so


class Swtpm:
    """One emulator, by the unix socket of its control channel.

    Args:
        control: that socket.

    Every method raises VtpmFailed where the emulator is not there, does not answer in time or refuses.
    """

    def __init__(self, control: Path) -> None:
        self.control = control

    # ---- what there is

    @property
    def listens(self) -> bool:
        """Whether a process listens at the socket; one that is busy with somebody else does, too."""
        with _socket() as sock:
            try:
                sock.connect(str(self.control))
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                    return False
                if error.errno == errno.EAGAIN:
                    return True  # others are waiting there
                raise VtpmFailed(f"{self.control} cannot be reached: {error.strerror or error}") from None
        return True

    def running(self) -> bool:
        """Whether its TPM is initialised: whether whoever speaks to it gets answers from it."""
        code = ctrl.result(self._exchange(Command.GET_TPMESTABLISHED, ctrl.request(Command.GET_TPMESTABLISHED)))
        if code not in (ctrl.TPM_SUCCESS, _NOT_RUNNING):
            raise VtpmFailed(f"swtpm does not say whether its TPM runs (0x{code:x})")
        return code == ctrl.TPM_SUCCESS

    def config(self) -> Config:
        """Which keys it has."""
        return ctrl.config_of(self._ask(Command.GET_CONFIG, ctrl.request(Command.GET_CONFIG)))

    # ---- its state

    def export(self, *, off: bool = False) -> tuple[StateBlob, ...]:
        """All of a running TPM's state, encrypted under the migration key.

        Reading the volatile part removes what is stored of it: ``store`` comes afterwards.

        Args:
            off: its machine is off: the permanent part is all there is, as after any power cut.

        Raises:
            VtpmFailed: also where it has no such key, or gives a part of it in clear.
        """
        if not self.config() & Config.MIGRATION_KEY:
            raise VtpmFailed("swtpm has no migration key, so its state would leave in clear", ctrl.KEY_REMEDY)
        blobs = tuple(
            ctrl.state_of(blob, self._ask(Command.GET_STATEBLOB, ctrl.get_state(blob))) for blob in _parts(off=off)
        )
        for blob in blobs:
            blob.require_sealed()
        return blobs

    def require_idle(self) -> None:
        """That its TPM is not running, and so nobody's.

        Raises:
            VtpmFailed: it is.
        """
        if self.running():
            raise VtpmFailed(
                f"the vTPM at {self.control} is running, so it is somebody's",
                "start the swtpm of the arriving machine, and leave it uninitialised",
            )

    def load(self, blobs: tuple[StateBlob, ...], *, off: bool = False, sealed: bool = True) -> None:
        """Give a TPM that is not running all of its state; ``start`` brings it up with that.

        Args:
            blobs: the parts.
            off: its machine is off; see ``export``.
            sealed: whether they have to be encrypted.

        Raises:
            VtpmFailed: also where a part is missing or twice, or it refuses one; then the emulator is ended.
        """
        if tuple(blob.type for blob in blobs) != _parts(off=off):
            raise VtpmFailed(
                "not both parts of a vTPM's state: without the volatile one its PCRs and sessions would be lost"
            )
        for blob in blobs:
            if sealed:
                blob.require_sealed()
        self.require_idle()
        try:
            for blob in blobs:
                self._ask(Command.SET_STATEBLOB, ctrl.set_state(blob))
        except VtpmFailed:
            self.end()  # it would start even so, with a TPM that is new
            raise

    def start(self, flags: int = 0) -> None:
        """INIT: with the state that it was given, or else with what is stored; ``flags`` are of ``ctrl.init``."""
        self._ask(Command.INIT, ctrl.init(flags))

    def store(self) -> None:
        """Store the volatile state, so that ``start`` goes on where the TPM was."""
        self._ask(Command.STORE_VOLATILE, ctrl.request(Command.STORE_VOLATILE))

    def stop(self) -> None:
        """STOP: the process stays, the TPM answers nobody. What was read of it before is the newest there is."""
        self._ask(Command.STOP, ctrl.request(Command.STOP))

    def end(self) -> None:
        """SHUTDOWN: end the process, and wait until it has gone. Nothing if it has.

        The only way to make it forget what it was given: STOP keeps that, and to SET nothing in its place leaves a TPM
        behind that has no PCRs.
        """
        if not self.listens:
            return
        try:
            self.stop()  # first: a TPM that runs would store its state anew while it ends
            self._ask(Command.SHUTDOWN, ctrl.request(Command.SHUTDOWN))
        except VtpmFailed:
            if self.listens:
                raise
        deadline = time.monotonic() + GONE_SECONDS_MAX
        while self.listens:
            if time.monotonic() > deadline:
                raise VtpmFailed(f"the swtpm at {self.control} does not end")
            time.sleep(_POLL_SECONDS)

    def _ask(self, command: Command, message: bytes) -> bytes:
        return ctrl.require(command, self._exchange(command, message))

    def _connect(self, sock: socket.socket) -> None:
        """Its backlog is one connection, and what was closed there counts until it has been served."""
        deadline = time.monotonic() + ANSWER_SECONDS_MAX
        while True:
            try:
                sock.connect(str(self.control))
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError from None
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _exchange(self, command: Command, message: bytes) -> bytes:
        with _socket() as sock:
            try:
                self._connect(sock)
                sock.sendall(message)
                return receive(sock, lambda begun: ctrl.answer_bytes(command, begun))
            except TimeoutError:
                raise VtpmFailed(
                    f"the swtpm at {self.control} does not answer {command.name}: somebody else has its channel",
                    "only one process may be connected there: a QEMU with that emulator carries its state itself",
                ) from None
            except OSError as error:
                raise VtpmFailed(
                    f"the swtpm at {self.control} cannot be asked: {error.strerror or error}",
                    "see that it runs, with --ctrl type=unixio there",
                ) from None


class Held(Swtpm):
    """An emulator whose control channel is one connection of ours, which nobody else can have.

    Args:
        sock: that connection.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(Path("(its own)"))
        self._sock = sock
        sock.settimeout(ANSWER_SECONDS_MAX)

    def _exchange(self, command: Command, message: bytes) -> bytes:
        try:
            self._sock.sendall(message)
            answer = receive(self._sock, lambda begun: ctrl.answer_bytes(command, begun))
        except OSError as error:
            raise VtpmFailed(f"a swtpm does not answer {command.name}: {error.strerror or error}") from None
        return answer


class Tpm:
    """A TPM, by a connection to its data channel: one command at a time.

    Args:
        sock: connected.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(ANSWER_SECONDS_MAX)

    def ask(self, command: bytes) -> commands.Response:
        """Its response, whatever it says.

        Raises:
            VtpmFailed: there is none.
        """
        try:
            self._sock.sendall(command)
            return commands.Response.parse(receive(self._sock, commands.response_bytes))
        except OSError as error:
            raise VtpmFailed(f"the vTPM does not answer: {error.strerror or error}") from None


def receive(sock: socket.socket, wanted: Callable[[bytes], int]) -> bytes:
    """As many bytes as ``wanted`` says of what is there.

    Raises:
        OSError: it ends before, or takes too long.
    """
    deadline = time.monotonic() + ANSWER_SECONDS_MAX
    begun = bytearray()
    while (missing := wanted(bytes(begun)) - len(begun)) > 0:
        if time.monotonic() > deadline:
            raise TimeoutError
        piece = sock.recv(min(missing, _PIECE_BYTES))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "it has closed the connection")
        begun += piece
    return bytes(begun)


def _parts(*, off: bool) -> tuple[Blob, ...]:
    return (Blob.PERMANENT,) if off else (Blob.PERMANENT, Blob.VOLATILE)


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(ANSWER_SECONDS_MAX)
    return sock

"""Where people approve: a unix socket, one JSON object a line. The kernel says who is at its other end.

Any user of the host may connect, for the policy names those who are heard; each is shown only what he may answer, what
he began himself, or, as root or the relay's own user, all.
"""

import asyncio
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import structlog

from korora.policy.board import Board, Listed, Session
from proxy.endpoints.sockets import UnixIngress
from proxy.errors import ConfigurationError, PolicyRefused
from proxy.limits import KIB, MIB

log = structlog.get_logger("korora.policy")

SOCKET_DEFAULT: Final = Path("/run/korora/approve.sock")
SOCKET_MODE: Final = 0o666  # who is heard is the policy's to say
LINE_BYTES_MAX: Final = 4 * KIB  # of a request: two digests and some words
CONNECTIONS_MAX: Final = 64
CONNECTIONS_PER_USER_MAX: Final = 4  # so that no user of the host keeps the others out
IDLE_SECONDS_MAX: Final = 10.0  # a connection that asks nothing is closed; people think between two of them
ANSWER_SECONDS_MAX: Final = 10.0  # for the client: a file is written meanwhile
ANSWER_BYTES_MAX: Final = 32 * MIB  # a thousand requests of 16 KiB, and what is between them
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid; unix(7)


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="command", tag=str.lower):
    """Tagged by its class's name in small letters."""


class Waiting(_Asked, frozen=True):
    """What waits."""


class Say(_Asked, frozen=True, kw_only=True):
    """Yes or no to one of them."""

    session: Session
    side: Literal["source", "destination"]
    digest: str
    approved: bool


class Desk:
    """Serves the socket.

    Args:
        path: of the socket; a dead one there is replaced.
        board: where requests and answers are.
    """

    def __init__(self, path: str, board: Board) -> None:
        self._path, self._board = path, board
        self._ingress = UnixIngress(path, f"unix:{path}")
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], int] = {}
        self._decoder: msgspec.json.Decoder[Waiting | Say] = msgspec.json.Decoder(Waiting | Say)

    async def start(self) -> None:
        """Begin to serve.

        Raises:
            ConfigurationError: it cannot be listened on.
        """
        await self._ingress.open()
        if self._ingress.listener is None:
            raise RuntimeError(f"{self._path} is open, and has no socket")
        try:
            os.chmod(self._path, SOCKET_MODE)
        except OSError as error:
            raise ConfigurationError(f"{self._path}: {error.strerror}", "give the socket another path") from None
        self._server = await asyncio.start_unix_server(
            self._connected, sock=self._ingress.listener.dup(), limit=LINE_BYTES_MAX
        )

    async def close(self) -> None:
        """Stop serving, and remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self._ingress.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        uid = _uid(writer.get_extra_info("socket"))
        if task is None or not self._has_room(uid):
            writer.close()
            return
        self._open[task] = uid
        try:
            with suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(IDLE_SECONDS_MAX):
                        line = await reader.readline()
                        if not line:
                            return
                        writer.write(msgspec.json.encode(await self._answered(line, uid)) + b"\n")
                        await writer.drain()
        except (OSError, ValueError):  # asyncio's word for a line that is too long
            return
        finally:
            del self._open[task]
            writer.close()

    def _has_room(self, uid: int) -> bool:
        users = Counter(self._open.values())
        return users.total() < CONNECTIONS_MAX and users[uid] < CONNECTIONS_PER_USER_MAX

    async def _answered(self, line: bytes, uid: int) -> dict[str, Any]:
        try:
            match self._decoder.decode(line):
                case Waiting():
                    waiting = await asyncio.to_thread(self._board.waiting)
                    return {"ok": True, "waiting": [each for each in waiting if _may_see(each, uid)]}
                case Say() as said:
                    after = await asyncio.to_thread(
                        self._board.answer, said.session, said.side, said.digest, uid, approved=said.approved
                    )
                    return {"ok": True, "waiting": [after]}
        except msgspec.MsgspecError as error:
            return {"ok": False, "error": f"no request: {error}"}
        except PolicyRefused as error:
            return {"ok": False, "refused": True, "error": str(error)}


def _uid(sock: socket.socket) -> int:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid


def _may_see(listed: Listed, uid: int) -> bool:
    return uid in {0, os.geteuid(), listed.request.initiator, *listed.request.users}


# ---------------------------------------------------------------- the other end of it


class _Reply(msgspec.Struct, frozen=True):
    ok: bool
    waiting: tuple[Listed, ...] = ()
    refused: bool = False
    error: str = ""


class Client:
    """One connection to a desk. Use ``connected``."""

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self._path, self._sock = path, sock
        self._stream = sock.makefile("rb")

    def waiting(self) -> tuple[Listed, ...]:
        """What waits, and this user may see.

        Raises:
            ConfigurationError: the relay does not answer.
        """
        return self._ask(Waiting())

    def say(self, listed: Listed, *, approved: bool) -> Listed:
        """Yes or no to one of them; how it stands then.

        Raises:
            PolicyRefused: this user's answer does not count, or something else waits by now.
            ConfigurationError: the relay does not answer.
        """
        request = listed.request
        said = Say(session=request.session, side=request.facts.side, digest=listed.digest, approved=approved)
        return self._ask(said)[0]

    def _ask(self, asked: Waiting | Say) -> tuple[Listed, ...]:
        try:
            self._sock.sendall(msgspec.json.encode(asked) + b"\n")
            reply = msgspec.json.decode(self._stream.readline(ANSWER_BYTES_MAX), type=_Reply)
        except (OSError, msgspec.MsgspecError):
            raise ConfigurationError(
                f"the relay at {self._path} does not answer", "its log says why; try again when fewer are connected"
            ) from None
        if reply.refused:
            raise PolicyRefused(reply.error)
        if not reply.ok or (isinstance(asked, Say) and not reply.waiting):
            raise ConfigurationError(
                f"the relay at {self._path} refuses: {reply.error}", "see that both have one version"
            )
        return reply.waiting


@contextmanager
def connected(path: Path) -> Iterator[Client]:
    """A connection to the desk at ``path``.

    Raises:
        ConfigurationError: nobody listens there.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(ANSWER_SECONDS_MAX)
        try:
            sock.connect(str(path))
        except OSError as error:
            raise ConfigurationError(
                f"cannot reach a relay at {path}: {error.strerror or error}",
                "see that it runs and asks for approvals, and name its socket by --socket",
            ) from None
        yield Client(path, sock)

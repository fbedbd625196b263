"""The control socket: one JSON object a line, for `korora top`, `korora ctl` and whoever scripts them.

A unix socket, mode 0600; the kernel says who is at its other end, and only the daemon's own user and root are heard.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, Final

import msgspec
import structlog

from korora.daemon.config import Rate, bytes_per_second
from korora.errors import remedy_of
from proxy.errors import ConfigurationError
from proxy.limits import KIB, LANES_MAX

log = structlog.get_logger("korora.daemon")

LINE_BYTES_MAX: Final = 4 * KIB  # of a request; the longest holds a session's id and a rate
CONNECTIONS_MAX: Final = 32  # operators and scripts at once
IDLE_SECONDS_MAX: Final = 300.0  # a connection that asks nothing is closed
REFUSAL_SECONDS_MAX: Final = 5.0  # whoever is not heard may ask within this, to be told so
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid; unix(7)


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="command", tag=str.lower):
    """Tagged by its class's name in small letters."""


class Status(_Request, frozen=True):
    """How everything stands."""


class Cancel(_Request, frozen=True):
    """End a session."""

    session: str


class Limit(_Request, frozen=True):
    """Limit a session, or all together where `session` is "all"; null lifts the limit."""

    session: str
    rate: Rate


class Lanes(_Request, frozen=True):
    """Give a departing session more lanes or fewer."""

    session: str
    count: Annotated[int, msgspec.Meta(ge=1, le=LANES_MAX)]


class Reload(_Request, frozen=True):
    """As SIGHUP, with an answer."""


class Drain(_Request, frozen=True):
    """As SIGTERM."""


Request = Status | Cancel | Limit | Lanes | Reload | Drain
Answer = dict[str, Any]
ALL: Final = "all"


class ControlServer:
    """Serves the control socket.

    Args:
        listener: bound, listening and non-blocking; this object owns it from now on.
        answer: what a request is answered by. ValueError and ConfigurationError become answers, too.
    """

    def __init__(self, listener: socket.socket, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        self._listener, self._answer = listener, answer
        self._decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to serve."""
        self._server = await asyncio.start_unix_server(self._connected, sock=self._listener, limit=LINE_BYTES_MAX)

    async def close(self) -> None:
        """Stop serving; what is asked just now is not answered any more."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        try:
            refusal = self._refusal(writer)
            with suppress(TimeoutError):
                if refusal is not None:
                    async with asyncio.timeout(REFUSAL_SECONDS_MAX):
                        await reader.readline()  # closed before it has been read, the answer would be lost
                        await _write(writer, {"ok": False, "error": refusal})
                    return
                while True:
                    async with asyncio.timeout(IDLE_SECONDS_MAX):
                        line = await reader.readline()
                    if not line:
                        return
                    await _write(writer, await self._answered(line))
        except ValueError:  # asyncio's word for a line that is too long
            with suppress(OSError):
                await _write(writer, {"ok": False, "error": f"a request has at most {LINE_BYTES_MAX} bytes"})
        except OSError:
            return
        finally:
            writer.close()

    def _refusal(self, writer: asyncio.StreamWriter) -> str | None:
        """Why whoever is at the other end is not heard, if so."""
        sock = writer.get_extra_info("socket")
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(data)
        if uid not in {0, os.geteuid()}:
            log.warning("somebody else was refused at the control socket", uid=uid)
            return f"user {uid} may not control this daemon"
        if len(self._open) > CONNECTIONS_MAX:
            return f"{CONNECTIONS_MAX} connections are open already"
        return None

    async def _answered(self, line: bytes) -> Answer:
        try:
            return {"ok": True} | await self._answer(self._decoder.decode(line))
        except msgspec.MsgspecError as error:
            return {"ok": False, "error": f"no request: {error}"}
        except (ValueError, ConfigurationError) as error:
            return {"ok": False, "error": str(error), "remedy": remedy_of(error)}


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(msgspec.json.encode(answer) + b"\n")
    async with asyncio.timeout(IDLE_SECONDS_MAX):
        await writer.drain()


def rate_of(limit: Limit) -> float | None:
    """The rate of a request.

    Raises:
        ValueError: it is none.
    """
    return bytes_per_second(limit.rate)

"""The metrics listener: a small HTTP/1.1 server for four pages, on a port of its own.

It knows GET and HEAD, answers one request a connection, and takes nothing else from a client: no body, no query. Every
step is bounded in bytes and in time, because whoever can reach the port may try. What it gives out is not secret from
the host's users, but names peers and VMs (/status), so by default it listens on the loopback, and there answers only
requests that were meant for it: a page in a browser that has renamed itself to 127.0.0.1 is told so.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import msgspec
import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

log = structlog.get_logger("korora")

METRICS_ADDRESS: Final = ("127.0.0.1", 9464)  # the port that OpenTelemetry's Prometheus exporters use by default

HEAD_BYTES_MAX: Final = 8 * 1024  # Prometheus' own is about 300
CONNECTIONS_MAX: Final = 32  # at once; the oldest that has not asked yet makes room
HEAD_SECONDS_MAX: Final = 5.0  # from the connection to the last byte of the request's head
PAGE_SECONDS_MAX: Final = 8.0  # to make a page; below Prometheus' default patience of 10 s
WRITE_SECONDS_MAX: Final = 10.0  # until the client has taken the answer
LINGER_SECONDS_MAX: Final = 1.0  # for the client to close, so that what it still sends does not reset our answer
LINGER_BYTES_MAX: Final = 64 * 1024  # of that

_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2
_TARGET: Final = re.compile(rb"/[\x21-\x7e]*")  # RFC 9112 §3.2.1; no space, no control character
_VALUE: Final = re.compile(rb"[\x20-\x7e\x80-\xff\t]*")  # RFC 9110 §5.5
_VERSION: Final = re.compile(rb"HTTP/\d\.\d")
_OFFER: Final = re.compile(r"\s*application/openmetrics-text\s*(;.*)?", re.IGNORECASE)
_Q_ZERO: Final = re.compile(r";\s*q=0(\.0{0,3})?\s*(;|$)", re.IGNORECASE)

_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"


class Refused(Exception):
    """A request that gets no page; ``status`` says why."""

    def __init__(self, status: HTTPStatus, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head.

    Args:
        method: ``GET`` or ``HEAD``.
        path: without its query.
        host: of the Host field, without the port; empty in HTTP/1.0 without one.
        accept: the Accept fields, joined.
    """

    method: str
    path: str
    host: str
    accept: str


@dataclass(frozen=True, slots=True)
class Pages:
    """Where the pages come from.

    Args:
        registry: for /metrics; read in a thread.
        health: for /healthz: None, or in words what is wrong, in which case a supervisor above should act.
        ready: for /readyz: None, or in words why no session can be taken now.
        status: for /status: what JSON shall say; may take a few seconds to ask the workers.
    """

    registry: CollectorRegistry
    health: Callable[[], str | None]
    ready: Callable[[], str | None]
    status: Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    content_type: str
    body: bytes


def parse_head(head: bytes) -> Request:
    """Read a request's head (RFC 9112 §3, §5), the blank line included.

    Raises:
        Refused: it is not a request that can be answered.
    """
    lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    words = lines[0].split(b" ")
    if len(words) != 3 or not _TOKEN.fullmatch(words[0]) or not _VERSION.fullmatch(words[2]):
        raise Refused(HTTPStatus.BAD_REQUEST, "not a request line")
    method, target, version = words
    if version not in {b"HTTP/1.1", b"HTTP/1.0"}:
        raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 is spoken here")
    hosts: list[str] = []
    accepts: list[str] = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise Refused(HTTPStatus.BAD_REQUEST, "not a header field")
        if name.lower() == b"host":
            hosts.append(value.strip(b" \t").decode("latin-1"))
        elif name.lower() == b"accept":
            accepts.append(value.decode("latin-1"))
    if len(hosts) > 1 or (version == b"HTTP/1.1" and not hosts):
        raise Refused(HTTPStatus.BAD_REQUEST, "one Host field, please")
    if method not in {b"GET", b"HEAD"}:
        raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only")
    if not _TARGET.fullmatch(target):
        raise Refused(HTTPStatus.BAD_REQUEST, "not a path")
    path = target.partition(b"?")[0].decode("ascii")
    return Request(method.decode("ascii"), path, _without_port(hosts[0]) if hosts else "", ",".join(accepts))


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host).strip("[]").lower()


def meant_for_this_host(host: str) -> bool:
    """Whether a Host field names the loopback or a bare address, and not a name that may have been moved here."""
    if host in {"", "localhost"}:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def wants_openmetrics(accept: str) -> bool:
    """Whether a scraper offers to take OpenMetrics; else it gets Prometheus' text format, which everybody reads."""
    return any(_OFFER.fullmatch(offer) and not _Q_ZERO.search(offer) for offer in accept.split(","))


class MetricsServer:
    """The listener. ``start`` it once; ``close`` it at the end, after the sessions, so that a drain can be watched."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._loopback = True
        self._connections: dict[asyncio.Task[None], bool] = {}
        """Each with whether it has asked already, the oldest first."""
        self._renders: dict[bool, asyncio.Task[bytes]] = {}
        """At most one a format runs at a time; whoever asks meanwhile gets the same."""

    async def start(self, listener: socket.socket) -> None:
        """Serve a listening TCP socket, as ``listen_tcp`` of proxy.endpoints.sockets makes; it is ours from now on."""
        self._loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        self._server = await asyncio.start_server(self._connected, sock=listener, limit=HEAD_BYTES_MAX)

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._connections, *self._renders.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    # ---- one connection

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_MAX:
            waiting = next((task for task, asked in self._connections.items() if not asked), None)
            if waiting is None:
                writer.transport.abort()
                return
            del self._connections[waiting]
            waiting.cancel()
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections[task] = False
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a metrics connection failed", exc_info=error)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(OSError, TimeoutError):
                await self._exchange(reader, writer)
        finally:
            writer.transport.abort()  # nothing is left to be sent, or nobody takes it

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)  # drain() then waits until the kernel has all of it
        with_body = True
        try:
            head = await self._head(reader)
            if head is None:
                return
            task = asyncio.current_task()
            if task in self._connections:
                self._connections[task] = True
            request = parse_head(head)
            with_body = request.method == "GET"
            if self._loopback and not meant_for_this_host(request.host):
                raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "ask for this host by its address, or as localhost")
            answer = await self._page(request)
        except Refused as refusal:
            answer = _Answer(refusal.status, _TEXT, f"{refusal}\n".encode())
        writer.write(_head_of(answer) + (answer.body if with_body else b""))
        async with asyncio.timeout(WRITE_SECONDS_MAX):
            await writer.drain()
        await _linger(reader, writer)

    async def _head(self, reader: asyncio.StreamReader) -> bytes | None:
        """A request's head; None if the client left without a word.

        Raises:
            Refused: it does not come, or does not end.
        """
        try:
            async with asyncio.timeout(HEAD_SECONDS_MAX):
                return await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"no request within {HEAD_SECONDS_MAX:.0f} s") from None
        except asyncio.LimitOverrunError:
            raise Refused(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {HEAD_BYTES_MAX} bytes of head"
            ) from None
        except asyncio.IncompleteReadError as cut:
            if not cut.partial:
                return None
            raise Refused(HTTPStatus.BAD_REQUEST, "the request ends before its head does") from None

    # ---- the pages

    async def _page(self, request: Request) -> _Answer:
        """The page that was asked for.

        Raises:
            Refused: there is none of that name, or it cannot be made.
        """
        try:
            async with asyncio.timeout(PAGE_SECONDS_MAX):
                match request.path:
                    case "/metrics":
                        return await self._metrics(openmetrics_wanted=wants_openmetrics(request.accept))
                    case "/healthz":
                        return _verdict(self._pages.health())
                    case "/readyz":
                        return _verdict(self._pages.ready())
                    case "/status":
                        facts = msgspec.json.encode(await self._pages.status())
                        return _Answer(HTTPStatus.OK, _JSON, msgspec.json.format(facts, indent=2) + b"\n")
        except TimeoutError:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"no page within {PAGE_SECONDS_MAX:.0f} s") from None
        except Exception as error:
            # Whatever is wrong with a page must not be the relay's end.
            log.warning("a metrics page failed", path=request.path, exc_info=error)
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, "this page cannot be made; the log says why") from None
        raise Refused(HTTPStatus.NOT_FOUND, "here are /metrics, /healthz, /readyz and /status")

    async def _metrics(self, *, openmetrics_wanted: bool) -> _Answer:
        render = self._renders.get(openmetrics_wanted)
        if render is None:
            make = openmetrics.generate_latest if openmetrics_wanted else generate_latest
            render = asyncio.get_running_loop().create_task(asyncio.to_thread(make, self._pages.registry))
            self._renders[openmetrics_wanted] = render
            render.add_done_callback(lambda done: self._rendered(done, openmetrics_wanted=openmetrics_wanted))
        # Shielded: a thread cannot be stopped, and others may wait for the same page.
        body = await asyncio.shield(render)
        kind = openmetrics.CONTENT_TYPE_LATEST if openmetrics_wanted else CONTENT_TYPE_PLAIN_0_0_4
        return _Answer(HTTPStatus.OK, kind, body)

    def _rendered(self, done: asyncio.Task[bytes], *, openmetrics_wanted: bool) -> None:
        del self._renders[openmetrics_wanted]
        if not done.cancelled():
            done.exception()  # whoever waits for it sees it; that nobody does is no news


def _verdict(wrong: str | None) -> _Answer:
    if wrong is None:
        return _Answer(HTTPStatus.OK, _TEXT, b"ok\n")
    return _Answer(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{wrong}\n".encode())


def _head_of(answer: _Answer) -> bytes:
    fields = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
    ]
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields.append("Allow: GET, HEAD")  # RFC 9110 §15.5.6
    return "\r\n".join([*fields, "\r\n"]).encode("ascii")


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close our side, then wait a moment for the client's: bytes that nobody reads would reset the answer away."""
    writer.write_eof()
    left = LINGER_BYTES_MAX
    async with asyncio.timeout(LINGER_SECONDS_MAX):
        while left > 0 and (more := await reader.read(left)):
            left -= len(more)

"""The metrics listener: its pages, and whatever else comes to its port."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics import parser

from korora.metrics import http
from korora.metrics.http import (
    CONNECTIONS_MAX,
    HEAD_BYTES_MAX,
    MetricsServer,
    Pages,
    Refused,
    meant_for_this_host,
    parse_head,
    wants_openmetrics,
)
from korora.metrics.instruments import Instruments
from korora.metrics.observer import Observer
from proxy.endpoints.sockets import listen_tcp
from tests.proxy.support import run, together, until

GET = "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n"
DOCUMENTED = {200, 400, 404, 405, 408, 421, 431, 500, 503, 505}

Story = Callable[[MetricsServer, int], Awaitable[None]]


async def facts() -> object:
    return {"sessions": [{"peer": "Kororā", "bytes_in": 7}]}


def pages() -> Pages:
    instruments = Instruments.alone()
    Observer(instruments).session_begun("source")
    return Pages(registry=instruments.registry(), health=lambda: None, ready=lambda: None, status=facts)


def serving(story: Story, given_pages: Pages | None = None, *, kernel_bytes: int | None = None) -> None:
    """Run a story against a listener on the loopback, on uvloop; the kernel keeps so much of what is sent."""

    async def session() -> None:
        server = MetricsServer(given_pages or pages())
        listener = listen_tcp("127.0.0.1", 0, "metrics")
        if kernel_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel_bytes)
        port = listener.getsockname()[1]
        await server.start(listener)
        try:
            await story(server, port)
        finally:
            await server.close()
        assert not server._connections
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    run(session())


class Answer:
    """A parsed answer: strict, because a scraper is."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        version, code, self.phrase = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        self.code = int(code)
        self.fields = dict(line.split(": ", 1) for line in lines[1:])
        assert self.fields["Connection"] == "close"


async def talk(port: int, *pieces: bytes, shut: bool = False) -> bytes:
    """Send these, return all that comes until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(OSError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if shut:
                writer.write_eof()
        return await reader.read()
    finally:
        writer.transport.abort()


async def ask(port: int, request: str, *, shut: bool = False) -> Answer:
    answer = Answer(await talk(port, request.encode("latin-1"), shut=shut))
    assert int(answer.fields["Content-Length"]) == len(answer.body)
    return answer


# ---- the pages


def test_metrics_in_both_formats() -> None:
    async def story(_: MetricsServer, port: int) -> None:
        text = await ask(port, GET.format("/metrics"))
        assert text.code == 200
        assert text.fields["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert b'\nkorora_sessions_begun_total{role="source"} 1.0\n' in text.body
        accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2\r\n"
        modern = await ask(port, GET.format("/metrics?name[]=x").replace("\r\n\r\n", f"\r\n{accept}\r\n"))
        assert modern.fields["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        found = {metric.name for metric in parser.text_string_to_metric_families(modern.body.decode())}
        assert "korora_sessions_begun" in found

    serving(story)


def test_status_is_json() -> None:
    async def story(_: MetricsServer, port: int) -> None:
        answer = await ask(port, GET.format("/status"))
        assert (answer.code, answer.fields["Content-Type"]) == (200, "application/json")
        assert json.loads(answer.body) == await facts()

    serving(story)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_and_readiness_give_the_reason(path: str) -> None:
    wrong: list[str] = []

    def verdict() -> str | None:
        return wrong[0] if wrong else None

    async def story(_: MetricsServer, port: int) -> None:
        answer = await ask(port, GET.format(path))
        assert (answer.code, answer.body) == (200, b"ok\n")
        wrong.append("draining")
        answer = await ask(port, GET.format(path))
        assert (answer.code, answer.body) == (503, b"draining\n")
        wrong.clear()
        assert (await ask(port, GET.format(path))).code == 200
        other = {"/healthz": "/readyz", "/readyz": "/healthz"}[path]
        wrong.append("x")
        assert (await ask(port, GET.format(other))).code == 200

    good = pages()
    serving(story, replace(good, health=verdict) if path == "/healthz" else replace(good, ready=verdict))


def test_head_has_the_head_and_no_body() -> None:
    async def story(_: MetricsServer, port: int) -> None:
        for path in ("/metrics", "/healthz", "/readyz", "/status", "/nothing"):
            raw = await talk(port, GET.format(path).replace("GET", "HEAD").encode())
            answer = Answer(raw)
            assert answer.code == (404 if path == "/nothing" else 200)
            assert answer.body == b""
            assert int(answer.fields["Content-Length"]) > 0

    serving(story)


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        (GET.format("/"), 404),
        (GET.format("/metrics/"), 404),
        (GET.format("/../etc/passwd"), 404),
        (GET.format("/%6detrics"), 404),
        (GET.format("/metrics").replace("GET", "POST"), 405),
        (GET.format("/metrics").replace("GET", "get"), 405),
        (GET.format("http://localhost/metrics"), 400),
        (GET.format("*"), 400),
        ("GET  /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("GET /metrics\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost: localhost\r\n folded: x\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost: local\0host\r\n\r\n", 400),
        ("GET /metrics HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400),
        ("GET /metrics HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        ("GET /metrics HTTP/0.9\r\n\r\n", 505),
        ("GET /metrics HTTP/1.0\r\n\r\n", 200),
        ("GET /metrics HTTP/1.1\r\nhost:\t[::1]:9464 \r\n\r\n", 200),
        ("\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    ],
)
def test_requests_and_their_answers(request_text: str, code: int) -> None:
    async def story(_: MetricsServer, port: int) -> None:
        answer = await ask(port, request_text)
        assert answer.code == code
        assert answer.fields.get("Allow") == ("GET, HEAD" if code == 405 else None)

    serving(story)


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("localhost", True),
        ("LOCALHOST:9464", True),
        ("127.0.0.1:9464", True),
        ("[::1]:9464", True),
        ("192.0.2.1", True),
        ("rebound.example:9464", False),
        ("127.0.0.1.rebound.example", False),
        ("", True),
    ],
)
def test_on_the_loopback_a_renamed_page_is_turned_away(host: str, meant: bool) -> None:
    """DNS rebinding: a web page whose name now points here may send requests, and would read the answer."""
    assert meant_for_this_host(http._without_port(host)) is meant

    async def story(_: MetricsServer, port: int) -> None:
        answer = await ask(port, f"GET /status HTTP/1.1\r\nHost: {host}\r\n\r\n")
        assert answer.code == (200 if meant else 421)

    serving(story)


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; version=1.0.0; q=0.5, */*;q=0.1", True),
        ("application/openmetrics-text;version=a.b;q=0", False),
        ("application/openmetrics-text;q=0.000", False),
        ("application/openmetrics-text;q=0.001", True),
        ("application/openmetrics-textual", False),
    ],
)
def test_what_a_scraper_accepts(accept: str, wanted: bool) -> None:
    assert wants_openmetrics(accept) is wanted


# ---- pages that fail


class Held:
    """A collector whose scrape lasts until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = 0

    def collect(self) -> Iterable[Metric]:
        self.begun += 1
        self.go.wait(20)
        yield Metric("korora_x", "x", "gauge")


def held_pages() -> tuple[Held, Pages]:
    held, registry = Held(), CollectorRegistry()
    registry.register(held)
    return held, replace(pages(), registry=registry)


def test_a_slow_scrape_holds_nothing_up_and_is_shared() -> None:
    held, slow = held_pages()

    async def story(server: MetricsServer, port: int) -> None:
        scrapes = [asyncio.create_task(ask(port, GET.format("/metrics"))) for _ in range(5)]
        await until(lambda: sum(server._connections.values()) == 5)
        assert (await ask(port, GET.format("/healthz"))).code == 200, "the loop is free meanwhile"
        held.go.set()
        assert [answer.code for answer in await asyncio.gather(*scrapes)] == [200] * 5
        assert held.begun == 1

    serving(story, slow)


def test_a_scrape_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAGE_SECONDS_MAX", 0.05)
    held, slow = held_pages()

    async def story(_: MetricsServer, port: int) -> None:
        try:
            for _ in range(3):
                assert (await ask(port, GET.format("/metrics"))).code == 503
            assert held.begun == 1, "no further thread is spent on it"
        finally:
            held.go.set()

    serving(story, slow)


def test_a_page_that_fails_is_500_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        def collect(self) -> Iterable[Metric]:
            raise RuntimeError("Read beyond file size detected, file is corrupted.")

    async def status() -> object:
        return object()

    def verdict() -> str | None:
        raise ValueError("bug")

    registry = CollectorRegistry()
    registry.register(Broken())

    async def story(_: MetricsServer, port: int) -> None:
        for path in ("/metrics", "/status", "/healthz", "/readyz"):
            answer = await ask(port, GET.format(path))
            assert answer.code == 500, path
            assert b"corrupted" not in answer.body
        assert (await ask(port, GET.format("/nothing"))).code == 404

    serving(story, Pages(registry, verdict, verdict, status))
    assert capsys.readouterr().out.count("a metrics page failed") == 4


def test_workers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAGE_SECONDS_MAX", 0.05)

    async def never() -> object:
        await asyncio.Event().wait()
        return None

    async def story(_: MetricsServer, port: int) -> None:
        assert (await ask(port, GET.format("/status"))).code == 503

    serving(story, replace(pages(), status=never))


# ---- whoever can reach the port


def test_slowloris_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that trickles: the time counts from the connection, not from the last byte."""
    monkeypatch.setattr(http, "HEAD_SECONDS_MAX", 0.3)

    async def story(_: MetricsServer, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def trickle() -> None:
            with suppress(OSError):
                for byte in b"GET /metrics HTTP/1.1\r\n" + b"x" * 1000:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.01)

        trickling = asyncio.create_task(trickle())
        try:
            assert Answer(await reader.read()).code == 408
        finally:
            trickling.cancel()
            writer.transport.abort()
        assert Answer(await talk(port)).code == 408, "silence too"

    serving(story)


def test_the_oldest_that_has_not_asked_makes_room() -> None:
    """Filling the listener with silence keeps no scraper out."""

    async def story(server: MetricsServer, port: int) -> None:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS_MAX + 3)]
        await until(lambda: len(server._connections) == CONNECTIONS_MAX)
        for _ in range(3):
            assert (await ask(port, GET.format("/metrics"))).code == 200
        assert len(server._connections) <= CONNECTIONS_MAX
        assert await silent[0][0].read() == b""
        for _, writer in silent:
            writer.transport.abort()

    serving(story)


def test_no_more_connections_than_the_limit_even_if_all_have_asked() -> None:
    held, slow = held_pages()

    async def story(server: MetricsServer, port: int) -> None:
        scrapes = [asyncio.create_task(ask(port, GET.format("/metrics"))) for _ in range(CONNECTIONS_MAX)]
        await until(lambda: sum(server._connections.values()) == CONNECTIONS_MAX)
        with suppress(ConnectionResetError):
            assert await talk(port, GET.format("/healthz").encode()) == b""
        held.go.set()
        assert {answer.code for answer in await asyncio.gather(*scrapes)} == {200}

    serving(story, slow)


@pytest.mark.parametrize("piece", [b"x" * 1000, b"x: y\r\n" * 200, b"\0" * 4096])
def test_a_head_without_an_end(piece: bytes) -> None:
    async def story(server: MetricsServer, port: int) -> None:
        raw = await talk(port, b"GET /metrics HTTP/1.1\r\n", *[piece] * (3 * HEAD_BYTES_MAX // len(piece)))
        assert Answer(raw).code == 431, "and the answer arrives although more was sent than is read"
        await until(lambda: not server._connections)

    serving(story)


def test_a_client_that_floods_after_its_request_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LINGER_SECONDS_MAX", 600.0)  # only the bytes count here

    async def story(server: MetricsServer, port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET.format("/healthz").encode())
        with suppress(OSError):
            for _ in range(1000):  # 64 MiB: far more than the kernel keeps for it
                writer.write(bytes(64 * 1024))
                async with asyncio.timeout(10):
                    await writer.drain()
        await until(lambda: not server._connections)
        writer.transport.abort()

    serving(story)


def test_a_client_that_does_not_read_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WRITE_SECONDS_MAX", 0.1)

    async def huge() -> object:
        return "x" * (64 * 1024 * 1024)

    async def story(server: MetricsServer, port: int) -> None:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
            await asyncio.get_running_loop().sock_sendall(client, GET.format("/status").encode())
            await until(lambda: any(server._connections.values()))
            await until(lambda: not server._connections)

    serving(story, replace(pages(), status=huge))


def test_a_slow_client_gets_all_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel has not taken yet would be cut off with the connection."""
    monkeypatch.setattr(http, "LINGER_SECONDS_MAX", 0.05)
    size = 60_000  # an event loop takes that much without asking its writer to wait

    async def long() -> object:
        return "x" * size

    async def story(_: MetricsServer, port: int) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, GET.format("/status").encode())
            await asyncio.sleep(0.3)  # as slow as that
            raw = b""
            while more := await loop.sock_recv(client, 65536):
                raw += more
        assert len(Answer(raw).body) > size

    serving(story, replace(pages(), status=long), kernel_bytes=4096)


def test_pipelined_requests_get_one_answer() -> None:
    async def story(_: MetricsServer, port: int) -> None:
        raw = await talk(port, GET.format("/healthz").encode() * 50)
        assert raw.count(b"HTTP/1.1 ") == 1
        assert Answer(raw).code == 200
        body = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nGET "
        assert Answer(await talk(port, body)).code == 200, "a body is not looked at"

    serving(story)


def test_a_cut_request() -> None:
    async def story(server: MetricsServer, port: int) -> None:
        assert Answer(await talk(port, b"GET /metr", shut=True)).code == 400
        assert await talk(port, shut=True) == b"", "who says nothing is told nothing"
        reset = socket.create_connection(("127.0.0.1", port))
        reset.sendall(b"GET /metrics HT")
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        reset.close()
        await until(lambda: not server._connections)

    serving(story)


def test_closing_ends_what_is_open() -> None:
    async def story(server: MetricsServer, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /met")
        await until(lambda: server._connections)
        await server.close()
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.transport.abort()

    serving(story)


HEADS = st.one_of(
    st.binary(max_size=400),
    st.binary(max_size=200).map(lambda junk: b"GET /metrics HTTP/1.1\r\n" + junk + b"\r\n\r\n"),
    st.tuples(
        st.sampled_from([b"GET", b"HEAD", b"PUT", b"", b"G\0T"]),
        st.sampled_from([b"/metrics", b"/status", b"/", b"x", b"/\xff", b"/healthz?a b"]),
        st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/3.3", b"FTP/1.1"]),
        st.lists(st.sampled_from([b"Host: localhost", b"Host: a.b", b"Accept: ,;,q=", b": x", b"A\t: b", b"X:"])),
    ).map(lambda parts: b" ".join(parts[:3]) + b"\r\n" + b"\r\n".join(parts[3]) + b"\r\n\r\n"),
)


@given(HEADS)
@example(b"")
@example(b"\r\n\r\n")
@example(b"GET / HTTP/1.1\r\nHost\r\n\r\n")
def test_any_head_is_read_or_refused(head: bytes) -> None:
    try:
        request = parse_head(head)
    except Refused as refusal:
        status = refusal.status
    else:
        status = HTTPStatus.OK
        assert request.method in {"GET", "HEAD"}
        assert request.path.startswith("/")
        wants_openmetrics(request.accept)
        meant_for_this_host(request.host)
    assert status in DOCUMENTED


@settings(max_examples=25)
@given(st.lists(st.tuples(st.lists(HEADS, max_size=3), st.booleans()), min_size=1, max_size=4))
def test_any_bytes_are_answered_as_documented_or_closed(connections: list[tuple[list[bytes], bool]]) -> None:
    async def story(_: MetricsServer, port: int) -> None:
        async def meet(pieces: list[bytes]) -> None:
            raw = await talk(port, *pieces, shut=True)
            if raw:
                assert Answer(raw).code in DOCUMENTED

        await together(*(meet(pieces) for pieces, _ in connections))
        assert (await ask(port, GET.format("/healthz"))).code == 200

    serving(story)


def test_the_statuses_are_those_of_the_page() -> None:
    """docs/metrics.md says which answers there are."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = page.partition("| answer | when |\n")[2].partition("\n\n")[0]
    assert {int(row.split("|")[1]) for row in table.splitlines()[1:]} == DOCUMENTED

"""The QMP client, against a server that says what a test wants."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.hypervisors import monitor
from proxy.hypervisors.monitor import ABSENT, GONE, SILENT, Qmp, QmpError
from proxy.limits import QMP_LINE_BYTES_MAX

ENDS = {
    "closed": b"",
    "garbage": b"not json\n",
    "a number": b"7\n",
    "an error that is none": b'{"error": 5, "id": 2}\n',
    "nested without end": b"[" * 200_000 + b"\n",
    "endless line": b'"' + b"x" * (QMP_LINE_BYTES_MAX + 1),
}

Answer = Callable[[dict[str, Any]], list[dict[str, Any] | bytes]]
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[[Answer], Any]]:
    """Start a QEMU-like server that answers each request by a function; gives the socket's path."""
    servers = []

    async def start(answer: Answer) -> Path:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(GREETING)
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    request = json.loads(line)
                    replies: list[dict[str, Any] | bytes] = [{"return": {}, "id": request["id"]}]
                    if request["execute"] != "qmp_capabilities":
                        replies = answer(request)
                    for reply in replies:
                        writer.write(reply if isinstance(reply, bytes) else json.dumps(reply).encode() + b"\n")
                    if replies and replies[-1] == b"":
                        break
            writer.close()

        servers.append(await asyncio.start_unix_server(talk, tmp_path / "qmp"))
        return tmp_path / "qmp"

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


async def test_a_command_has_its_arguments_hyphenated_and_gets_its_own_answer(serve: Any) -> None:
    def answer(request: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        return [{"return": "another's", "id": 999}, {"return": request["arguments"], "id": request["id"]}]

    async with await Qmp.connect(await serve(answer)) as client:
        assert await client.execute("migrate-set-parameters", max_bandwidth=5) == {"max-bandwidth": 5}


async def test_a_refusal_is_an_error_with_class_and_description(serve: Any) -> None:
    refusal = {"class": "CommandNotFound", "desc": "no such thing"}
    async with await Qmp.connect(await serve(lambda r: [{"error": refusal, "id": r["id"]}])) as client:
        with pytest.raises(QmpError, match="dance: no such thing") as caught:
            await client.execute("dance")
        assert caught.value.error_class == "CommandNotFound"


async def test_events_are_found_whether_they_came_before_or_come_later(serve: Any) -> None:
    def answer(request: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        event = {"event": "MIGRATION", "data": {"status": request["execute"]}}
        return [event, {"return": {}, "id": request["id"]}]

    async with await Qmp.connect(await serve(answer)) as client:
        waiting = asyncio.create_task(client.wait_event("MIGRATION", 5, lambda data: data["status"] == "second"))
        await client.execute("first")
        assert (await client.wait_event("MIGRATION", 5)).data == {"status": "first"}
        assert not waiting.done()
        await client.execute("second")
        assert (await waiting).data == {"status": "second"}
        with pytest.raises(TimeoutError):
            await client.wait_event("MIGRATION", 0.01, lambda data: data["status"] == "third")


@pytest.mark.parametrize("last", ENDS.values(), ids=ENDS.keys())
async def test_a_qemu_that_goes_away_ends_every_wait(serve: Any, last: bytes) -> None:
    async with await Qmp.connect(await serve(lambda _: [last])) as client:
        waiting = asyncio.create_task(client.wait_event("MIGRATION", 5))
        with pytest.raises(QmpError) as caught:
            await client.execute("query-status")
        assert caught.value.error_class == GONE
        with pytest.raises(QmpError):
            await waiting
        with pytest.raises(QmpError):
            await client.execute("query-status")


async def test_a_silent_qemu_is_not_waited_for_for_ever(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "QMP_ANSWER_SECONDS_MAX", 0.05)
    path = await serve(lambda _: [])
    async with await Qmp.connect(path, 5) as client:
        with pytest.raises(QmpError, match="no answer") as caught:
            await client.execute("query-status")
        assert caught.value.error_class == SILENT


async def test_nobody_at_the_socket_is_an_error_after_the_time_given(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match="no QMP greeting"):
        await Qmp.connect(tmp_path / "absent", 0.05)


async def test_nobody_at_the_socket_is_told_at_once_to_the_impatient(tmp_path: Path) -> None:
    for make in (lambda path: None, lambda path: path.touch()):  # no file; a file that nobody listens at
        make(tmp_path / "absent")
        with pytest.raises(QmpError) as caught:
            await Qmp.connect(tmp_path / "absent", 30, patient=False)
        assert caught.value.error_class == ABSENT


async def test_a_monitor_that_another_client_has_gives_no_greeting_and_no_descriptor_is_left(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    server = await asyncio.start_unix_server(say_nothing, tmp_path / "qmp")
    with pytest.raises(QmpError) as caught:
        await Qmp.connect(tmp_path / "qmp", 0.05)
    assert caught.value.error_class == SILENT
    async with asyncio.timeout(5):
        await ended.wait()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("greeting", [b"220 mail.example ESMTP\r\n", GREETING], ids=["another's", "then nothing"])
async def test_a_server_that_is_no_qemu_is_left(
    tmp_path: Path, greeting: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "QMP_ANSWER_SECONDS_MAX", 0.2)
    left = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        await reader.read()
        writer.close()
        left.set()

    server = await asyncio.start_unix_server(greet, tmp_path / "qmp")
    with pytest.raises(QmpError, match=r"does not speak QMP|no answer"):
        await Qmp.connect(tmp_path / "qmp", 5)
    async with asyncio.timeout(5):
        await left.wait()
    server.close()
    await server.wait_closed()


async def test_events_nobody_wants_are_neither_kept_nor_waked_for(serve: Any) -> None:
    def answer(request: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        noise: list[dict[str, Any] | bytes] = [{"event": "RTC_CHANGE"}] * 50
        return [*noise, {"event": "STOP"}, {"return": {}, "id": request["id"]}]

    async with await Qmp.connect(await serve(answer), wanted={"STOP", "RESUME"}) as client:
        await client.execute("talk")
        assert [event.name for event in client.events] == ["STOP"]
        assert client.heard == 1
        await client.wait_news(0, 5)


async def test_a_qemu_that_talks_without_end_does_not_fill_memory(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "QMP_EVENTS_MAX", 10)

    def answer(request: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        return [*([{"event": "STOP"}] * 25), {"return": {}, "id": request["id"]}]

    async with await Qmp.connect(await serve(answer)) as client:
        await client.execute("talk")
        assert (len(client.events), client.heard) == (10, 25)


async def test_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    """What waited there may have given up: a QEMU that was frozen takes it, drops it, and greets the next."""
    with socket.socket(socket.AF_UNIX) as frozen, contextlib.ExitStack() as waiting:
        frozen.bind(str(tmp_path / "qmp"))
        frozen.listen(1)
        frozen.setblocking(False)
        for _ in range(2):
            waiting.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "qmp"))
        with pytest.raises(QmpError) as caught:
            await Qmp.connect(tmp_path / "qmp", 0.1)
        assert caught.value.error_class == SILENT
        connecting = asyncio.create_task(Qmp.connect(tmp_path / "qmp", 5))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        for _ in range(2):
            frozen.accept()[0].close()
        taken, _ = await asyncio.wait_for(loop.sock_accept(frozen), 5)
        with taken:
            await loop.sock_sendall(taken, GREETING)
            await loop.sock_recv(taken, 4096)
            await loop.sock_sendall(taken, b'{"return": {}, "id": 1}\n')
            await (await asyncio.wait_for(connecting, 5)).close()

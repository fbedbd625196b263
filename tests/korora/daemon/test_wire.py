"""The socket pair between parent and workers, and what the environment says of the service manager."""

import asyncio
import os
import socket
from typing import Any

import msgspec
import pytest

from korora.daemon import config, notify
from korora.daemon.messages import (
    MESSAGE_BYTES_MAX,
    QUEUE_MESSAGES_MAX,
    SAMPLE_SESSIONS,
    Cancel,
    Configure,
    Leave,
    Sample,
    Take,
    ToParent,
    ToWorker,
)
from korora.daemon.wire import Wire
from korora.daemon.worker import tokens_of
from proxy.errors import ConfigurationError
from proxy.guest import ROUNDS_TOLD
from proxy.limits import VM_NAME_CHARACTERS_MAX
from proxy.wire import LANE_TOKEN_BYTES
from tests.korora.daemon.test_table import STATUS
from tests.proxy.support import run, until


class Ends:
    """Both ends, and what arrived at the second."""

    def __init__(self, kind: Any = ToWorker) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.far_socket = far
        self.heard: list[tuple[Any, int | None]] = []
        self.gone = 0
        self.near: Wire[Any] = Wire(near, kind, take=lambda *_: None, gone=lambda: None)
        self.far: Wire[Any] = Wire(far, kind, take=lambda *heard: self.heard.append(heard), gone=self._gone)

    def _gone(self) -> None:
        self.gone += 1

    def close(self) -> None:
        self.near.close()
        self.far.close()
        for _, fd in self.heard:
            if fd is not None:
                os.close(fd)


def test_messages_arrive_in_order_with_their_descriptors() -> None:
    async def story() -> None:
        ends = Ends()
        with socket.socket() as first, socket.socket() as second:
            assert ends.near.send(Take("192.0.2.1"), first.fileno())
            assert ends.near.send(Cancel("00"))
            assert ends.near.send(Take("192.0.2.2"), second.fileno())
            await until(lambda: len(ends.heard) == 3)
            assert [message for message, _ in ends.heard] == [Take("192.0.2.1"), Cancel("00"), Take("192.0.2.2")]
            for (_, fd), sock in zip(ends.heard[::2], (first, second), strict=True):
                assert fd is not None
                assert os.fstat(fd).st_ino == os.fstat(sock.fileno()).st_ino
                assert not os.get_inheritable(fd)
        assert ends.heard[1][1] is None
        ends.close()

    run(story())


def test_what_has_no_room_waits_and_then_goes() -> None:
    async def story() -> None:
        ends = Ends()
        asyncio.get_running_loop().remove_reader(ends.far_socket.fileno())  # it is busy
        with socket.socket() as sock:
            count = 0
            while ends.near.send(Take(f"{count:04}" * 50), sock.fileno()):
                count += 1
            inode = os.fstat(sock.fileno()).st_ino
        assert QUEUE_MESSAGES_MAX <= count < QUEUE_MESSAGES_MAX + 1000  # then it is as good as dead, and is told so
        asyncio.get_running_loop().add_reader(ends.far_socket.fileno(), ends.far._readable)
        await until(lambda: len(ends.heard) == count)
        assert [int(message.address[:4]) for message, _ in ends.heard] == list(range(count))
        # The sender has closed its own long ago.
        assert {os.fstat(fd).st_ino for _, fd in ends.heard if fd is not None} == {inode}
        assert ends.near.send(Leave("x"))
        ends.close()

    run(story())


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", msgspec.msgpack.encode({"type": "Erase"}), bytes(MESSAGE_BYTES_MAX + 1)]
)
def test_what_is_no_message_ends_it(data: bytes) -> None:
    async def story() -> None:
        ends = Ends()
        ends.near._sock.send(data)
        await until(lambda: ends.gone)
        assert (ends.gone, ends.heard, ends.far.closed) == (1, [], True)
        assert not ends.far.send(Leave("x"))
        ends.close()

    run(story())


def test_an_end_that_goes_is_noticed_once() -> None:
    async def story() -> None:
        ends = Ends()
        ends.near.send(Leave("x"))
        ends.near.close()
        await until(lambda: ends.gone)
        assert ([message for message, _ in ends.heard], ends.gone) == ([Leave("x")], 1)
        assert not ends.near.send(Leave("x"))
        ends.close()

    run(story())


def test_the_largest_messages_fit() -> None:
    ingress = '[[ingress]]\nname="{0}{1:03}"\nfrom="tcp:[2001:db8::{1}]:4440"\npeer="b"\negress="{0}"\n'
    names = "".join(ingress.format("x" * 58, number) for number in range(config.INGRESSES_MAX))
    text = ('[[peer]]\nname="b"\naddress="b:1"\n' + names).encode()[: config.CONFIG_BYTES_MAX]
    whole = text[: text.rindex(b"[[ingress]]")]
    assert len(whole) > config.CONFIG_BYTES_MAX - 300
    message = Configure(2**60, config.parse(whole, "test"), 1000)
    assert len(msgspec.msgpack.encode(message)) < MESSAGE_BYTES_MAX
    full = {
        field: 2**62 if isinstance(value, int | float) else "x" * 63
        for field, value in msgspec.to_builtins(STATUS).items()
    } | {"vm": "\U0001f427" * VM_NAME_CHARACTERS_MAX, "rounds_ended": [2**62] * ROUNDS_TOLD}
    sample = Sample((STATUS,), 0.0)
    encoded = msgspec.msgpack.encode(msgspec.to_builtins(sample) | {"statuses": [full] * SAMPLE_SESSIONS})
    assert len(encoded) < MESSAGE_BYTES_MAX


def test_everything_decodes_as_itself() -> None:
    for union in (ToWorker, ToParent):
        kinds = union.__args__
        assert len({kind.__name__ for kind in kinds}) == len(kinds)
    sample = Sample((STATUS, STATUS), 0.25)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sample), type=ToParent) == sample  # type: ignore[arg-type]


def test_a_lane_s_token_names_its_worker_and_is_random_beyond_that() -> None:
    tokens = [tokens_of(7)(LANE_TOKEN_BYTES) for _ in range(200)]
    assert {(len(token), token[0]) for token in tokens} == {(LANE_TOKEN_BYTES, 7)}
    for position in range(1, LANE_TOKEN_BYTES):
        assert len({token[position] for token in tokens}) > 50
    assert len({tokens_of(7)(32)[0] for _ in range(200)}) > 50


# ------------------------------------------------------------------ the service manager


def test_an_abstract_address_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"korora-test-{os.getpid()}"
        sock.bind(f"\0{name}")
        environ = {"NOTIFY_SOCKET": f"@{name}", "HOME": "/"}
        notify.Notifier(environ).send(READY=1, STATUS="in\u0101")
        sock.settimeout(5)
        assert sock.recv(100) == "READY=1\nSTATUS=in\u0101".encode()
        assert environ == {"HOME": "/"}


@pytest.mark.parametrize("path", ["", "/nowhere/at/all"])
def test_where_nobody_listens_nothing_happens(path: str) -> None:
    notify.Notifier({"NOTIFY_SOCKET": path}).send(READY=1)


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "10000000"}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, 5.0),
        ({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog(environ: dict[str, str], seconds: float | None) -> None:
    assert notify.Notifier(environ).watchdog_seconds == seconds
    assert environ == {}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"},
    ],
)
def test_sockets_that_are_not_for_us(environ: dict[str, str]) -> None:
    assert notify.inherited(environ) == {}
    assert environ == {}


@pytest.mark.parametrize("names", ["", "relay:relay", "unknown", "relay:x"])
def test_sockets_with_names_that_say_nothing(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    given = iter(listeners)
    monkeypatch.setattr(notify, "_listening", lambda *_: next(given))
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": names}
    with pytest.raises(ConfigurationError, match="of LISTEN_FDS has the name"):
        notify.inherited(environ)
    for sock in listeners:
        sock.close()

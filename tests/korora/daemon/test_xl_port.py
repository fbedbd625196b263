"""xl by a TCP port, as on the classic relocation port: `xl migrate -s "" DOMAIN "socat - TCP:127.0.0.1:8002"`.

The client here is what socat makes of xl: it half-closes when xl's output ends, and ends when the port's does.
"""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.korora.daemon.support import SECONDS_MAX, Site, until
from tests.korora.daemon.xl import BANNER, GO, READY, REPORT, XenSite, stream
from tests.proxy.shell.test_processes import free_port

QUIET_SECONDS = 0.5


@pytest.fixture
def xen(site: Site) -> Iterator[XenSite]:
    made = XenSite(site)
    yield made
    made.close()


class Client:
    """xl behind socat."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), SECONDS_MAX)

    def hear(self, words: bytes) -> None:
        heard = b""
        while len(heard) < len(words) and (piece := self.sock.recv(len(words) - len(heard))):
            heard += piece
        assert heard == words

    def migrate(self) -> None:
        self.hear(BANNER)
        self.sock.sendall(stream())
        self.hear(READY)
        self.sock.sendall(GO)
        self.hear(REPORT)
        self.sock.shutdown(socket.SHUT_WR)
        assert self.sock.recv(1) == b""
        self.sock.close()


def test_one_after_another_each_a_migration(xen: XenSite) -> None:
    port = xen.alpha.ingress("xl-port", "beta", more='xl_flags = "-p -e"\n')
    xen.start()
    first = Client(port)
    first.hear(BANNER)
    second = Client(port)
    assert not select.select([second.sock], [], [], QUIET_SECONDS)[0], "it waits, and is no channel of the first"
    first.sock.sendall(stream())
    first.hear(READY)
    first.sock.sendall(GO)
    first.hear(REPORT)
    first.sock.shutdown(socket.SHUT_WR)
    assert first.sock.recv(1) == b""
    second.migrate()
    until(lambda: len(xen.alpha.reports()) == 2)
    assert [report["outcome"] for report in xen.alpha.reports()] == ["done", "done"]
    assert [report["channels"] for report in xen.alpha.reports()] == [1, 1]
    assert [note for note in xen.notes if note.startswith("migrate")] == ["migrate-receive -e -p"] * 2
    first.sock.close()


def test_a_cut_is_no_clean_end(xen: XenSite) -> None:
    port = xen.alpha.ingress("xl-port", "beta", more='xl_flags = ""\n')
    xen.start()
    client = Client(port)
    client.hear(BANNER)
    client.sock.sendall(stream()[:200_000])
    (session,) = xen.alpha.sessions()
    assert xen.alpha.ask("cancel", session=session["session_id"])["ok"]
    with pytest.raises(ConnectionResetError):
        client.sock.recv(1)
    client.sock.close()
    # And socat that dies in the middle of the stream: the far side destroys what it has.
    again = Client(port)
    again.hear(BANNER)
    again.sock.sendall(stream()[:200_000])
    again.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionResetError):
        again.sock.recv(1)
    again.sock.close()
    reports = until(lambda: len(found := xen.alpha.reports()) == 2 and found)
    assert sorted(report["exit_code"] for report in reports) == [3, 7]
    until(lambda: xen.notes.count("destroyed") == 2)


def test_by_korora_send(xen: XenSite) -> None:
    xen.start([xen.beta])
    port = free_port()
    command = [sys.executable, "-m", "korora", "send", "--from", f"tcp:127.0.0.1:{port}", "--peer", xen.beta.address]
    sender = subprocess.Popen(
        [*command, "--identity", str(xen.alpha.identity), "--xl-flags=-p"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **xen.env(xen.alpha)},
    )
    assert sender.stdout is not None
    try:
        assert sender.stdout.readline() == b"ready\n"
        clients = [Client(port), Client(port)]
        for client in clients:
            client.migrate()
        until(lambda: xen.notes.count("reported") == 2)
        assert [note for note in xen.notes if note.startswith("migrate")] == ["migrate-receive -p"] * 2
    finally:
        sender.terminate()
        sender.communicate(timeout=SECONDS_MAX)

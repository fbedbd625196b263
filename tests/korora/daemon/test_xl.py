"""`korora xl` beside a daemon: who has xl's pipes when, and what xl sees when one of them dies."""

import hashlib
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.handover.xl import FAILED
from tests.korora.daemon.support import SECONDS_MAX, Site, until
from tests.korora.daemon.test_drain import activated
from tests.korora.daemon.xl import BANNER, GO, READY, REPORT, Transport, XenSite, stream

QUIET_SECONDS = 1.0  # in which an end of file would have come, if one came


@pytest.fixture
def xen(site: Site) -> Iterator[XenSite]:
    made = XenSite(site)
    yield made
    made.close()


def migrate(xl: Transport) -> None:
    """The whole conversation, as xl leads it."""
    xl.hear(BANNER)
    xl.say(stream())
    xl.hear(READY)
    xl.say(GO)
    xl.hear(REPORT)
    xl.end()


def half(xl: Transport) -> None:
    """The conversation up to the middle of the stream."""
    xl.hear(BANNER)
    xl.say(stream()[: len(stream()) // 2])


def read_by(pid: int) -> int:
    """Bytes that a process has read by read() and its like; what comes by recvmsg() is not among them."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def no_end_for(xl: Transport, seconds: float) -> bool:
    """Whether xl, reading, would have waited all that time."""
    assert xl.process.stdout is not None
    return not select.select([xl.process.stdout], [], [], seconds)[0]


def die(xen: XenSite) -> None:
    """kill -9 of the whole daemon."""
    pids = xen.worker_pids()
    assert xen.alpha.process is not None
    for pid in (xen.alpha.process.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    xen.alpha.process.wait()
    assert xen.alpha.process.stdout is not None
    xen.alpha.process.stdout.close()
    until(lambda: not any(Path(f"/proc/{pid}/fd").exists() and os.listdir(f"/proc/{pid}/fd") for pid in pids))


# ------------------------------------------------------------------ as it should be


def test_a_whole_migration(xen: XenSite, tmp_path: Path) -> None:
    xen.xl_table('priority = "high"\n')
    xen.start()
    xl = xen.transport("-p", "beta", "--report", str(tmp_path / "report.json"))
    xl.hear(BANNER)
    before = read_by(xl.pid)
    xl.say(stream())
    xl.hear(READY)
    # The stream went from xl's pipe to the daemon's worker: no byte of it passed through the process between.
    assert read_by(xl.pid) - before < 1000
    (session,) = xen.alpha.sessions()
    assert (session["way"], session["peer"], session["priority"]) == ("xl", "beta", "high")
    xl.say(GO)
    xl.hear(REPORT)
    xl.end()
    assert xl.wait() == (0, "")
    assert xen.notes == ["migrate-receive -p", hashlib.sha256(stream()).hexdigest(), "reported"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads((xen.alpha.state / "reports" / f"{report['session_id']}-source.json").read_text())
    assert (report["outcome"], report["bytes_in"]["forward"]) == ("done", len(stream()) + len(GO))
    assert xen.alpha.status()["xl"] == {"socket": str(xen.socket), "peers": ["beta"]}


def test_two_at_once_by_two_workers(site: Site) -> None:
    xen = XenSite(site, workers=2)
    gamma = site.host("gamma")
    gamma.peer("alpha")
    gamma.egress("default", "xl:")
    xen.alpha.peer("gamma", gamma.address)
    xen.xl_table()
    xen.start([xen.beta, gamma, xen.alpha])
    try:
        both = [xen.transport(name) for name in ("beta", "gamma")]
        for xl in both:
            half(xl)
        sessions = until(lambda: len(found := xen.alpha.sessions()) == 2 and found)
        assert {session["worker"] for session in sessions} == {0, 1}
        for xl in both:
            xl.say(stream()[len(stream()) // 2 :])
            xl.hear(READY)
            xl.say(GO)
            xl.hear(REPORT)
            xl.end()
            assert xl.wait() == (0, "")
    finally:
        xen.close()


def test_an_output_that_ends_first_is_seen_by_xl_at_once(xen: XenSite) -> None:
    """`korora xl` lets go of it: a copy that it kept would keep xl waiting for the end."""
    taken = xen.folder / "taken"
    xen.beta.tables[-1] = f'[[egress]]\nname = "default"\nto = "exec:echo last words; exec >&-; cat >{taken}"\n'
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    assert xl.rest() == b"last words\n"
    assert xl.process.poll() is None
    xl.say(b"and on it goes")
    xl.end()
    assert xl.wait() == (0, "")
    assert taken.read_bytes() == b"and on it goes"


# ------------------------------------------------------------------ no


@pytest.mark.parametrize(
    ("table", "words", "code", "said"),
    [
        ("", ("gamma",), 3, "gamma is no host that the daemon sends to: beta"),
        ("", ("beta", "--name", "gamma"), 3, "of the hosts named by --name, the daemon sends to none: gamma"),
        ("any_address = true\n", ("127.0.0.1:1",), 6, "127.0.0.1:1"),
        ('egress = "nowhere"\n', ("beta",), 3, "nowhere"),
    ],
)
def test_what_is_refused(xen: XenSite, table: str, words: tuple[str, ...], code: int, said: str) -> None:
    xen.xl_table(table)
    xen.start()
    xl = xen.transport(*words)
    assert xl.rest() == b""
    ended, line = xl.wait()
    assert (ended, line.count("\n"), said in line) == (code, 1, True), line
    assert line.startswith("korora: error: ")


def test_no_more_than_may_be(xen: XenSite) -> None:
    xen.xl_table("sessions_max = 1\n")
    xen.start()
    first = xen.transport("beta")
    half(first)
    second = xen.transport("beta")
    assert second.rest() == b""
    code, words = second.wait()
    assert (code, "1 sessions of korora xl run, and no more may" in words) == (3, True), words
    assert len(xen.alpha.sessions()) == 1
    first.say(stream()[len(stream()) // 2 :])
    first.hear(READY)
    first.say(GO)
    first.hear(REPORT)
    first.end()
    assert first.wait() == (0, "")


def test_a_peer_by_its_address(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport(xen.beta.address)
    migrate(xl)
    assert xl.wait() == (0, "")


def test_an_address_that_no_table_has_leads_to_a_host_of_the_table_only(xen: XenSite) -> None:
    """Whoever answers there must be beta by his certificate, and at that address it is not beta who answers."""
    gamma = xen.site.host("gamma")
    gamma.peer("alpha")
    gamma.egress("default", f"file:{xen.folder}/taken")
    gamma.start()
    xen.xl_table("any_address = true\n")
    xen.start()
    xl = xen.transport(gamma.address)
    assert xl.rest() == b""
    assert xl.wait()[0] == 4
    xl = xen.transport(xen.beta.address.replace("127.0.0.1", "localhost"))
    migrate(xl)
    assert xl.wait() == (0, "")


def test_the_destination_has_no_xl(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    (xen.folder / "xl").write_text("#!/bin/sh\nexit 3\n")
    xl = xen.transport("-d", "beta")
    assert xl.rest() == b""
    code, words = xl.wait()
    assert (code, "xl migrate-receive ended before it had the whole machine" in words) == (7, True), words


# ------------------------------------------------------------------ xl, korora xl


def test_xl_dies_in_the_middle_of_its_stream(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    xl.end()
    code, words = xl.wait()
    assert (code, "the xl stream ended after" in words) == (7, True), words
    xen.noted("destroyed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_korora_xl_is_ended(xen: XenSite, number: signal.Signals) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    xl.process.send_signal(number)
    assert xl.rest() == b""
    code, words = xl.wait()
    if number is signal.SIGKILL:
        assert code == -signal.SIGKILL
        (report,) = until(xen.alpha.reports)
        assert (report["exit_code"], "korora xl, which xl had started, is gone" in report["error"]) == (7, True)
    else:
        assert (code, words) == (128 + number, f"korora: error: stopped by signal {int(number)}\n")
    xen.noted("destroyed")


def test_korora_xl_is_ended_while_the_peer_is_greeted(xen: XenSite) -> None:
    """It accepts the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        xen.alpha.tables[0] = xen.alpha.tables[0].replace(xen.beta.address, f"127.0.0.1:{silent.getsockname()[1]}")
        xen.xl_table()
        xen.start([xen.alpha])
        xl = xen.transport("beta", "--log-level", "info")
        silent.settimeout(30)
        met, _ = silent.accept()
        with met:
            xl.process.send_signal(signal.SIGTERM)
            assert xl.rest() == b""
            code, words = xl.wait()
    assert (code, words.count("stopped by signal 15")) == (143, 1)
    (report,) = until(xen.alpha.reports)
    assert (report["exit_code"], report["outcome"]) == (143, "interrupted")


# ------------------------------------------------------------------ the daemon


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_is_killed(site: Site, workers: int) -> None:
    xen = XenSite(site, workers=workers)
    xen.beta.settings = "[limits]\nresume_timeout = 2\n"  # then it undoes what it has of the dead session
    xen.xl_table()
    xen.start()
    try:
        xl = xen.transport("beta")
        half(xl)
        (session,) = xen.alpha.sessions()
        os.kill(xen.worker_pids()[session["worker"]], signal.SIGKILL)
        assert xl.rest() == b""
        code, words = xl.wait()
        assert code == 6
        short = session["session_id"][:8]
        assert f"the stream of session {short} was lost with the daemon's process that carried it" in words
        assert "the daemon is away" in words
        xen.noted("destroyed")
        assert [event["session"] for event in xen.alpha.events("xl's pipes were handed over again")] == [short]
        again = xen.transport("beta")
        migrate(again)
        assert again.wait() == (0, "")
    finally:
        xen.close()


@pytest.mark.parametrize("at", ["stream", "ready"])
def test_the_whole_daemon_is_killed_and_comes_back(xen: XenSite, at: str) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    if at == "ready":
        xl.say(stream()[len(stream()) // 2 :])
        xl.hear(READY)
    die(xen)
    # Nobody has the pipes but the process that waits, so xl sees no end: that is what is to be decided.
    assert no_end_for(xl, QUIET_SECONDS)
    xen.alpha.start(env=xen.env(xen.alpha))
    # Once it was told READY, xl resumes only if it is told that this failed (docs/handover.md).
    assert xl.rest() == (b"" if at == "stream" else FAILED)
    code, words = xl.wait()
    lost = "was lost with the daemon's process" if at == "stream" else "the daemon was lost while"
    assert (code, lost in words) == (6, True), words
    assert [word in words for word in ("the daemon is away", "the daemon is back")] == [True, True]


def test_the_next_daemon_is_killed_too(xen: XenSite) -> None:
    """It has the pipes, and dies before it has said anything: they are handed over for a third time."""
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    (session,) = xen.alpha.sessions()
    die(xen)
    xen.socket.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as second:
        second.settimeout(SECONDS_MAX)
        second.bind(str(xen.socket))
        second.listen()
        connection, _ = second.accept()
        with connection:
            data, fds, _, _ = socket.recv_fds(connection, 8192, 3)
            for fd in fds:
                os.close(fd)
    assert (json.loads(data)["session"], len(fds)) == (session["session_id"], 2)
    assert no_end_for(xl, QUIET_SECONDS)
    xen.alpha.start(env=xen.env(xen.alpha))
    assert xl.rest() == b""
    code, words = xl.wait()
    assert (code, words.count("the daemon is away")) == (6, 1)  # the second one was never heard


def test_a_daemon_that_does_not_come_back(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta", "--daemon-timeout", "1")
    half(xl)
    die(xen)
    assert xl.rest() == b""
    code, words = xl.wait()
    assert code == 6
    assert f"korora: error: the daemon at {xen.socket} went away, and was not back in 1 s; " in words


def test_korora_xl_is_ended_while_it_waits_for_the_daemon(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    die(xen)
    assert no_end_for(xl, 0.2)
    xl.process.send_signal(signal.SIGTERM)
    assert xl.rest() == b""
    assert xl.wait()[0] == 143


def test_a_drain_lets_it_finish_and_takes_no_other(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    xen.alpha.signal(signal.SIGTERM)
    until(lambda: xen.alpha.status()["phase"] == "draining")
    late = xen.transport("beta")
    assert late.rest() == b""
    code, words = late.wait()
    assert (code, "no further session is taken now" in words) == (3, True), words
    xl.say(stream()[len(stream()) // 2 :])
    xl.hear(READY)
    xl.say(GO)
    xl.hear(REPORT)
    xl.end()
    assert xl.wait() == (0, "")
    assert xen.alpha.wait() == 0
    assert not xen.socket.exists()


def test_a_second_signal_ends_it(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    for phase in ("draining", None):
        xen.alpha.signal(signal.SIGTERM)
        if phase:
            until(lambda: xen.alpha.status()["phase"] == "draining")
    assert xl.rest() == b""
    assert xl.wait() == (143, "korora: error: stopped by signal 15\n")
    assert xen.alpha.wait() == 143
    xen.noted("destroyed")


def test_an_operator_cancels_it(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    xl = xen.transport("beta")
    half(xl)
    (session,) = xen.alpha.sessions()
    assert xen.alpha.ask("limit", session=session["session_id"], rate=2_000_000)["ok"]
    assert xen.alpha.ask("cancel", session=session["session_id"])["ok"]
    assert xl.rest() == b""
    code, words = xl.wait()
    assert (code, "cancelled by an operator of alpha" in words) == (3, True)


def test_a_reload(xen: XenSite) -> None:
    xen.xl_table()
    xen.alpha.peer("gamma", "127.0.0.1:1")
    xen.start()
    xen.alpha.tables[1] = '[xl]\nsocket = "/somewhere/else"\npeers = ["gamma"]\n'
    xen.alpha.write()
    assert xen.alpha.ask("reload")["restart_needed"] == ["xl.socket"]
    xl = xen.transport("beta")
    code, words = xl.wait()
    assert (code, "beta is no host that the daemon sends to: gamma" in words) == (3, True), words


def test_a_socket_that_the_service_manager_opened(xen: XenSite) -> None:
    """It was there before the daemon: whoever comes early waits, and does not relay by himself."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(xen.socket))
    listener.listen()
    listener.set_inheritable(True)
    xen.xl_table()
    try:
        xl = xen.transport("beta")
        xen.start([xen.beta])
        xen.alpha.start(command=activated({"xl": listener}), env=xen.env(xen.alpha))
        migrate(xl)
        assert xl.wait() == (0, "")
    finally:
        listener.close()


# ------------------------------------------------------------------ without a daemon


def _nothing(path: Path) -> None:
    assert not path.exists()


def _stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize("there", [_nothing, _stale])
def test_without_a_daemon_it_relays_by_itself(xen: XenSite, there: Callable[[Path], None]) -> None:
    there(xen.socket)
    xen.start([xen.beta])
    words = ("-p", xen.beta.address, "--recover-for", "0", "--log-level", "info")
    xl = Transport(*words, daemon=xen.socket, identity=xen.alpha.identity, env=xen.env(xen.alpha))
    xl.moved = xen.moved
    xen.transports.append(xl)
    migrate(xl)
    code, words = xl.wait()
    assert (code, "no daemon: this process relays" in words, "session done" in words) == (0, True, True)
    assert xen.notes[0] == "migrate-receive -p"


def test_a_daemon_that_is_not_wanted(xen: XenSite) -> None:
    xen.xl_table()
    xen.start()
    words = (xen.beta.address, "--recover-for", "0")
    xl = Transport(*words, daemon="no", identity=xen.alpha.identity, env=xen.env(xen.alpha))
    xl.moved = xen.moved
    xen.transports.append(xl)
    migrate(xl)
    assert xl.wait() == (0, "")
    assert xen.alpha.status()["sessions_ended"] == 0

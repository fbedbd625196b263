"""`korora send` and `korora receive` under a policy: the commands themselves, in processes of their own."""

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from tests.attacks.processes import Relay
from tests.korora.policy.shells import as_user
from tests.korora.policy.support import rule

pytestmark = pytest.mark.timeout(240)  # some processes one after the other, on a machine that may be busy
BEN, CID = 61_002, 61_003
STREAM = os.urandom(3 * 1024 * 1024)
DENY = rule("not-alpha", "deny", peer=["alpha"])
ALLOW = rule("alpha-in", "allow", peer=["alpha"], direction="in")
Send = Callable[[], AbstractAsyncContextManager[Relay]]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """beta's."""
    path = tmp_path / "policy.toml"
    path.write_text(DENY)
    path.chmod(0o600)
    return path


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where people approve: in a directory that others may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "approve.sock"


@pytest.fixture
async def receive(policy: Path, socket: Path, tmp_path: Path, identity_beta: Path) -> AsyncIterator[Relay]:
    relay = Relay(
        *("receive", "--listen", "127.0.0.1:0", "--to", f"file:{tmp_path / 'out'}", "--identity", identity_beta),
        *("--state", tmp_path / "beta", "--policy", policy, "--approvals", socket),
    )
    async with relay:
        yield relay


@pytest.fixture
async def send(receive: Relay, tmp_path: Path, identity_alpha: Path) -> Send:
    """One migration."""
    (tmp_path / "in").write_bytes(STREAM)
    port = await receive.listening()

    @asynccontextmanager
    async def send() -> AsyncIterator[Relay]:
        relay = Relay(
            *("send", "--from", f"file:{tmp_path / 'in'}", "--peer", f"127.0.0.1:{port}", "--identity", identity_alpha),
            *("--state", tmp_path / "alpha", "--once"),
        )
        async with relay:
            yield relay

    return send


def reload(relay: Relay, policy: Path, text: str) -> None:
    policy.write_text(text)
    relay.process.send_signal(signal.SIGHUP)


async def test_a_reload_counts_for_the_next_session_and_a_bad_file_changes_nothing(
    receive: Relay, send: Send, policy: Path, tmp_path: Path
) -> None:
    async def refused() -> None:
        async with send() as relay:
            assert await relay.ended() == 3
            assert "the rule not-alpha denies it" in relay.complaint
        assert not (tmp_path / "out").exists()

    await refused()
    reload(receive, policy, ALLOW + "x = [")
    said = await receive.event("the policy's file is refused: the old policy stays")
    assert "no TOML" in said["reason"]
    await refused()
    reload(receive, policy, ALLOW)
    await receive.event("a new policy counts")
    async with send() as relay:
        assert await relay.ended() == 0, relay.lines
    assert (tmp_path / "out").read_bytes() == STREAM


@pytest.fixture
def two_people(policy: Path) -> None:
    """Before the relay reads it."""
    policy.write_text(rule("two-people", "allow", peer=["alpha"], approvals=2, approvers=[BEN, CID, 61_004]))


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be several users")


@needs_root
@pytest.mark.usefixtures("two_people")
@pytest.mark.parametrize("last", ["approves", "denies"])
async def test_it_waits_for_two_people(receive: Relay, send: Send, socket: Path, tmp_path: Path, last: str) -> None:
    async with send() as relay:
        session = (await receive.event("a migration waits for approval"))["session"]
        first = await as_user(BEN, "approve", session, "--socket", socket)
        assert first.out.endswith("approved: 1 of 2\n"), first
        assert "  from      alpha\n  to        beta, egress default\n" in first.out
        assert not (tmp_path / "out").exists()
        await as_user(CID, "approve", session, "--socket", socket, *(["--deny"] if last == "denies" else []))
        assert await relay.ended() == (0 if last == "approves" else 3), relay.lines
        if last == "denies":
            assert "user 61003 does not approve of it, as the rule two-people wants" in relay.complaint
            assert not (tmp_path / "out").exists()
        else:
            assert (tmp_path / "out").read_bytes() == STREAM
    shown = await as_user(BEN, "approve", "--list", "--socket", socket)
    assert shown.out == "nothing waits for you\n"

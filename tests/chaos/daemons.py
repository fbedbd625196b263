"""Two daemons as processes, with the chaos proxy between them and hypervisors at both ends of each way."""

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from crypto.pki import Authority
from tests.chaos.load import EVENTUALLY_SECONDS_MAX, Backend, Ends, Talk, eventually, talk_through
from tests.chaos.proxy import ChaosProxy
from tests.chaos.relays import Usage, Watched, usage
from tests.korora.daemon.support import Host
from tests.proxy.shell.test_processes import free_port

RELOAD_SECONDS_MAX: Final = 30.0
WORKERS: Final = 2
NEVER_SECONDS: Final = 2.0  # for the verdict on a session that may never have been


class Daemon(Watched):
    """One `korora serve`.

    Args:
        host: its configuration, which may be changed and written again for a reload.
    """

    def __init__(self, host: Host) -> None:
        host.write()
        super().__init__("serve", "--config", host.config)
        self.host = host
        self._given: set[int] = set()

    @property
    def name(self) -> str:
        """The host's."""
        return self.host.name

    @property
    def usages(self) -> dict[str, Usage]:
        """What the parent and each of its workers hold."""
        pid = self.process.pid
        workers = sorted(int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        named = {f"{self.name} worker {index}": usage(worker) for index, worker in enumerate(workers)}
        return {self.name: self.usage, **named}

    async def verdict(self, way: str, *, opened: bool) -> dict[str, Any]:
        """The event that ended the next session of an ingress; each is given out once.

        One that never opened does not say whose it was, so any such will do for it.

        Raises:
            TimeoutError: there is none.
        """

        def found() -> bool:
            fresh = [event for event in self.session_events("source") if id(event) not in self._given]
            mine = [event for event in fresh if event["way"] == way or not (event["way"] or opened)]
            verdicts[:] = mine[:1]
            return bool(mine)

        verdicts: list[dict[str, Any]] = []
        await eventually(found, EVENTUALLY_SECONDS_MAX if opened else NEVER_SECONDS)
        self._given.add(id(verdicts[0]))
        return verdicts[0]

    def session_events(self, role: str, way: str | None = None) -> list[dict[str, Any]]:
        """The verdicts of one role's sessions, and of one ingress or egress."""
        return [event for event in self.verdicts if event["role"] == role and way in {None, event["way"]}]

    async def reload(self, *, good: bool = True) -> None:
        """SIGHUP, and until it has taken the file over or refused it.

        Raises:
            AssertionError: it did the other.
        """
        names = {"reloaded": True, "reload refused: the old configuration stays": False}
        since = len(self.events)
        self.process.send_signal(signal.SIGHUP)
        event = await self.told(lambda event: event.get("event") in names, since=since, seconds=RELOAD_SECONDS_MAX)
        assert names[event["event"]] is good, event

    async def serving(self) -> None:
        """Until it takes work."""
        await self.event("serving")


@dataclass(frozen=True, slots=True)
class Way:
    """One virtual machine's way from alpha to beta."""

    name: str
    port: int
    """Where its hypervisor connects at the source."""
    backend: Backend
    source: Daemon

    async def session(self, talk: Talk) -> tuple[Ends, int | None]:
        """A session of that one talk, to its end at the source: its ends and the source's exit code.

        None where the connection was reset and no session came of it: it still waited to be accepted.

        Raises:
            ConnectionError: nobody takes migrations there.
        """
        ends = await talk_through(self.port, self.backend, talk)
        # Whoever connects before this would join the session as a further channel.
        opened = ends.far is not None or ends.near.ended == "eof"
        try:
            event = await self.source.verdict(self.name, opened=opened)
        except TimeoutError:
            if opened:
                last = self.source.session_events("source")[-4:]
                raise AssertionError(f"{self.name}: {ends}, and no verdict; the last ones: {last}") from None
            return ends, None
        return ends, int(event.get("exit_code", 0))


@dataclass(slots=True)
class Daemons:
    """alpha's daemon sends, beta's receives."""

    alpha: Daemon
    beta: Daemon
    proxy: ChaosProxy
    ways: list[Way]
    authority: Authority

    @property
    def usages(self) -> dict[str, Usage]:
        """What every process of both holds."""
        return self.alpha.usages | self.beta.usages

    def renew(self, host: Host) -> None:
        """A new certificate and key in the place of the old, for the next reload."""
        self.authority.issue(host.name, out=host.identity, force=True, now=datetime.now(UTC))

    async def finished(self, count: int) -> tuple[list[int], list[int]]:
        """Both sides' exit codes once each has had so many sessions, the source's first."""
        sides = ((self.alpha, "source"), (self.beta, "destination"))
        await eventually(lambda: all(len(daemon.session_events(role)) >= count for daemon, role in sides))
        codes = [[int(event.get("exit_code", 0)) for event in daemon.session_events(role)] for daemon, role in sides]
        return codes[0], codes[1]


def configure(
    authority: Authority, folder: Path, backends: list[Backend], *, lanes: Sequence[int] = (1,)
) -> tuple[Host, Host, list[int]]:
    """The configurations of both hosts, with a way for each backend, and the ports of the ways at the source.

    The ways take their numbers of lanes from `lanes` by turns.
    """
    now = datetime.now(UTC)
    hosts = [
        Host(name, folder, authority.issue(name, out=folder / f"{name}.identity", now=now).directory, workers=WORKERS)
        for name in ("alpha", "beta")
    ]
    alpha, beta = hosts
    beta.peer("alpha")
    ports = []
    for index, backend in enumerate(backends):
        more = f"lanes = {lanes[index % len(lanes)]}\n"
        ports.append(alpha.ingress(f"vm{index}", "beta", egress=f"vm{index}", port=free_port(), more=more))
        beta.egress(f"vm{index}", f"tcp:127.0.0.1:{backend.port}")
    return alpha, beta, ports


@asynccontextmanager
async def daemons(folder: Path, ways: int, *, settings: str = "") -> AsyncIterator[Daemons]:
    """Both, serving; everything of them is gone afterwards.

    Args:
        folder: for identities, configurations and state.
        ways: how many virtual machines may migrate at once.
        settings: more of both configurations, as TOML.
    """
    async with AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend()) for _ in range(ways)]
        authority = Authority.create(folder / "ca", now=datetime.now(UTC))
        alpha, beta, ports = configure(authority, folder, backends)
        alpha.settings = beta.settings = settings
        receiving = await stack.enter_async_context(Daemon(beta))
        await receiving.serving()
        proxy = await stack.enter_async_context(ChaosProxy(("127.0.0.1", beta.port)))
        alpha.peer("beta", f"127.0.0.1:{proxy.port}")
        sending = await stack.enter_async_context(Daemon(alpha))
        await sending.serving()
        ends = zip(ports, backends, strict=True)
        made = [Way(f"vm{index}", port, backend, sending) for index, (port, backend) in enumerate(ends)]
        yield Daemons(sending, receiving, proxy, made, authority)

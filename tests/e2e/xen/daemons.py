"""Daemons in the dom0s of two Xen hosts, migrations as a person types them, and what has to be true after each.

    async with served(rig, Guest("g1")) as two:
        done = await migrate(two.a, "g1", "destination")
        await check_counts_on([(two.a, "g1"), (two.b, "g1--incoming")])

Host a is "source" by its certificate and host b "destination", whichever way a guest goes.
"""

import asyncio
import hashlib
import itertools
import json
import shlex
import signal
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from korora.demo.serial import Continuity, continuity
from tests.e2e.xen.agent import Done
from tests.e2e.xen.host import POLL_SECONDS, Guest, XenHost
from tests.e2e.xen.points import PRELOADED
from tests.e2e.xen.rig import CHECKOUT, IDENTITY, RELAY_PORT, Pair, XenRig, locked, pair, ready, saved_host

STATE = "/var/lib/korora"
CONFIGURATION = "/root/korora.toml"
SOURCE, DESTINATION = "source", "destination"
MIGRATION_SECONDS = 240.0  # 10 s with two processors to itself
READY_SECONDS = 180.0  # 12 s with two processors to itself
RELOADED = "reload"
RELOAD_SECONDS = 90.0
SETTLED_SECONDS = 90.0  # rounds are 15 s apart
LOOK_SECONDS = 0.3
BEATS = 30  # heard after the arrival, before the guest is believed
HOME = f"127.0.0.1:{RELAY_PORT}"
# What a migration starts and must not leave; a guest's monitor is an xl migrate-receive, too, that lives on.
PASSING = "xl migrate |korora xl|libxl-save-helper|handover recover"


def documented() -> str:
    """The daemon's file that docs/xen.md says is enough."""
    page = (CHECKOUT / "docs" / "xen.md").read_text(encoding="utf-8")
    block = page[page.index("# /etc/korora/korora.toml") :]
    return textwrap.dedent(" " * 7 + block[: block.index("\n\n   `")])


def configuration(peers: dict[str, str], egress: str = "", xl: str = "", limits: str = "") -> str:
    """That file for a host whose peers are these, with further lines for [[egress]], [xl] and [limits]."""
    text = documented().replace("/etc/korora/identity", IDENTITY)
    text = text.replace('to = "xl:"\n', f'to = "xl:"\n{egress}').replace(
        'xl.sock"\n', f'xl.sock"\n{xl}\n[limits]\n{limits}'
    )
    for name, (here, address) in zip(("host-a", "host-b"), peers.items(), strict=True):
        text = text.replace(f'"{name}:8010"', f'"{address}"').replace(f'"{name}"', f'"{here}"')
    return text


async def serve(host: XenHost, text: str) -> None:
    """Start the daemon for the first time and wait until it takes work."""
    await host.agent.put(CONFIGURATION, text.encode())
    await host.check(["mkdir", "-p", "/run/korora", STATE])
    # A store leaves a GiB free for others, more than all of a host's folders in memory have; this one only says it has.
    await host.check(["mount", "-t", "tmpfs", "-o", "size=3g", "tmpfs", STATE])
    await serve_again(host)


async def serve_again(host: XenHost) -> None:
    """Start a daemon that has ended, as it is, and wait until it takes work."""
    await host.spawn("daemon", ["korora", "serve", "--config", CONFIGURATION], env=PRELOADED)
    await host.said("daemon", "ready", READY_SECONDS)


async def configure(host: XenHost, text: str) -> None:
    """Give a running daemon another configuration, and wait until it goes by that."""
    before = (await host.agent.state("daemon")).err.count(RELOADED)
    await host.agent.put(CONFIGURATION, text.encode())
    await host.agent.kill("daemon", signal.SIGHUP)
    async with asyncio.timeout(RELOAD_SECONDS):
        while (await host.agent.state("daemon")).err.count(RELOADED) == before:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)


async def served_host(rig: XenRig, guest: Guest | None, identity: Path) -> Path:
    """A file with a host whose daemon runs, made once per run: to start one takes seconds in an emulated machine."""
    key = hashlib.sha256(repr((guest, identity)).encode()).hexdigest()[:8]
    path = rig.folder / f"served-{key}"
    async with locked(rig.folder / f"{key}.lock"):
        if path.exists():
            return path
        name = "ab"[identity != rig.identities[0]]
        with tempfile.TemporaryDirectory(prefix="korora-xen-") as folder:
            if guest is None:
                async with AsyncExitStack() as stack:
                    host = XenHost(name, rig.image, Path(folder), await saved_host(rig, None, Path(folder)))
                    await ready(stack, host, rig.code, identity)
                    await serve(host, configuration({SOURCE: HOME, DESTINATION: HOME}))
                    await host.save(path)
            else:
                async with XenHost(name, rig.image, Path(folder), await served_host(rig, None, identity)) as host:
                    await host.create(guest)
                    await host.save(path)
    return path


def peers_of(two: Pair, host: XenHost) -> dict[str, str]:
    """Whom a host knows: the other one by the way between them, and itself."""
    if host is two.a:
        return {SOURCE: HOME, DESTINATION: two.to_b.address}
    return {SOURCE: two.to_a.address, DESTINATION: HOME}


async def serve_peers(two: Pair, egress: str = "", xl: str = "", limits: str = "") -> None:
    """Tell both daemons how they reach each other in this pair."""
    async with asyncio.TaskGroup() as group:
        group.create_task(configure(two.a, configuration(peers_of(two, two.a), "", xl, limits)))
        group.create_task(configure(two.b, configuration(peers_of(two, two.b), egress, xl, limits)))


@asynccontextmanager
async def served(
    rig: XenRig,
    guest: Guest | None,
    *,
    egress: str = "",
    xl: str = "",
    limits: str = "",
) -> AsyncIterator[Pair]:
    """Two hosts with a daemon each, and `guest` on a; `egress` goes into b's [[egress]], the others into both's."""
    files = await asyncio.gather(
        *(served_host(rig, on, identity) for on, identity in zip((guest, None), rig.identities, strict=True))
    )
    async with pair(rig, guest, (files[0], files[1])) as two:
        await serve_peers(two, egress, xl, limits)
        yield two


async def migrate(
    host: XenHost, name: str, peer: str, *, options: Sequence[str] = (), report: str = "/run/xl.json"
) -> Done:
    """Type `xl migrate -s "" NAME "korora xl PEER"`."""
    carrier = shlex.join(["korora", "xl", *options, "--report", report, peer])
    done = await host.run(["xl", "migrate", "-s", "", name, carrier], MIGRATION_SECONDS)
    assert done.rc is not None, done
    return done


async def copies(two: Pair) -> list[tuple[str, str, bool]]:
    """All guests of both hosts: where, under which name, and whether they run."""
    return [(where, domain.name, domain.runs) for where, domain in await two.domains()]


Trail = Sequence[tuple[XenHost, str]]
"""Where a guest was heard, in order: the host, and the name it had when it came to be there."""


async def check_counts_on(trail: Trail, beats: int = BEATS) -> list[Continuity]:
    """A guest has been at all of these places one after the other, and has counted from the first to the last."""
    counted = []
    lines = [await host.console(name) for host, name in trail[:-1]]
    host, name = trail[-1]
    known = lines[-1].last if lines else (await host.console(name)).last
    assert known is not None
    await host.wait_beat(name.removesuffix("--incoming"), known.number + beats)
    lines.append(await host.console(name))
    for before, after in itertools.pairwise(lines):
        step = continuity(before, after)
        assert step is not None
        assert step.unbroken, step
        counted.append(step)
    return counted


Records = dict[str, list[dict[str, Any]]]
"""Of each host, by its name: the head and the last line of every journal."""


async def journals_of(host: XenHost, state: str = STATE) -> list[list[dict[str, Any]]]:
    """A host's journals by their lines, as they lie on its disk; `korora handover list` takes seconds in such a one."""
    decoder = json.JSONDecoder()
    texts = (await host.agent.files(f"{state}/handover/*.journal")).values()
    whole = [text.splitlines() if text.endswith("\n") else text.splitlines()[:-1] for text in texts]
    return [[decoder.raw_decode(line)[0] for line in lines] for lines in whole if lines]


async def records_of(host: XenHost, state: str = STATE) -> list[dict[str, Any]]:
    """Of each of a host's journals the head and the last line, as one."""
    return [lines[0] | lines[-1] for lines in await journals_of(host, state)]


async def settled(two: Pair, state: str = STATE) -> Records:
    """Until nothing is left to be done on either host."""
    end = time.monotonic() + SETTLED_SECONDS
    while True:
        lists = await asyncio.gather(*(records_of(host, state) for host in two.hosts))
        found = {host.name: records for host, records in zip(two.hosts, lists, strict=True)}
        open_ones = [record for records in found.values() for record in records if not record.get("settled")]
        if not open_ones:
            return found
        assert time.monotonic() < end, open_ones
        await asyncio.sleep(LOOK_SECONDS)


async def check_settled(two: Pair, ended: dict[XenHost, list[str]], state: str = STATE) -> None:
    """How each host's hand-overs ended (SIDE STATE), with nothing left to be done about any, nor of the migration.

    What ended early is looked after by the daemon's next round.
    """
    found = await settled(two, state)
    for host, wanted in ended.items():
        ends = sorted(f"{record['side']} {record['state']}" for record in found[host.name])
        assert ends == sorted(wanted), (host.name, found)
    for host in two.hosts:
        assert await host.processes(PASSING) == [], host.name


async def told(host: XenHost, path: str = "/run/xl.json") -> dict[str, Any]:
    """The report of a migration that was typed on a host."""
    report: dict[str, Any] = json.loads(await host.agent.get(path) or b"{}")
    return report


async def check_told(
    two: Pair, code: int, *, path: str = "/run/xl.json", source: XenHost | None = None
) -> dict[str, Any]:
    """Both ends' reports of the last migration say the same, and `code`; the source's."""
    source = source or two.a
    other = two.b if source is two.a else two.a
    report = await told(source, path)
    theirs = await filed(other, report["session_id"], "destination")
    for end in (report, theirs):
        assert (end["exit_code"], bool(end["error"])) == (code, code != 0), (report, theirs)
    if code == 0:
        assert report["handover"] == theirs["handover"] == "done", (report, theirs)
        assert report["digest_blake3"] == theirs["digest_blake3"], (report, theirs)
    return report


async def filed(host: XenHost, session: str, side: str) -> dict[str, Any]:
    """The report that a daemon has filed."""
    return await told(host, f"{STATE}/reports/{session}-{side}.json")

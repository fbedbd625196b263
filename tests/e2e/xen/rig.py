"""Two real Xen hosts and the network between them.

    async with pair(rig, Guest("g1")) as two:
        await two.a.spawn("migration", ["xl", "migrate", "-s", "", "g1", f"korora send … --peer {two.to_b.address}"])

The hosts are loaded from files, which are kept beside the image: the first that asks for a guest boots a host, creates
it and saves both. Relays run in the hosts' dom0. From one to the other they go by two ChaosProxies, one each way.
"""

import asyncio
import fcntl
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from korora.demo.relays import issue_identities
from tests.chaos.proxy import ChaosProxy
from tests.e2e.xen.agent import AgentError
from tests.e2e.xen.host import GATEWAY, Domain, Guest, XenHost, qemu_command

CHECKOUT = Path(__file__).resolve().parents[3]
ROOMS = ("korora", "proxy", "chunking", "crypto")
BUILD_SECONDS = 600
RELAY_PORT = 8010
SAVED_MAX = 8  # files of some 300 MB kept beside one image
# What a relay will import, once: a saved host has it in memory, and need not read it from the disk each time.
WARM = (
    "import blake3, cryptography.hazmat.bindings._rust, msgspec, nacl.bindings, numpy, OpenSSL.SSL, prometheus_client, "
    "pyfastcdc, rich, structlog, typer, uvloop, zstandard"
)
IDENTITY = "/root/identity"
LOGS = "/run/rig/* /var/log/xen/xl-* /var/log/xen/korora-*"


class RigAbsent(Exception):
    """There are no Xen hosts on this machine, and why."""


@dataclass(frozen=True)
class XenRig:
    """Made once per run."""

    image: Path
    code: bytes
    """The checkout's packages as a tar, compiled for the hosts' Python."""
    identities: tuple[Path, Path]
    """Of host a ("source") and host b ("destination")."""
    folder: Path
    """Of this run."""


class Way:
    """The network from one host to a port of the other, which a test can cut and heal."""

    def __init__(self, proxy: ChaosProxy) -> None:
        self.proxy = proxy

    @property
    def address(self) -> str:
        """HOST:PORT, as a host has to call it."""
        return f"{GATEWAY}:{self.proxy.port}"


@dataclass
class Pair:
    """Host a, host b, and the ways between their relays."""

    a: XenHost
    b: XenHost
    to_b: Way
    to_a: Way

    @property
    def hosts(self) -> tuple[XenHost, XenHost]:
        """Both."""
        return self.a, self.b

    async def domains(self) -> list[tuple[str, Domain]]:
        """All guests of both hosts, with the host's name."""
        lists = await asyncio.gather(*(host.xl_list() for host in self.hosts))
        return [(host.name, domain) for host, found in zip(self.hosts, lists, strict=True) for domain in found]

    async def logs(self) -> str:
        """What may explain a failure."""
        texts = []
        script = f"xl list -v; tail -n 40 {LOGS} 2>/dev/null; dmesg | tail -n 5; ps -o pid,args | grep -v ' \\['"
        for host in self.hosts:
            try:
                say = await host.run(["sh", "-c", script])
            except AgentError as error:
                texts.append(f"--- {host.name}: {error}")
                continue
            texts.append(f"--- {host.name}\n{say.out}{say.err}")
        return "\n".join(texts)


def build_rig(folder: Path) -> XenRig:
    """Find the image and pack what the hosts need, once per folder. Raises RigAbsent."""
    script = CHECKOUT / "deploy" / "rig" / "fetch-xen"
    found = subprocess.run([script, "--where"], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    image = Path(found.stdout.strip() or "/absent")
    if not (image / "disk").is_file():
        raise RigAbsent(f"there is no image of a Xen host at {image}: `make system` builds one and says why it cannot")
    made = folder / "made"
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # processes of one run share what is made, and the hosts saved with it
        if not made.exists():
            identities = issue_identities(folder)
            (folder / "code.tar.gz").write_bytes(pack_code(image, folder))
            made.write_text(f"{identities.source}\n{identities.destination}\n", encoding="utf-8")
    source, destination = map(Path, made.read_text(encoding="utf-8").split())
    return XenRig(image, (folder / "code.tar.gz").read_bytes(), (source, destination), folder)


def pack_code(image: Path, folder: Path) -> bytes:
    """The checkout's packages with byte code beside them, as nothing compiles under emulation if it need not."""
    tree = folder / "code"
    for room in ROOMS:
        shutil.copytree(CHECKOUT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__", "*.c"))
    compiler: list[str | Path] = [
        image / "python",
        "-I",
        "-m",
        "compileall",
        "-q",
        "--invalidation-mode",
        "unchecked-hash",
    ]
    subprocess.run([*compiler, "-s", tree, "-p", "/opt/korora", tree], timeout=BUILD_SECONDS, check=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar:
        for room in ROOMS:
            tar.add(tree / room, room)
    return packed.getvalue()


def pack_identity(identity: Path) -> bytes:
    """An identity's folder as a tar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(identity, ".")
    return packed.getvalue()


@asynccontextmanager
async def locked(path: Path) -> AsyncIterator[None]:
    """One at a time, over processes and within one."""
    with path.open("w") as handle:
        await asyncio.to_thread(fcntl.flock, handle, fcntl.LOCK_EX)
        yield


async def saved_host(rig: XenRig, guest: Guest | None, folder: Path) -> Path:
    """A file with a host that is ready, and on which `guest` counts; made when it is asked for first."""
    recipe = repr((qemu_command("", rig.image, Path(), {}), guest, WARM, guest and guest.config())).encode()
    key = hashlib.sha256(recipe).hexdigest()[:16]
    path = rig.image / f"saved-{key}"
    async with locked(rig.image / "lock"):  # another run may be making it
        if path.exists():
            path.touch()
            return path
        async with XenHost("saved", rig.image, folder) as host:
            await host.check(["python3.11", "-c", WARM])
            if guest is not None:
                await host.create(guest)
            await host.save(path)
        old = sorted(rig.image.glob("saved-*"), key=lambda file: file.stat().st_mtime)[:-SAVED_MAX]
        for file in old:
            file.unlink()
    return path


@asynccontextmanager
async def pair(rig: XenRig, guest: Guest | None = None, files: tuple[Path, Path] | None = None) -> AsyncIterator[Pair]:
    """Two hosts that are ready: `guest` counts on a, both have the relay and an identity (IDENTITY).

    With `files` they are loaded from these, which were saved when they had all that already.
    """
    with tempfile.TemporaryDirectory(prefix="korora-xen-") as name:
        folder = Path(name)
        load = files or (await saved_host(rig, guest, folder), await saved_host(rig, None, folder))
        async with AsyncExitStack() as stack:
            a, b = (XenHost(name, rig.image, folder, file) for name, file in zip("ab", load, strict=True))
            async with asyncio.TaskGroup() as group:
                for host, identity in zip((a, b), rig.identities, strict=True):
                    start = stack.enter_async_context(host) if files else ready(stack, host, rig.code, identity)
                    group.create_task(start)
            to_b, to_a = [
                Way(await stack.enter_async_context(ChaosProxy(("127.0.0.1", host.ports[RELAY_PORT]))))
                for host in (b, a)
            ]
            made = Pair(a, b, to_b, to_a)
            try:
                yield made
            except BaseException:
                print(await made.logs())
                raise


async def ready(stack: AsyncExitStack, host: XenHost, code: bytes, identity: Path) -> None:
    """Start a host and put into it what is this run's."""
    await stack.enter_async_context(host)
    await host.agent.put("/tmp/code.tar.gz", code)
    await host.agent.put("/tmp/identity.tar", pack_identity(identity))
    script = (
        f"mkdir -p {IDENTITY} /opt/korora && tar -xzf /tmp/code.tar.gz -C /opt/korora && "
        f"tar -xf /tmp/identity.tar -C {IDENTITY} && rm /tmp/code.tar.gz /tmp/identity.tar && hostname {host.name}"
    )
    await host.check(["sh", "-c", script])

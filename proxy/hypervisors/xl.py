"""xl as the hypervisor of the hand-over: what it has of a machine, and what is done to that copy.

Every command names the domain by its id as ``xl list -v`` has just told it: one that has the machine's name and another
UUID is somebody else's, and two copies of one UUID on one host (a migration within it, or what an earlier one left) are
told apart. xl's exit codes are not believed; the list is asked again.

What a killed xl leaves behind, and what becomes of it (Xen 4.17):

- The copy that leaves: NAME running, NAME suspended, or NAME--migratedaway suspended. ``revive`` mends each.
- Its log-dirty mode stays on and costs the guest some speed; the next migration switches it off and on again.
- Its libxl-save-helper goes on writing to the transport until it needs its xl for the next step, and ends there.
- The copy that arrives: NAME--incoming or NAME, paused. ``take`` or ``destroy`` mend each.
- No monitor of a copy that was suspended: it ends when it sees that (handle_domain_death in tools/xl/xl_vmcontrol.c),
  even if xl itself resumes the copy a moment later. See ``proxy.hypervisors.xl_monitor``.
"""

import asyncio
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import structlog

from proxy.control import printable
from proxy.errors import HypervisorFailed
from proxy.handover.table import Side
from proxy.hypervisors.base import CopyState, Fate, Vm
from proxy.hypervisors.command import run_command
from proxy.hypervisors.xl_list import AWAY, INCOMING, XlDomain, read_list
from proxy.limits import (
    VM_NAME_CHARACTERS_MAX,
    XL_DESTROY_SECONDS_MAX,
    XL_GONE_POLL_SECONDS,
    XL_MONITOR_SECONDS,
    XL_OUTPUT_BYTES_MAX,
    XL_REVIVE_SECONDS_MAX,
    XL_SECONDS_MAX,
)

log = structlog.get_logger("korora.xl")

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_SWALLOWED_BYTES: Final = 200_000  # of a pretended migration: enough for xl to be sending pages when it breaks
# The words are migrate_receiver_banner of tools/xl/xl.h, at which xl begins to send.
_PRETENCE: Final = (
    f"echo 'xl migration receiver ready, send binary domain data.'; exec head -c {_SWALLOWED_BYTES} >/dev/null"
)
_WORDS_MAX: Final = 200  # of what xl said, in a message
_ALONE: Final = "+alone"  # in a pin: made by xl create -e, say, so its operator wants no monitor


class _Said(NamedTuple):
    """What a command has said; its exit code says little."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """Its last words, for a message."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return f"; xl said: {printable(lines[-1])[:_WORDS_MAX]}" if lines else f"; xl ended with status {self.code}"


@dataclass(frozen=True, slots=True)
class _Copy:
    """A domain that is this machine, and how it stands for one side."""

    domain: XlDomain
    state: CopyState


class Monitors(Protocol):
    """Who sees to the end of domains. Both methods block for up to a second, and are called in a thread."""

    def tends(self, domid: int) -> bool:
        """Whether somebody waits for that domain's end."""

    def tend(self, domid: int) -> str | None:
        """See to it that somebody does: None, or why nobody does and what to do about it."""


class XlToolstack:
    """See ``Hypervisor``.

    A copy that has ended by itself (powered off, crashed) counts as RUNNING: it did run, and nothing here may destroy
    or revive it. One that is being destroyed counts as ABSENT.

    Args:
        program: xl, by name or path.
        monitors: for a copy that was suspended and runs again, which has lost xl's; None to leave it without.
    """

    kind = "xl"

    def __init__(self, program: str = "xl", monitors: Monitors | None = None) -> None:
        self._program, self._monitors = program, monitors

    # ---- how things stand

    async def knows(self, uuid: str) -> bool:
        """Whether there is any domain of that machine here, however it stands.

        Raises:
            HypervisorFailed: xl cannot be asked.
        """
        return any(domain.uuid == uuid for domain in await self._list())

    async def pin(self, vm: Vm, side: Side) -> Vm:
        """See ``Hypervisor.pin``: the domain's id and the boot it belongs to, and whether it had no monitor anyway."""
        copy = (_leaving if side is Side.SOURCE else _arrived)(vm, await self._list_for(vm))
        if copy is None:
            raise HypervisorFailed(f"there is no domain {vm.name!r} with the UUID {vm.uuid or '(not told)'} here")
        # Only a copy that leaves can lose its monitor, and at the destination the machine stands still by now.
        alone = _ALONE if side is Side.SOURCE and await self._is_alone(copy.domain) else ""
        return replace(vm, copy=f"{copy.domain.domid}@{_boot_id()}{alone}")

    async def _is_alone(self, domain: XlDomain) -> bool:
        """Whether nobody waits for its end, and nobody did.

        A small machine is suspended before this is asked, and by that xl's monitor has ended: then it had one, as far
        as can be told.
        """
        if self._monitors is None or await asyncio.to_thread(self._monitors.tends, domain.domid):
            return False
        after = await self._find(domain)
        return after is not None and not after.shutdown

    def let_go(self) -> None:
        """See ``Hypervisor.let_go``: each question is a command of its own."""

    async def arriving(self, vm: Vm) -> CopyState:
        """See ``Hypervisor.arriving``."""
        return _state(_arrived(vm, await self._list_for(vm)))

    async def departing(self, vm: Vm) -> CopyState:
        """See ``Hypervisor.departing``."""
        return _state(_leaving(vm, await self._list_for(vm)))

    async def fate(self, vm: Vm) -> Fate:
        """See ``Hypervisor.fate``: a guest that reboots gets a new domain of its name and UUID."""
        for domain in await self._list():
            still = domain.paused or domain.shutdown or domain.dying
            if (domain.name, domain.uuid) == (vm.name, vm.uuid) and not still:
                return Fate.AGAIN
        return Fate.ENDED if _pinned(vm)[1] in {"", _boot_id()} else Fate.LOST

    # ---- what is done at the destination

    async def take(self, vm: Vm) -> None:
        """See ``Hypervisor.take``."""
        copy = _arrived(vm, await self._list_for(vm))
        if copy is None:
            raise HypervisorFailed(f"no copy of {vm.name} has arrived here, or it is gone: see xl list")
        if copy.state is not CopyState.INCOMING:
            return
        said = await self._run("rename", str(copy.domain.domid), vm.name)
        after = await self._find(copy.domain)
        if after is None or after.name != vm.name:
            raise HypervisorFailed(
                f"{copy.domain} cannot get the name {vm.name}: is there another domain of that name? "
                f"Look with xl list{said.last}"
            )

    async def start(self, vm: Vm) -> None:
        """See ``Hypervisor.start``."""
        listed = await self._list_for(vm)  # of one moment, and once: each run of xl is downtime
        copy = _arrived(vm, listed)
        if copy is None:
            raise HypervisorFailed(f"no copy of {vm.name} has arrived here, or it is gone: see xl list")
        if copy.state is CopyState.RUNNING:
            return
        if copy.state is not CopyState.PAUSED:
            raise HypervisorFailed(f"{copy.domain} has not got the machine's name yet: it is not started")
        _refuse_twin(copy.domain, listed)
        said = await self._run("unpause", str(copy.domain.domid))
        after = await self._find(copy.domain)
        if after is None or after.paused:
            raise HypervisorFailed(
                f"{copy.domain} does not run: try xl unpause {copy.domain.domid}; xl dmesg may say why{said.last}"
            )

    async def destroy(self, vm: Vm) -> None:
        """See ``Hypervisor.destroy``.

        A copy is pinned before its xl may give it the machine's name. Not pinned, what has that name is another one:
        the copy that leaves, when a machine migrates within its host, and its operator may have paused it.
        """
        copy = _arrived(vm, await self._list_for(vm))
        if copy is None or not (vm.copy or copy.state is CopyState.INCOMING):
            return
        if copy.state is CopyState.RUNNING:
            raise HypervisorFailed(f"{copy.domain} runs, or has run: it is not destroyed")
        await self._destroy(copy.domain)

    # ---- what is done at the source

    async def revive(self, vm: Vm) -> None:
        """See ``Hypervisor.revive``. A copy that its operator had paused stays paused.

        4.17 has no command for it. A pretended migration breaks as soon as xl sends pages, and xl resumes the domain:
        "Migration failed, resuming at sender". Safe to repeat, and to be cut off at any point.
        """
        copy = _leaving(vm, await self._list_for(vm))
        if copy is None:
            if await self.fate(vm) is Fate.AGAIN:
                return
            raise HypervisorFailed(f"there is no copy of {vm.name} here that could be revived: see xl list")
        if copy.state is CopyState.SUSPENDED:
            await self._resume(copy.domain)
        if copy.domain.name != vm.name:
            said = await self._run("rename", str(copy.domain.domid), vm.name)
            after = await self._find(copy.domain)
            if after is None or after.name != vm.name:
                raise HypervisorFailed(
                    f"{copy.domain} runs, and cannot get its name back: free the name {vm.name}, then "
                    f"xl rename {copy.domain.domid} {shlex.quote(vm.name)}{said.last}"
                )
        if self._monitors is not None and not vm.copy.endswith(_ALONE):
            await self._tend(self._monitors, copy.domain)

    async def _resume(self, domain: XlDomain) -> None:
        _refuse_twin(domain, await self._list())
        said = await self._run("migrate", "-s", "", str(domain.domid), _PRETENCE, seconds=XL_REVIVE_SECONDS_MAX)
        after = await self._find(domain)
        if after is None or after.suspended:
            raise HypervisorFailed(
                f"{domain} is suspended and could not be revived: once it is certain that no other copy runs, try "
                f'xl migrate -s "" {domain.domid} "{_PRETENCE}"{said.last}'
            )

    async def _tend(self, monitors: Monitors, domain: XlDomain) -> None:
        """A domain that nobody tends is no reason to call it not revived.

        Where it was suspended for a moment only, xl's monitor may have seen that and be about to end: asked twice.
        """
        if await asyncio.to_thread(monitors.tends, domain.domid):
            await asyncio.sleep(XL_MONITOR_SECONDS)
            if await asyncio.to_thread(monitors.tends, domain.domid):
                return
        trouble = await asyncio.to_thread(monitors.tend, domain.domid)
        if trouble:
            log.warning("a domain has no monitor", domain=str(domain), reason=trouble)

    async def remove(self, vm: Vm) -> None:
        """See ``Hypervisor.remove``."""
        copy = _leaving(vm, await self._list_for(vm))
        if copy is None:
            return
        if copy.state is not CopyState.SUSPENDED:
            raise HypervisorFailed(f"{copy.domain} is not suspended: it is not destroyed")
        await self._destroy(copy.domain)

    # ---- xl

    async def _destroy(self, domain: XlDomain) -> None:
        """Destroy it, and wait until it is gone; its own xl may be at it as well."""
        said = await self._run("destroy", str(domain.domid), seconds=XL_DESTROY_SECONDS_MAX)
        try:
            async with asyncio.timeout(XL_DESTROY_SECONDS_MAX):
                while (after := await self._find(domain)) is not None and after.dying:  # noqa: ASYNC110 - xl tells nobody
                    await asyncio.sleep(XL_GONE_POLL_SECONDS)
        except TimeoutError:
            log.warning("a domain is dying for long", domain=str(domain))
            return  # it cannot run any more, and nothing here can hasten it
        if after is not None:
            raise HypervisorFailed(f"{domain} is still there: try xl destroy {domain.domid}{said.last}")

    async def _find(self, domain: XlDomain) -> XlDomain | None:
        """The same domain as it stands now, whatever it is called."""
        return next((now for now in await self._list() if (now.domid, now.uuid) == (domain.domid, domain.uuid)), None)

    async def _list_for(self, vm: Vm) -> list[XlDomain]:
        """All domains, to look for this machine; a name that breaks the list is refused before xl hears anything."""
        _check_name(vm.name)
        return await self._list()

    async def _list(self) -> list[XlDomain]:
        said = await self._run("list", "-v")
        if said.code:
            raise HypervisorFailed(f"xl cannot list the domains: run xl list as root here{said.last}")
        return read_list(said.out)

    async def _run(self, *words: str, seconds: float = XL_SECONDS_MAX) -> _Said:
        """Run xl with these words, and no standard input: it would eat it.

        Raises:
            HypervisorFailed: it cannot be started, does not end in time, or says too much.
        """
        told = f"xl {words[0]}"
        try:
            said = await run_command((self._program, *words), seconds=seconds, bytes_max=XL_OUTPUT_BYTES_MAX)
        except TimeoutError:
            raise HypervisorFailed(
                f"{told} did not end in {seconds:.0f} s: another xl may hold libxl's lock, look with ps"
            ) from None
        except OSError as error:
            raise HypervisorFailed(
                f"cannot start {told}: {error.strerror}: is this Xen's dom0, and {self._program} on the PATH?"
            ) from None
        if said.out is None or said.err is None:
            raise HypervisorFailed(f"{told} says more than {XL_OUTPUT_BYTES_MAX} bytes: is {self._program} Xen's xl?")
        return _Said(said.code, said.out, said.err)


def _state(copy: _Copy | None) -> CopyState:
    return CopyState.ABSENT if copy is None else copy.state


def _arrived(vm: Vm, listed: Sequence[XlDomain]) -> _Copy | None:
    """The copy that came here.

    Not pinned, a suspended one is not it: no copy is suspended before it has run, so that is the one that leaves
    when a machine migrates within its host.
    """
    ours = _ours(vm, listed)
    for domain in ours:
        if domain.name == vm.name + INCOMING:
            return _Copy(domain, CopyState.INCOMING)
    for domain in ours:
        if vm.copy or (domain.name == vm.name and not domain.suspended):
            if not domain.paused or domain.shutdown:
                return _Copy(domain, CopyState.RUNNING)
            return _Copy(domain, CopyState.PAUSED if domain.name == vm.name else CopyState.INCOMING)
    return None


def _leaving(vm: Vm, listed: Sequence[XlDomain]) -> _Copy | None:
    """The copy that was here first.

    Raises:
        HypervisorFailed: there are two, and it was not written down which.
    """
    ours = [domain for domain in _ours(vm, listed) if domain.name != vm.name + INCOMING]
    if len(ours) > 1:
        raise HypervisorFailed(
            f"there are two copies of {vm.name} here, {' and '.join(map(str, ours))}, and nothing says which one "
            f"was to leave: look which runs (xl list), and destroy or rename the other by its id"
        )
    if not ours:
        return None
    domain = ours[0]
    if domain.suspended:
        return _Copy(domain, CopyState.SUSPENDED)
    return _Copy(domain, CopyState.PAUSED if domain.paused and not domain.shutdown else CopyState.RUNNING)


def _ours(vm: Vm, listed: Sequence[XlDomain]) -> list[XlDomain]:
    """Domains that are this machine: of its UUID, and the pinned one, else under one of its three names.

    A pinned one that an operator has renamed is there none the less: to call it gone is to let another one run.
    """
    domains = [domain for domain in listed if domain.domid and not domain.dying and vm.uuid in ("", domain.uuid)]
    if not vm.copy:
        names = {vm.name, vm.name + INCOMING, vm.name + AWAY}
        return [domain for domain in domains if domain.name in names]
    domid, boot = _pinned(vm)
    if boot != _boot_id():
        return []  # what has that id today was made after the host came up again
    return [domain for domain in domains if str(domain.domid) == domid]


def _refuse_twin(domain: XlDomain, listed: Sequence[XlDomain]) -> None:
    """Whatever anybody says, no copy is made to run beside one that does, or that has run on.

    Raises:
        HypervisorFailed: there is one.
    """
    for other in listed:
        still = other.paused or other.suspended or other.dying
        if other.uuid == domain.uuid and other.domid != domain.domid and not still:
            raise HypervisorFailed(
                f"{other} is the same machine, and runs: {domain} is not made to run beside it. Look at both "
                f"(xl list, xl console), and destroy the older one by its id"
            )


def _pinned(vm: Vm) -> tuple[str, str]:
    """The id of the domain that ``pin`` has found, and the boot that it belongs to; both empty if none was pinned."""
    domid, _, boot = vm.pinned.partition("@")
    return domid, boot


def _check_name(name: str) -> None:
    """A name that could be an option, another line of the list or nothing at all is not asked about.

    Raises:
        HypervisorFailed: it is one.
    """
    if not name or name.startswith("-") or not name.isprintable() or name != name.strip():
        raise HypervisorFailed(f"a domain's name like {name[:40]!r} is not handled: give it another one (xl rename)")
    if len(name) > VM_NAME_CHARACTERS_MAX:
        raise HypervisorFailed(f"a domain's name has at most {VM_NAME_CHARACTERS_MAX} characters here")


def _boot_id() -> str:
    """Tells this run of the host from the next, in which ids begin anew."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError as error:
        raise HypervisorFailed(f"cannot read {_BOOT_ID}: {error.strerror}: is /proc mounted?") from None

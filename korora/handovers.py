"""Hand-overs in a relay's process: its journal, its hypervisors, and the round that finishes what was left."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from crypto.errors import CryptoError
from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from proxy.authority import Trustee
from proxy.control import printable
from proxy.endpoints.spec import parse_address
from proxy.errors import ConfigurationError, HypervisorFailed, JournalBusy, PolicyRefused, RelayError
from proxy.handover.machine import Handover
from proxy.handover.record import Record
from proxy.handover.table import Event, Side, State
from proxy.hypervisors.base import FATES, CopyState, Fate, Hypervisor
from proxy.limits import ORDER_DONE_SECONDS_MAX, ORDER_SECONDS_MAX, RECOVERY_SECONDS, RECOVERY_SECONDS_MIN
from proxy.shell.contact import Contact, Peer
from proxy.shell.errand import peek
from proxy.shell.handovers import Handovers, Reach
from proxy.shell.journal import Journal
from proxy.shell.orders import give
from proxy.vtpm import Carriers

log = structlog.get_logger("korora.handover")


def toolstack(kind: str, monitor: str) -> Hypervisor:
    """The local hypervisor of a kind; ``monitor`` is QEMU's socket.

    Raises:
        ConfigurationError: there is no such kind here.
    """
    if kind == "xl":
        from proxy.hypervisors.xl import XlToolstack
        from proxy.hypervisors.xl_monitor import XlMonitors

        return XlToolstack(monitors=XlMonitors())
    if kind == "qmp" and monitor:
        from proxy.hypervisors.qmp import QemuMonitor

        return QemuMonitor(Path(monitor))
    raise ConfigurationError(f"no hypervisor of kind {kind!r} can be asked here", "update this relay")


def open_handovers(
    state: Path, ended: Callable[[Record], None] | None = None, trustee: Trustee | None = None
) -> Handovers:
    """The hand-overs of a relay that keeps its state in ``state``; ``ended``, ``trustee``: see ``Handovers``.

    Raises:
        ConfigurationError: it is to move vTPMs along, and does not know how.
    """
    return Handovers(Journal(state), toolstack, ended=ended, vtpms=_vtpms(state), trustee=trustee)


def _vtpms(state: Path) -> Carriers | None:
    if not (state / "vtpm.toml").exists():
        return None  # and nothing of it is loaded
    from korora.agents.vtpm.host import open_agent

    return open_agent(state)


def reach(identity: Path, rules: PeerRules | None = None) -> Reach:
    """How a hand-over's destination is reached: where its session went, and nobody but whom that went to.

    Args:
        identity: of this host.
        rules: what sessions demand of peers besides a name: their pins, and how keys are exchanged.
    """
    demanded = rules or PeerRules()

    def contact(record: Record) -> Contact | None:
        if not record.head.address:
            return None
        host, port = parse_address(record.head.address, "the journal's address")
        only = replace(demanded, names=frozenset({record.head.peer}))
        tls = TlsConfig(Identity.load(identity, now=datetime.now(UTC)), TlsRole.CLIENT, only)
        return Contact(tls, Peer(host, port))

    return contact


async def recover_for_ever(
    handovers: Handovers, how: Callable[[], Reach], told: Callable[[list[Record]], None] = lambda _: None
) -> None:
    """Look at what is unsettled at once and again and again, until cancelled.

    The pauses double from ``RECOVERY_SECONDS_MIN`` to ``RECOVERY_SECONDS``, and begin anew when a session leaves
    something: most networks that were cut, and most relays that were killed, are back within seconds, and meanwhile a
    machine may run nowhere. What is left while an earlier round is still at work does not wait for its end.

    Args:
        handovers: of this process.
        how: destinations are reached; may change.
        told: what stays unsettled, after each look; see ``Handovers.recover``.
    """

    async def look() -> None:
        try:
            told(await handovers.recover(how()))
        except (RelayError, CryptoError, OSError) as error:
            log.warning("hand-overs could not be looked after", reason=str(error))

    looks: set[asyncio.Task[None]] = set()
    pause = RECOVERY_SECONDS_MIN
    try:
        while True:
            one = asyncio.create_task(look())
            looks.add(one)
            one.add_done_callback(looks.discard)
            try:
                async with asyncio.timeout(pause):
                    await handovers.left.wait()
                pause = RECOVERY_SECONDS_MIN
            except TimeoutError:
                pause = min(2 * pause, RECOVERY_SECONDS)
    finally:
        for one in looks:
            one.cancel()
        await asyncio.gather(*looks, return_exceptions=True)


async def finish_earlier(handovers: Handovers, how: Reach, address: str) -> None:
    """What an earlier migration to the same relay left: it would be in the next one's way."""
    await handovers.recover(how, lambda record: record.side is Side.SOURCE and record.head.address == address)


def leave_behind(
    handovers: Handovers, session: str, *, identity: Path, state: Path, rules: PeerRules, seconds: int
) -> None:
    """A command that must end leaves an unsettled hand-over to a process of its own, which outlives it.

    Args:
        handovers: of this process.
        session: the hand-over's.
        identity, state: this relay's folders.
        rules: what the session has demanded of its peer.
        seconds: how long that process tries.
    """
    with suppress(OSError):
        mine = [record for record in handovers.unsettled() if record.head.session == session]
        if not any(record.side is Side.SOURCE for record in mine):
            return
        subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "korora", "handover", "recover", session),
                *("--identity", str(identity), "--state", str(state), "--wait", str(seconds)),
                *(f"--pin={pin.hex()}" for pin in sorted(rules.pins)),
                *(["--allow-classical"] if rules.allow_classical else []),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        log.warning("the hand-over is looked after by a process of its own", session=session[:8])


# ---- what an operator asks and says


_ANSWER_POLL_SECONDS: Final = 0.1
_SLOW: Final = (
    "the relay at work on that hand-over has heard it, and is not done yet",
    "see korora handover show; its log says what it waits for",
)
_DEAF: Final = (
    "a process is at work on that hand-over, and does not wait for an operator's word",
    "see how it stands, korora handover show; if it stays so, stop that relay and say it again",
)


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a hand-over, in words for people.

    Args:
        copy: how the copy on this host stands.
        peer: where the other relay says that it stands.
        advice: what is left to do.
    """

    copy: str
    peer: str
    advice: str


_ADVICE: Final = {
    (Side.SOURCE, State.OPEN): "nothing is decided yet; korora handover recover sees that it runs here",
    (Side.SOURCE, State.PREPARED): "it may be taken back: korora handover recover",
    (Side.SOURCE, State.VOTED): "it may be taken back: korora handover recover",
    (Side.SOURCE, State.COMMITTED): "it may run at the peer; reach that relay: korora handover recover --wait 600",
    (Side.SOURCE, State.ABORTED): "it runs here; the peer is to be told: korora handover recover",
    (Side.SOURCE, State.DONE): "it runs at the peer; the copy here is to go: korora handover recover",
    (Side.SOURCE, State.DOUBT): "look at both hosts, then korora handover resolve, here or there",
    (Side.DESTINATION, State.UNDOING): "its copy here is to go: korora handover recover",
    (Side.DESTINATION, State.OPEN): "the relay here clears up by itself: korora handover recover",
    (Side.DESTINATION, State.PREPARED): "the source has to say how it ends; its relay does so once it is back",
    (Side.DESTINATION, State.VOTED): "the source has to say how it ends; its relay does so once it is back",
    (Side.DESTINATION, State.COMMITTED): "it is to run here: korora handover recover",
    (Side.DESTINATION, State.DOUBT): "it may have run here and is gone: look at both hosts, then decide at the source",
}


def advice(record: Record) -> str:
    """What is left to do about an unsettled hand-over."""
    return _ADVICE.get((record.side, record.state), "nothing")


def meaning(record: Record, *, run_here: bool) -> str:
    """What an operator says by ``resolve``, and what follows from it: relays believe what they cannot see."""
    name, peer = printable(record.vm.name) or "the machine", printable(record.head.peer)
    source = record.side is Side.SOURCE
    if run_here:
        ran = "has not run since it left here" if source else "has not run on since it was given up"
        return (
            f"--run-here says that the copy of {name} at {peer} is gone for good, and {ran}: the copy here is run, and "
            f"if the other one did run, with disks that are newer than its memory"
        )
    if source:
        return (
            f"--give-up says that the copy of {name} at {peer} is whole, and the one to run on: the copy here is "
            f"destroyed"
        )
    if record.state is State.DOUBT:
        return (
            f"--give-up says that the copy of {name} which was lost here never ran: {peer} is told so, and runs its "
            f"own, whose memory is older than the disks if the copy here did run. Then give up at {peer} first, and "
            f"boot {name} from its disks"
        )
    return (
        f"--give-up says that {name} is not to run here: the copy here, which has not run, is destroyed, and {peer} is "
        f"told so, and runs its own if it has one"
    )


async def ask(handovers: Handovers, record: Record, how: Reach) -> Told:
    """Ask the local hypervisor, and the other relay if this side knows where it listens.

    Args:
        handovers: of this host.
        record: of the hand-over.
        how: the destination is reached.
    """
    hypervisor = handovers.toolstack(record.head.kind, record.head.monitor)
    try:
        look = hypervisor.departing if record.side is Side.SOURCE else hypervisor.arriving
        standing = await look(record.vm) if record.begun else None
        copy = "unknown: it had not begun" if standing is None else standing.value
        if standing is CopyState.ABSENT and record.side is Side.SOURCE:
            copy += f": {FATES[await hypervisor.fate(record.vm)]}"
    except RelayError as error:
        copy = f"unknown: {error}"
    finally:
        hypervisor.let_go()
    peer = "unknown: it calls this side, and has not"
    if record.side is Side.SOURCE:
        try:
            contact = how(record)
            peer = "unknown: no address" if contact is None else await peek(contact, record)
        except (RelayError, CryptoError, OSError) as error:
            peer = f"unknown: {error}"
    return Told(copy, peer, "nothing" if record.settled else advice(record))


async def finish(handovers: Handovers, records: list[Record], how: Reach, wait: int) -> list[Record]:
    """Take unsettled hand-overs up, each for ``wait`` seconds at most; how they stand afterwards.

    Args:
        handovers: of this host.
        records: of the hand-overs.
        how: destinations are reached.
        wait: for one that is away.

    Raises:
        JournalBusy: a single one was asked for, and a relay is at work on it.
    """
    after = []
    for record in records:
        try:
            contact = how(record) if record.side is Side.SOURCE else None
            party = await handovers.recover_one(record, contact, seconds=wait)
        except JournalBusy:
            if len(records) == 1:
                raise
            party = None
        after.append(record if party is None else party.record)
    return after


async def decide(handovers: Handovers, record: Record, *, run_here: bool) -> Record:
    """An operator says which copy is to run; a process that has the hand-over in hand is told, and does it.

    Raises:
        ConfigurationError: the hand-over is not one that needs it.
        PolicyRefused: this user may not decide it.
        JournalBusy: who has it in hand does not listen.
        HypervisorFailed: it could not be done.
    """
    if run_here:
        await _is_here(handovers, record)
    event = Event.RUN_HERE if run_here else Event.GIVE_UP
    while True:
        before = record.state
        try:
            party = await handovers.recover_one(record, None, operator=(event, os.getuid()))
        except JournalBusy:
            if await _ordered(handovers.journal, record, event):
                return _again(handovers, record)
            record = _again(handovers, record)  # whoever had it has let it go, and may have changed it
            continue
        if party is None:
            raise ConfigurationError("that hand-over has gone", "see korora handover list --all")
        if party.trouble:
            raise HypervisorFailed(party.trouble)
        if party.state is before and before in (State.DONE, State.ABORTED):
            raise ConfigurationError(
                f"that hand-over has ended: {before.value}", "use the hypervisor's own commands from here on"
            )
        return party.record


async def _is_here(handovers: Handovers, record: Record) -> None:
    """What is to run has to be there.

    Raises:
        ConfigurationError: it is not.
    """
    hypervisor = handovers.toolstack(record.head.kind, record.head.monitor)
    look = hypervisor.departing if record.side is Side.SOURCE else hypervisor.arriving
    try:
        standing = await look(record.vm)
        gone = standing is CopyState.ABSENT and record.side is Side.SOURCE
        again = gone and await hypervisor.fate(record.vm) is Fate.AGAIN
    finally:
        hypervisor.let_go()
    if standing is CopyState.ABSENT and not again:
        raise ConfigurationError(
            f"there is no copy of {record.vm.name or 'the machine'} here to run",
            "run the one at the peer: korora handover resolve --run-here there, --give-up here",
        )


def _again(handovers: Handovers, record: Record) -> Record:
    """A hand-over as it stands now.

    Raises:
        ConfigurationError: it is not there any more.
    """
    for one in handovers.journal.records():
        if (one.head.session, one.side) == (record.head.session, record.side):
            return one
    raise ConfigurationError("that hand-over has gone", "see korora handover list --all")


async def _ordered(journal: Journal, record: Record, event: Event) -> bool:
    """Have it done by the process that has the hand-over in hand; whether it was. Else that one has let it go.

    Raises:
        ConfigurationError: nothing is to be decided, as it stands.
        JournalBusy: it is not done in time.
        HypervisorFailed: it could not be done.
        PolicyRefused: this user may not decide it.
    """
    if not Handover(record.side, record.state).takes(event):
        raise ConfigurationError(
            f"that hand-over is {record.state.value} and being worked on: nothing is left to an operator now",
            "wait, and look again: korora handover show",
        )
    loop = asyncio.get_running_loop()
    given = give(journal, record, event)
    try:
        deadline, taken = loop.time() + ORDER_SECONDS_MAX, False
        while (answer := given.answer()) is None:
            if not journal.held(record.head.session, record.side) and (given.withdraw() or given.answer() is None):
                return False
            if loop.time() > deadline:
                if taken or given.withdraw():
                    raise JournalBusy(*_SLOW if taken else _DEAF)
                taken, deadline = True, loop.time() + ORDER_DONE_SECONDS_MAX
            await asyncio.sleep(_ANSWER_POLL_SECONDS)
    finally:
        given.close()
    if answer.rule:
        raise PolicyRefused(answer.trouble, answer.rule)
    if answer.trouble:
        raise HypervisorFailed(answer.trouble)
    return True

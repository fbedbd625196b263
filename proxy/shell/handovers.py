"""All hand-overs of one relay process: those of its sessions, and what its journal has of others.

Whoever acts on a hand-over holds its file's lock. A process that finds a hand-over locked leaves it to the other one.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, ParamSpec, TypeVar

import structlog

from crypto.errors import CryptoError
from crypto.keys import SessionId
from proxy.authority import Nobody, Trustee
from proxy.control import PROTOCOL_VERSION, Recover, Word, printable
from proxy.endpoints.base import Connection
from proxy.errors import (
    HypervisorFailed,
    JournalBusy,
    PeerRefused,
    PolicyRefused,
    RelayError,
)
from proxy.handover.record import Entry, Head, Record
from proxy.handover.table import Event, Side, State
from proxy.handover.words import event_of, word_of
from proxy.handover.xl import READY_END
from proxy.hypervisors.base import Hypervisor
from proxy.limits import ENDED_SESSIONS_MAX, RECOVERIES_MAX
from proxy.process import lives
from proxy.shell.contact import Contact
from proxy.shell.errand import run_errand
from proxy.shell.guard import Approval, Guard
from proxy.shell.journal import Journal, JournalFile, now
from proxy.shell.orders import WHY, Ear
from proxy.shell.party import Bare, Party
from proxy.shell.recovery import began, look, look_again, never_began, settle, standing_here
from proxy.shell.waiting import Signal
from proxy.shell.whose import theirs, whose
from proxy.shell.xl_guard import XlBack, XlEnd
from proxy.vtpm import Carrier, Carriers, Verifier

log = structlog.get_logger("korora.handover")

P = ParamSpec("P")
F = TypeVar("F", bound=JournalFile | None)

_Key = tuple[str, Side]
"""A session's id, and which copy is here."""

Toolstack = Callable[[str, str], Hypervisor]
"""The local hypervisor of a kind, asked at ``monitor`` where that is not known from the kind."""

Reach = Callable[[Record], Contact | None]
"""How the destination of a hand-over is reached; None if this process does not know."""


class Handovers:
    """What a process knows of hand-overs.

    Args:
        journal: of this relay.
        toolstack: makes the local hypervisor.
        approvals: who has a say before a machine changes hosts.
        vtpms: who moves machines' vTPMs along; None: nobody.
        ended: told of each hand-over when the journal has how it ended, once, whoever in this process comes to that.
        trustee: is asked before one is taken up again whose session is over, and whether an operator may decide.
    """

    def __init__(
        self,
        journal: Journal,
        toolstack: Toolstack,
        approvals: Sequence[Approval] = (),
        *,
        ended: Callable[[Record], None] | None = None,
        vtpms: Carriers | None = None,
        trustee: Trustee | None = None,
    ) -> None:
        self.journal, self.toolstack, self.approvals = journal, toolstack, tuple(approvals)
        self._ended, self._vtpms, self._trustee = ended, vtpms, trustee or Nobody()
        self._live: dict[_Key, Guard] = {}
        self._ears: dict[_Key, Ear] = {}
        self._untold: dict[_Key, None] = {}
        """Hand-overs of destinations here whose sources have not heard yet how they ended, the oldest first."""
        self._over: dict[_Key, None] = {}
        """Of sessions that have ended here, decided, the oldest first: who holds xl's pipes was told, and will end."""
        self._told = Signal()
        self._recovering: set[str] = set()
        self._turns = asyncio.Semaphore(RECOVERIES_MAX)
        self.left = Signal()
        """For whoever recovers: a session has left something unsettled."""

    def carries(self, kind: str) -> bool:
        """Whether vTPMs of such a hypervisor's machines are moved along or, where QEMU does that, verified."""
        return self._vtpms is not None and self._vtpms.carries(kind)

    def carrier(self, head: Head) -> Carrier | None:
        """Who moves the vTPM of that hand-over's machine, or has verified it; None where nobody does."""
        if self._vtpms is None:
            return None
        if head.kind == "qmp":
            return self._vtpms.verifier(head.session, head.peer)  # whatever the host's file says by now
        return self._vtpms.of(head.session, head.peer) if self.carries(head.kind) else None

    def verifier(self, head: Head) -> Verifier | None:
        """Who verifies the vTPM that a session's stream carries; None where nobody does."""
        return (
            self._vtpms.verifier(head.session, head.peer) if self._vtpms is not None and self.carries("qmp") else None
        )

    def recipient(self, session: str, peer: str) -> bytes:
        """The key that a vTPM of that session is to be wrapped for; empty where none are moved along."""
        return b"" if self._vtpms is None else self._vtpms.recipient(session, peer)

    # ---- of sessions

    async def begin(self, head: Head) -> JournalFile:
        """Write down that a session has a hand-over.

        Raises:
            JournalError: it cannot be written down, so the session must not begin.
        """
        return await _kept(self.journal.begin, head, Entry("open", now()))

    def guards(self, guard: Guard) -> None:
        """``guard`` is at work in this process."""
        guard.party.ended = self._ended
        key = _key(guard.party.record)
        self._live[key] = guard
        guard.bare.theirs = theirs(self.journal, guard.party.record)
        self._ears[key] = Ear(self.journal, guard.party, guard.ordered, self._trustee)

    def released(self, guard: Guard) -> None:
        """It is not any more."""
        key = _key(guard.party.record)
        self._live.pop(key, None)
        if (ear := self._ears.pop(key, None)) is not None:
            ear.close()
        if guard.detached and key[1] is Side.DESTINATION and guard.party.decided and not guard.heard_of:
            _remember(self._untold, key)  # its source may never come
        if guard.party.decided:
            _remember(self._over, key)
        self._trustee.over(guard.party.record)
        guard.close()
        if not guard.party.record.settled:
            self.left.wake()

    @property
    def untold(self) -> int:
        """How many such sources there are; see ``told``."""
        return len(self._untold)

    async def told(self) -> None:
        """Wait until every source of a session that broke off here has heard how its hand-over ended."""
        while self._untold:
            await self._told.wait()

    def errand(self, contact: Callable[[], Contact]) -> "Callable[[Guard], asyncio.Future[None]]":
        """See ``XlSourceGuard``: as long as it takes to decide; a little longer for the destination to know."""

        async def run(guard: Guard) -> None:
            again = True
            while again and not (guard.stopping or guard.party.peer_agrees):
                work = asyncio.ensure_future(run_errand(contact(), guard.party))
                stopping = asyncio.ensure_future(_until_stopping(guard))
                try:
                    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (work, stopping):
                        task.cancel()
                    await asyncio.gather(work, stopping, return_exceptions=True)
                again = not guard.party.decided
            if guard.party.decided and guard.party.peer_agrees and not guard.party.trouble:
                await guard.party.settle()

        return lambda guard: asyncio.ensure_future(run(guard))

    # ---- a source has come back without its session

    async def answer(self, peer: str, session: SessionId, word: Word | Recover) -> Word:
        """Where this destination stands, once it has done what follows from where the source stands.

        Raises:
            PolicyRefused: it is not that peer's hand-over.
            PeerRefused: it speaks another version.
        """
        if isinstance(word, Recover) and word.version != PROTOCOL_VERSION:
            raise PeerRefused(f"protocol version {word.version}, this relay speaks {PROTOCOL_VERSION}")
        key = (session.hex(), Side.DESTINATION)
        guard = self._live.get(key)
        event, why = event_of(word), printable(word.why)
        if guard is not None:
            _same_peer(guard.party.record, peer)
            if word.state != "asked":
                self._has_heard(key)
                guard.heard_of = True
            if event is not None:
                await guard.answered(event, why)
            return _standing(guard.party)
        try:
            file = await _kept(self.journal.open, *key)
        except JournalBusy:
            return Word("busy")
        if file is None:
            return Word("unknown")
        party = self._bare(file)
        try:
            _same_peer(file.record, peer)
            if word.state == "asked":
                return _standing(party)  # it only looks
            self._trustee.recover(file.record)
            self._has_heard(key)
            if began(file.record):
                await look(party)
            else:
                await never_began(party)
            if event is not None:
                await party.tell(event, why)
            if party.decided and not party.trouble:
                await party.settle()
            return _standing(party)
        finally:
            self._let_go(party)

    def _has_heard(self, key: _Key) -> None:
        self._untold.pop(key, None)
        self._told.wake()

    def _bare(self, file: JournalFile) -> Party:
        async def silent(state: State, why: str) -> None:
            """The answer says it."""

        head = file.record.head
        try:
            hypervisor = self.toolstack(head.kind, head.monitor)
        except BaseException:
            file.close()
            raise
        party = Party(
            file, hypervisor, Bare(hypervisor, paused=head.paused, **whose(self.journal, file.record)), silent
        )
        party.ended, party.permit, party.carrier = self._ended, self._trustee.commit, self.carrier(head)
        return party

    def _let_go(self, party: Party) -> None:
        self._trustee.over(party.record)
        party.close()

    # ---- what the journal has

    def unsettled(self) -> list[Record]:
        """Hand-overs with something left to be done, and nobody at work on them in this process or about to be.

        Where another process holds xl's pipes, xl waits for what it is told by them: it will bring them. What is left
        of a QEMU that migrates again waits for that, too: to revive it would cancel that migration.
        """
        return [record for record in self._unfinished() if not self._at_work(record)]

    def _unfinished(self) -> list[Record]:
        return [record for record in self.journal.records() if not record.settled]

    def _at_work(self, record: Record) -> bool:
        busy = {guard.party.record.head.monitor for guard in self._live.values()} - {""}
        key = _key(record)
        return key in self._live or record.head.monitor in busy or (key not in self._over and lives(record.head.holder))

    async def recover(self, reach: Reach, wanted: Callable[[Record], bool] = lambda record: True) -> list[Record]:
        """Go through what is unsettled, and ``wanted``, once, and do what can be done.

        Several machines at a time, and beside an earlier call that still has others in hand: one may take a minute, and
        a machine that runs nowhere must not wait for that.

        Returns:
            what is unsettled then. A hand-over that a session or another process is at work on is among it once it is
            more than OPEN: it takes moments, or something is wrong.
        """
        machines: dict[str, list[Record]] = {}
        for record in await asyncio.to_thread(self._unfinished):
            if wanted(record):
                machines.setdefault(_machine(record), []).append(record)
        turns = (self._in_turn(machine, records, reach) for machine, records in machines.items())
        others = {key for keys in await asyncio.gather(*turns) for key in keys}
        return [
            record
            for record in await asyncio.to_thread(self._unfinished)
            if record.state is not State.OPEN or not (_key(record) in others or self._at_work(record))
        ]

    async def _in_turn(self, machine: str, records: Sequence[Record], reach: Reach) -> set[_Key]:
        """Try to finish a machine's hand-overs, the oldest first; those that were left to somebody at work on them."""
        if machine in self._recovering:
            return {_key(record) for record in records}
        self._recovering.add(machine)
        try:
            async with self._turns:
                return {_key(record) for record in records if await self._left_to_others(record, reach)}
        finally:
            self._recovering.discard(machine)

    async def _left_to_others(self, record: Record, reach: Reach) -> bool:
        """Try to finish a hand-over; whether that was left to somebody who is at work on it."""
        if self._at_work(record):
            return True
        try:
            await self.recover_one(record, _reached(reach, record))
        except JournalBusy:
            return True
        except (RelayError, CryptoError, OSError) as error:
            log.warning("a hand-over stays unsettled", session=record.head.session[:8], reason=str(error))
        return False

    async def readopt(self, session: str, connection: Connection, reach: Reach) -> Party | None:
        """xl's pipes have come back after the process that had its session died: see the hand-over through.

        Args:
            session: its id.
            connection: the pipes; closed when xl has been told how it ended.
            reach: how the destination is reached.

        Returns:
            How it ended; None where READY had not passed: xl has seen the end, and resumes by itself.

        Raises:
            JournalBusy: another process is at work on it; the pipes are untouched.
            JournalError, HypervisorFailed, PolicyRefused: it cannot be taken up; likewise.
        """
        file = await _kept(self.journal.open, session, Side.SOURCE)
        if file is None or file.record.state is State.OPEN:
            if file is not None:
                file.close()
            await connection.abort()
            self.left.wake()
            return None
        party = self._bare(file)
        try:
            self._trustee.recover(file.record)
            end = XlEnd(connection, READY_END, party.log)
            party.hands = XlBack(party.hypervisor, end, **whose(self.journal, file.record))
            await look_again(party, self.journal)
            contact = reach(file.record)
            if contact is not None:
                with Ear(self.journal, party, party.tell, self._trustee):
                    await run_errand(contact, party)
            elif not party.decided:
                raise HypervisorFailed("the journal does not say where the destination is")
            await settle(party, await standing_here(party))
            return party
        finally:
            self._let_go(party)
            self.left.wake()

    async def recover_one(
        self,
        record: Record,
        contact: Contact | None,
        *,
        seconds: float = 0.0,
        operator: tuple[Event, int] | None = None,
    ) -> Party | None:
        """Take one hand-over up where its journal ends.

        Args:
            record: as it was read.
            contact: of a source: how its destination is reached; None to leave it out.
            seconds: how long to try to reach it.
            operator: RUN_HERE or GIVE_UP, and whose word it is, if an operator says so: his uid.

        Raises:
            JournalBusy, JournalError: it cannot be taken up.
            HypervisorFailed: the hypervisor cannot be asked.
            PolicyRefused: this process may not take it up, or he may not decide.
        """
        file = await _kept(self.journal.open, record.head.session, record.side)
        if file is None:
            return None
        party = self._bare(file)
        try:
            self._trustee.recover(file.record)
            if operator is not None:
                self._trustee.resolve(file.record, operator[1])
            if not began(file.record):
                await never_began(party)
            elif operator is not None and operator[0] is Event.RUN_HERE:
                await look(party)
            else:
                await look_again(party, self.journal)
            if operator is not None:
                await party.tell(operator[0], WHY)
            if record.side is Side.SOURCE and contact is not None and not (party.decided and party.peer_agrees):
                party.hypervisor.let_go()  # others may have something to ask it meanwhile
                with Ear(self.journal, party, party.tell, self._trustee):
                    await run_errand(contact, party, seconds=seconds)
            await settle(party, await standing_here(party) if file.record.begun else None)
            return party
        finally:
            self._let_go(party)


async def _kept(make: Callable[P, F], *args: P.args, **kwargs: P.kwargs) -> F:
    """What ``make`` gives, made in a thread; whoever is cancelled meanwhile leaves no file locked behind."""
    making = asyncio.ensure_future(asyncio.to_thread(make, *args, **kwargs))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_let_go)
        raise


def _let_go(making: "asyncio.Future[F]") -> None:
    if not making.cancelled() and making.exception() is None and (file := making.result()) is not None:
        file.close()


def _reached(reach: Reach, record: Record) -> Contact | None:
    """How a source reaches its destination; None where it cannot now: what needs no peer is done without."""
    try:
        return reach(record) if record.side is Side.SOURCE else None
    except (RelayError, CryptoError, OSError) as error:
        log.warning("a destination cannot be asked", session=record.head.session[:8], reason=str(error))
        return None


def _standing(party: Party) -> Word:
    return word_of(party.handover.word or State.OPEN, party.trouble or party.record.why)


def _same_peer(record: Record, peer: str) -> None:
    if record.head.peer != peer:
        raise PolicyRefused("that hand-over is another host's")


def _remember(keys: dict[_Key, None], key: _Key) -> None:
    while len(keys) >= ENDED_SESSIONS_MAX:
        del keys[next(iter(keys))]
    keys[key] = None


def _key(record: Record) -> _Key:
    return record.head.session, record.side


def _machine(record: Record) -> str:
    """What of several hand-overs only one at a time can be seen to: QEMU's monitor has one client, and others wait."""
    return record.head.monitor or record.vm.name or record.head.session


async def _until_stopping(guard: Guard) -> None:
    while not guard.stopping:
        await guard.party.changed.wait()


__all__: Final = ["Handovers", "Reach", "Toolstack"]

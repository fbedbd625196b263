"""The reference monitor of a process: no procedure of a session is performed but through it (E1 to E4).

``Monitor.perform`` asks, in this order: is it certified, are duties separated, is it its turn, and do the accesses that
it needs keep the formal machine secure. It changes something only if all say yes, and keeps what was performed.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

from korora.agents.integrity.certification import CONTROL, Certification, program
from korora.agents.integrity.items import CLAIMED, LEVELS, TRUSTED, Item, Kind, kind_of
from korora.agents.integrity.levels import Attribute, Level, Standing
from korora.agents.integrity.order import ORDER, Stage, expected
from korora.agents.integrity.procedures import USES, Procedure, Use
from korora.agents.integrity.requests import Answer, ChangeObject, Create, Get, Give, Release, Request
from korora.agents.integrity.rules import RULES, respond
from korora.agents.integrity.state import Access, State, Table
from proxy.errors import PolicyRefused

RULE: Final = "clark-wilson"
"""What refusals name as the rule that decided."""

SESSIONS_MAX: Final = 4096  # at once: above all that a daemon lets in, leaves and recovers; each takes some 10 KiB
PERFORMED_MAX: Final = 4096  # in one session: a peer may come back as often as it likes, and each is kept
ENDED_MAX: Final = 4096  # whose ids are remembered, so that none of them is offered again


@dataclass(frozen=True, slots=True)
class Performed:
    """A procedure was performed. When, its keeper says.

    Attributes:
        session: its id.
        subject: who performed it.
        procedure: which.
        items: on what.
    """

    session: str
    subject: str
    procedure: Procedure
    items: frozenset[Item]


@dataclass(slots=True)
class _Session:
    initiator: str
    stage: Stage
    state: State
    certification: Certification
    """Which the state's matrix says."""
    approvers: set[str] = field(default_factory=set)
    recovered: bool = False
    """It was taken up from the journal: whoever had to approve has done so before that was written."""
    performed: list[Performed] = field(default_factory=list)


class Monitor:
    """Of all sessions of a process.

    Args:
        certification: what is certified.
    """

    def __init__(self, certification: Certification) -> None:
        self._certification = certification
        self._sessions: dict[str, _Session] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def reload(self, certification: Certification) -> None:
        """Something else is certified now: it counts for whatever is performed next, in running sessions too."""
        self._certification = certification

    def begin(self, session: str, initiator: str) -> None:
        """A session starts.

        Args:
            session: its id.
            initiator: the subject that wants it: ``host:NAME`` where a machine arrives, ``uid:NUMBER`` or ``relay``
                where one leaves.

        Raises:
            PolicyRefused: it has begun already, there are too many, or the initiator is no subject.
        """
        if session in self._sessions:
            _refuse(f"session {session} has begun already", "a session's id is used once")
        if len(self._sessions) >= SESSIONS_MAX:
            _refuse(f"{SESSIONS_MAX} sessions are under way", "wait until some have ended")
        arriving = _kind(initiator) is Kind.HOST
        stage = Stage.AGAIN if session in self._ended else Stage.BEGUN
        self._sessions[session] = _Session(initiator, stage, initial_state(arriving=arriving), self._certification)

    def perform(self, session: str, subject: str, procedure: Procedure, items: frozenset[Item]) -> Performed:
        """Perform a procedure, or rather: let the caller perform it now.

        Args:
            session: its id.
            subject: ``relay``, ``host:NAME`` or ``uid:NUMBER``.
            procedure: what is to be done.
            items: on what; at least one.

        Raises:
            PolicyRefused: it is not certified, duties are not separated, it is not its turn, or the formal machine does
                not say yes. Nothing has changed then.
        """
        if session not in self._sessions:
            _refuse(f"session {session} has not begun", "it was ended, or never offered")
        found = self._found(session)
        what = f"{procedure} on {_listed(items)}"
        self._certified(subject, procedure, items)
        self._separated(found, subject, procedure)
        stage = ORDER.get((found.stage, procedure))
        if stage is None:
            turn = " or ".join(expected(found.stage))
            _refuse(f"{what} is out of order: the session is {found.stage.value}", f"what may come now is {turn}")
        if len(found.performed) >= PERFORMED_MAX:
            _refuse(f"session {session} has performed {PERFORMED_MAX} procedures", "migrate again")
        state = _admitted(found.state, subject, self._certification)
        for request in _requests(state, subject, procedure, items, self._certification):
            answer, state = respond(RULES, request, state)
            if answer is not Answer.YES:
                _refuse(
                    f"{subject} may not do {what}: the answer to {_told(request)} is {answer.value}",
                    "who stands lower does not change what stands higher, nor is trusted data made of what is not",
                )
        performed = Performed(session, subject, procedure, items)
        found.state, found.recovered = state, found.recovered or _taken_up(found, procedure)
        found.stage = stage
        if procedure is Procedure.APPROVE:
            found.approvers.add(subject)
        found.performed.append(performed)
        return performed

    def end(self, session: str) -> tuple[Performed, ...]:
        """A session is over.

        Returns:
            what was performed in it, in order; nothing if it had not begun.
        """
        found = self._sessions.pop(session, None)
        if found is None:
            return ()
        self._ended[session] = None
        self._ended.move_to_end(session)
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        return tuple(found.performed)

    def state(self, session: str) -> State:
        """The formal machine's state for a session that is under way.

        Raises:
            KeyError: it is not.
        """
        return self._found(session).state

    def _found(self, session: str) -> _Session:
        """The session, by what is certified now."""
        found = self._sessions[session]
        if found.certification is not self._certification:
            found.certification = self._certification
            found.state = _recertified(found.state, self._certification)
        return found

    def _certified(self, subject: str, procedure: Procedure, items: frozenset[Item]) -> None:
        _kind(subject)
        foreign = items - USES[procedure].keys()
        if foreign or not items:
            _refuse(
                f"{procedure} does not touch {_listed(foreign)}", f"it touches {_listed(frozenset(USES[procedure]))}"
            )
        if not self._certification.permits(subject, procedure, items):
            _refuse(
                f"{subject} has no triple for {procedure} on {_listed(items)}",
                f"{self._certification.by} has certified what may be done; the policy's [[triple]] tables say more",
            )

    def _separated(self, session: _Session, subject: str, procedure: Procedure) -> None:
        """Separation of duty (C3)."""
        certification = self._certification
        if procedure is Procedure.APPROVE and subject == session.initiator:
            _refuse(f"{subject} began the session, and may not approve it", "somebody else has to")
        if procedure is not Procedure.COMMIT:
            return
        if subject in session.approvers and not certification.approver_commits:
            _refuse(f"{subject} approved the session, and may not commit it", "somebody else has to")
        given = len(session.approvers)
        if given < certification.approvals and not session.recovered:
            _refuse(
                f"commit wants the approval of {certification.approvals}, and has that of {given}",
                "others approve by korora approve",
            )


def _taken_up(session: _Session, procedure: Procedure) -> bool:
    """Whether the session starts, as far as this process knows, with what the journal says."""
    return procedure is Procedure.RECOVER and session.stage in (Stage.BEGUN, Stage.AGAIN)


# ---------------------------------------------------------------- the formal machine's part

_VTPM: Final = Standing(Level.VTPM)


def initial_state(*, arriving: bool) -> State:
    """z0 of a session (15): nobody is there yet.

    Args:
        arriving: whether the machine is another host's until it has been verified: then there is no memory, and what
            it is called is a claim.
    """
    claimed = dict(CLAIMED)
    here = {Item.RECEIPTS: TRUSTED, Item.JOURNAL: TRUSTED, Item.CONFIGURATION: TRUSTED}
    if arriving:
        here[Item.CONFIGURATION] = Standing(Level.RELYING_PARTY)
    else:
        here |= {Item.MEMORY: TRUSTED, Item.DISKS: TRUSTED}
    below = {item.value: standing for item, standing in (here | claimed).items()}
    programs = {program(procedure): TRUSTED for procedure in Procedure}
    return State(
        accesses=frozenset(),
        matrix=frozenset(),
        subjects=Table(),
        objects=Table({CONTROL: TRUSTED, Item.VTPM.value: _VTPM} | programs | below),
        parents=Table(dict.fromkeys(below, CONTROL)),
    )


def _row(state: State, subject: str, certification: Certification) -> frozenset[Access]:
    return frozenset(
        Access(subject, obj, attribute) for obj, attribute in certification.accesses(subject) if obj in state.objects
    )


def _admitted(state: State, subject: str, certification: Certification) -> State:
    """The state with that subject in it, and its row in the matrix: the certifier's doing, no request of a session."""
    if subject in state.subjects:
        return state
    return replace(
        state,
        subjects=state.subjects.with_entry(subject, Standing(LEVELS[_kind(subject)])),
        matrix=state.matrix | _row(state, subject, certification),
    )


def _recertified(state: State, certification: Certification) -> State:
    """The state with another matrix. Nobody has an access between two procedures, so none is left without a right."""
    rows = (_row(state, subject, certification) for subject in state.subjects)
    return replace(state, matrix=frozenset().union(*rows))


def _requests(
    state: State, subject: str, procedure: Procedure, items: frozenset[Item], certification: Certification
) -> Iterator[Request]:
    """What a procedure asks of the machine: its accesses, and in the end their release."""
    uses = {item: USES[procedure][item] for item in sorted(items)}
    gets = [Get(subject, program(procedure), Attribute.EXECUTE)]
    if any(_needs_control(state, item, use) for item, use in uses.items()):
        gets.append(Get(subject, CONTROL, Attribute.WRITE))
    yield from gets
    for item, use in uses.items():
        if use.raises and state.of_object(item) != TRUSTED:
            yield ChangeObject(subject, item, TRUSTED)
    more = []
    for item, use in uses.items():
        if use.made_from is not None and item not in state.objects:
            if use.made_from not in items:
                more.append(Get(subject, use.made_from, Attribute.READ))
            yield Create(subject, item, CONTROL, TRUSTED)
            for other in state.subjects:
                for obj, attribute in certification.accesses(other):
                    if obj == item:
                        yield Give(subject, other, item, attribute)
    more += [Get(subject, item, attribute) for item, use in uses.items() for attribute in use.attributes]
    yield from more
    for got in (*gets, *more):
        yield Release(got.subject, got.obj, got.attribute)


def _needs_control(state: State, item: Item, use: Use) -> bool:
    return (use.raises and state.of_object(item) != TRUSTED) or (
        use.made_from is not None and item not in state.objects
    )


def _kind(subject: str) -> Kind:
    try:
        return kind_of(subject)
    except ValueError as error:
        _refuse(str(error), "name the subject as a certificate or the kernel does")


def _listed(items: frozenset[Item]) -> str:
    return ", ".join(sorted(items)) or "nothing"


def _told(request: Request) -> str:
    attribute = getattr(request, "attribute", None)
    return (
        f"{type(request).__name__.lower()} {getattr(request, 'obj', '')}{f' ({attribute.value})' if attribute else ''}"
    )


def _refuse(message: str, remedy: str) -> NoReturn:
    raise PolicyRefused(f"{RULE}: {message}; {remedy}", RULE)

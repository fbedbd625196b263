"""Who has a say on this host: its policy, the people whom that wants, and what is certified (``proxy.authority``).

A question is answered in this order: does the policy allow it, have enough people approved, may whoever does what
follows do it. Each may refuse, and the refusal names the rule.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from korora.agents.integrity.items import RELAY, Item
from korora.agents.integrity.monitor import RULE, Monitor
from korora.agents.integrity.procedures import Procedure
from korora.custody import Custody
from korora.policy.board import Facts, put_up
from korora.policy.decide import Decision, decide
from korora.policy.file import PolicyFile
from korora.policy.ledger import Usage
from korora.policy.shared import Ledger
from korora.watched import Unwatched, Watch
from proxy.authority import Act, Point, Question, Ruling
from proxy.errors import PolicyRefused
from proxy.session import Role

APPROVALS: Final = "approvals"
"""Folder in the state directory, where what waits for people is put up."""

LEDGER: Final = "ledger"
"""Folder in the state directory, where all processes count their sessions."""

_LEAVING: Final = frozenset({Item.STREAM, Item.CONFIGURATION, Item.MEMORY})
_MACHINE: Final = frozenset({Item.CONFIGURATION, Item.MEMORY, Item.JOURNAL})
_RECEIPTS: Final = frozenset({Item.RECEIPTS})


@dataclass(slots=True)
class _Session:
    initiator: str
    approvers: tuple[int, ...] = ()
    shown: Facts | None = None
    """What they have approved of, whatever rule wanted it: it counts for nothing else."""


class Office:
    """Answers for every session of a process.

    Args:
        here: NAME of this host.
        policy: that counts.
        folder: the state directory.
        now: the time, with its zone.
        watch: is told of every answer, and of how many wait for people.
    """

    def __init__(
        self,
        here: str,
        policy: PolicyFile,
        folder: Path,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        watch: Watch | None = None,
    ) -> None:
        self.here, self._policy, self._folder, self._now = here, policy, folder, now
        self._monitor = Monitor(policy.current.certification)
        self.custody = Custody(here, self._monitor)
        self._ledger = Ledger(folder / LEDGER)
        self._sessions: dict[str, _Session] = {}
        self._watch = watch or Unwatched()
        self._waiting: Counter[Role] = Counter()

    def reload(self, policy: PolicyFile) -> None:
        """What is asked next, in running sessions too, is answered by this policy."""
        self._policy = policy
        self._monitor.reload(policy.current.certification)

    async def ask(self, question: Question) -> Ruling:
        """See ``Authority.ask``."""
        role, point = question.role.value, question.point.value
        try:
            ruling = await self._ruling(question)
        except PolicyRefused:
            self._watch.decided(role, point, allowed=False)
            raise
        self._watch.decided(role, point, allowed=True)
        return ruling

    async def _ruling(self, question: Question) -> Ruling:
        key, now = _key(question), self._now()
        if question.point is Point.OFFER:
            self._begin(key, question, now)
        policy = self._policy.current
        decision = decide(policy, question, now, self._ledger.usage(now, key) if policy.counts else Usage())
        if not decision.allowed:
            raise PolicyRefused(f"refused by the policy of {self.here}: {decision.reason}", decision.rule)
        approvers = await self._approved(key, question, decision)
        return Ruling(
            point=question.point,
            rule=decision.rule,
            policy=self._policy.digest,
            rate_limit=decision.rate_limit,
            approvers=approvers,
            acts=self._perform(key, question, approvers),
        )

    def ended(self, question: Question) -> None:
        """See ``Authority.ended``."""
        key = _key(question)
        self._sessions.pop(key, None)
        self._ledger.end(key)
        self._monitor.end(key)

    def _begin(self, key: str, question: Question, now: datetime) -> None:
        initiator = f"host:{question.peer}"
        if question.role is Role.SOURCE:
            initiator = RELAY if question.user is None else f"uid:{question.user}"
        self._certified(self._monitor.begin, key, initiator)
        self._sessions[key] = _Session(initiator)
        try:
            self._ledger.begin(key, question.peer, question.tenant, question.user, now)
        except PolicyRefused:
            if self._policy.current.configured:  # else nobody goes by numbers
                raise

    async def _approved(self, key: str, question: Question, decision: Decision) -> tuple[int, ...]:
        """Those who have approved, once they are enough.

        Raises:
            PolicyRefused: they are not, in time; or somebody said no.
        """
        wanted = decision.approvals
        if wanted is None or question.point not in {Point.IDENTITY, Point.HANDOVER}:
            return ()
        session, facts = self._sessions[key], Facts.of(question, decision.rule, self.here)
        shown = msgspec.structs.replace(facts, rule="")
        given = tuple(uid for uid in session.approvers if uid in wanted.users and session.shown == shown)
        if len(given) >= wanted.count:
            return given
        up = put_up(self._folder / APPROVALS, question.session, facts, wanted, question.user)
        try:
            with self._waits(question.role):
                async with up as request:
                    session.approvers, session.shown = await request.enough(), shown
        except PolicyRefused as refusal:
            raise PolicyRefused(f"refused by the policy of {self.here}: {refusal}", decision.rule) from None
        return session.approvers

    @contextmanager
    def _waits(self, role: Role) -> Iterator[None]:
        self._waiting[role] += 1
        self._watch.approvals_waiting(role.value, self._waiting[role])
        try:
            yield
        finally:
            self._waiting[role] -= 1
            self._watch.approvals_waiting(role.value, self._waiting[role])

    def _perform(self, key: str, question: Question, approvers: tuple[int, ...]) -> tuple[Act, ...]:
        """What is done once this is answered by yes, each by whoever does it."""
        leaves = question.role is Role.SOURCE
        peer = f"host:{question.peer}"
        wanted: list[tuple[str, Procedure, frozenset[Item]]]
        match question.point:
            case Point.OFFER:
                offer = frozenset({Item.OFFER})
                wanted = [
                    (self._sessions[key].initiator, Procedure.OFFER, offer),
                    (RELAY, Procedure.ACCEPT, offer),
                    (RELAY, Procedure.RECORD, _RECEIPTS),
                ]
            case Point.IDENTITY:
                passing = (RELAY, _LEAVING) if leaves else (peer, frozenset({Item.STREAM}))
                wanted = [
                    (RELAY, Procedure.IDENTIFY, frozenset({Item.CONFIGURATION})),
                    (passing[0], Procedure.TRANSFER, passing[1]),
                ]
            case Point.HANDOVER:
                wanted = [
                    (RELAY, Procedure.VERIFY, frozenset({Item.STREAM, Item.MEMORY})),
                    *((f"uid:{uid}", Procedure.APPROVE, _MACHINE) for uid in approvers),
                    (RELAY, Procedure.RECORD, _RECEIPTS),
                    (RELAY, Procedure.COMMIT, _MACHINE),
                ]
            case Point.RESUME:
                wanted = [(peer, Procedure.RESUME, frozenset({Item.OFFER, Item.STREAM}))]
        for each in wanted:
            self._certified(self._monitor.perform, key, *each)
        return tuple(Act(subject, str(procedure), tuple(sorted(items))) for subject, procedure, items in wanted)

    def _certified(self, act: Callable[..., object], *args: object) -> None:
        try:
            act(*args)
        except PolicyRefused as refusal:
            raise PolicyRefused(f"refused at {self.here}: {refusal}", RULE) from None


def _key(question: Question) -> str:
    """A machine may leave this host and arrive at it in one session."""
    return f"{question.session}-{question.role.value}"

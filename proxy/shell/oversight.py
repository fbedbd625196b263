"""What a session asks of whoever has a say, in its own name, and what it was answered."""

from dataclasses import dataclass, replace

from proxy.authority import Authority, Point, Question
from proxy.errors import PolicyRefused
from proxy.handover.table import Side
from proxy.hypervisors.base import Vm
from proxy.report import Decision, SessionReport
from proxy.session import Role


@dataclass(slots=True)
class Oversight:
    """One session's questions.

    Attributes:
        authority: answers them; None where nobody has a say.
        question: what is known of the session; ``point`` and ``vm`` are of the last time it asked.
        report: every answer is written there.
    """

    authority: Authority | None
    question: Question
    report: SessionReport

    @classmethod
    def none(cls, session: bytes, report: SessionReport) -> "Oversight":
        """Nobody has a say on that session."""
        question = Question(Point.OFFER, Role.SOURCE, session.hex(), peer="", pin="", egress="", tenant="")
        return cls(None, question, report)

    async def ask(self, point: Point, vm: Vm | None = None) -> None:
        """May the session go on?

        Args:
            point: where it stands.
            vm: the machine, if it is known by now; once told, it need not be told again.

        Raises:
            PolicyRefused: no.
        """
        if self.authority is None:
            return
        self.question = replace(self.question, point=point, vm=vm or self.question.vm)
        try:
            ruling = await self.authority.ask(self.question)
        except PolicyRefused as refusal:
            self._write(Decision(point.value, allowed=False, rule=refusal.rule, reason=str(refusal)))
            raise
        self._write(Decision(point.value, allowed=True, rule=ruling.rule, approvers=list(ruling.approvers)))
        self.report.policy = ruling.policy or None
        if ruling.rate_limit is not None:
            self.report.rate_limit = ruling.rate_limit

    async def handover(self, side: Side, vm: Vm) -> None:
        """See ``guard.Approval``."""
        del side
        await self.ask(Point.HANDOVER, vm if vm.name or vm.uuid else None)

    def end(self) -> None:
        """The session is over."""
        if self.authority is not None:
            self.authority.ended(self.question)

    def _write(self, decision: Decision) -> None:
        self.report.decisions.append(decision)

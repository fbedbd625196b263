"""What a session asks of whoever has a say, in its own name, and what it was answered."""

from dataclasses import dataclass, replace
from typing import Final, Literal

from proxy.authority import Authority, Point, Question
from proxy.control import printable
from proxy.errors import PolicyRefused
from proxy.hypervisors.base import Vm
from proxy.limits import VM_NAME_CHARACTERS_MAX
from proxy.report import Decision, SessionReport
from proxy.session import Role

_POINTS: Final[dict[Point, Literal["offer", "identity", "handover", "resume"]]] = {
    Point.OFFER: "offer",
    Point.IDENTITY: "identity",
    Point.HANDOVER: "handover",
    Point.RESUME: "resume",
}


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
        self.question = replace(self.question, point=point, vm=vm or self.question.vm)
        if vm is not None:
            self.report.vm, self.report.vm_uuid = printable(vm.name)[:VM_NAME_CHARACTERS_MAX] or None, vm.uuid or None
        if self.authority is None:
            return
        try:
            ruling = await self.authority.ask(self.question)
        except PolicyRefused as refusal:
            self._write(Decision(_POINTS[point], allowed=False, rule=refusal.rule, reason=str(refusal)))
            raise
        decision = Decision(_POINTS[point], allowed=True, rule=ruling.rule, approvers=list(ruling.approvers))
        self.report.policy = ruling.policy or None
        if point is not Point.RESUME or decision not in self.report.decisions:
            # A peer may come back as often as it likes, and a receipt has room for so many: told once, it is told.
            self._write(decision)
            self.report.procedures += ruling.acts
        if ruling.rate_limit is not None:
            self.report.rate_limit = ruling.rate_limit

    def end(self) -> None:
        """The session is over."""
        if self.authority is not None:
            self.authority.ended(self.question)

    def _write(self, decision: Decision) -> None:
        self.report.decisions.append(decision)

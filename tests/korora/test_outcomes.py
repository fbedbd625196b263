"""One outcome for each session, whoever is cancelled; and no more of a peer that is refused again and again."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Event

import pytest
from structlog.testing import capture_logs

from crypto.receipts import dsse
from crypto.receipts.statement import Stage
from korora.notary import Notary
from korora.refusals import PEERS_MAX, REFUSALS_LOGGED_MAX, REFUSALS_WINDOW, Refusals
from proxy.errors import StreamCorrupt
from proxy.report import SessionReport
from proxy.session import Role
from tests.korora.test_notary import QUESTION, Both, both

__all__ = ["both"]


# ---- one outcome, whatever a cancelled session has left at work


class Ends:
    """Both ends' deeds of a session that is about to conclude, and the outcome as the source has signed it."""

    def __init__(self, both: Both) -> None:
        self.both = both
        self.reports = tuple(SessionReport(role.value, "ab" * 16, datetime.now(UTC)) for role in Role)
        by_role = {report.role: report for report in self.reports}
        self.report = by_role["destination"]
        deeds = {}
        for role, here, there in ((Role.SOURCE, 0, 1), (Role.DESTINATION, 1, 0)):
            question = replace(
                QUESTION,
                role=role,
                peer=both.tls[there].identity.name,
                pin=both.tls[there].identity.spki_sha256.hex(),
            )
            deeds[role] = both.notaries[here].begin(question, by_role[role.value])
        source, self.destination = deeds[Role.SOURCE], deeds[Role.DESTINATION]
        evidence, head = self.destination.accept(source.offer())
        self.destination.met(source.accepted(evidence, head))
        self.receipt = source.conclude()

    def outcomes(self) -> list[tuple[str, int]]:
        """In the destination's log: how it ended, and how many signed that."""
        found = self.both.entries(1)
        return [(made.predicate.outcome, signed) for made, signed in found if made.predicate.stage is Stage.OUTCOME]


def test_a_session_that_is_cancelled_while_its_outcome_is_logged_logs_no_other(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread cannot be called back: the session is over while it still waits for the disk."""
    ends = Ends(both)
    notary, at_it, may = both.notaries[1], Event(), Event()
    append = notary.log.append

    def slowly(envelope: dsse.Envelope) -> int:
        at_it.set()
        assert may.wait(10.0)
        return append(envelope)

    monkeypatch.setattr(notary.log, "append", slowly)
    ends.report.ended, ends.report.outcome = datetime.now(UTC), "interrupted"
    with ThreadPoolExecutor(2) as threads:
        concluding = threads.submit(ends.destination.concluded, ends.receipt)
        assert at_it.wait(10.0)
        ending = threads.submit(notary.ended, ends.report)
        with pytest.raises(TimeoutError):
            ending.result(0.2)  # it waits its turn
        may.set()
        concluding.result(10.0)
        ending.result(10.0)
    assert ends.outcomes() == [("done", 2)]


def test_an_outcome_that_comes_after_the_end_is_not_signed(both: Both) -> None:
    ends = Ends(both)
    ends.report.ended, ends.report.outcome = datetime.now(UTC), "interrupted"
    both.notaries[1].ended(ends.report)
    with pytest.raises(StreamCorrupt, match="was over here before its outcome came"):
        ends.destination.concluded(ends.receipt)
    assert ends.outcomes() == [("aborted", 1)]


# ---- a peer that is refused again and again


def refuse(notary: Notary, number: int, peer: str = "alpha") -> None:
    report = SessionReport("destination", f"{number:032x}", datetime.now(UTC), peer=peer)
    question = replace(QUESTION, role=Role.DESTINATION, session=report.session_id, peer=peer)
    notary.begin(question, report)
    notary.refused(report, "refused by the policy")


def test_a_peer_that_is_refused_again_and_again_does_not_fill_the_log(both: Both) -> None:
    notary, told = both.notaries[1], both.told[1]
    with capture_logs() as logged:
        for number in range(REFUSALS_LOGGED_MAX + 20):
            refuse(notary, number)
        refuse(notary, 10_000, "gamma")
    assert notary.log.head()[0] == REFUSALS_LOGGED_MAX + 1  # and of another one as before
    assert told.spared == 20
    assert [line["peer"] for line in logged if "no more receipts are kept" in line["event"]] == ["alpha"]


def test_refusals_are_logged_again_after_an_hour_and_peers_are_forgotten() -> None:
    refusals, began = Refusals(), datetime(2031, 5, 17, 12, 0, tzinfo=UTC)
    for second in range(REFUSALS_LOGGED_MAX):
        assert refusals.leaves_receipt("alpha", began + timedelta(seconds=second))
    late = began + REFUSALS_WINDOW
    assert not refusals.leaves_receipt("alpha", late - timedelta(microseconds=1))
    assert [refusals.is_news("alpha") for _ in range(2)] == [True, False]
    assert refusals.leaves_receipt("alpha", late)
    assert not refusals.leaves_receipt("alpha", late)
    assert refusals.is_news("alpha")
    assert refusals.leaves_receipt("alpha", began - timedelta(days=1))  # the clock was set: that silences nobody
    for number in range(PEERS_MAX):
        assert refusals.leaves_receipt(f"peer-{number}", late)
    assert len(refusals._times) == PEERS_MAX
    assert refusals.leaves_receipt("alpha", late)

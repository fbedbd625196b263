"""Who signs what a session did, and keeps it: the relay says when, whoever is wired in does it. Sans-IO.

A session leaves up to three receipts, each signed by the source first and by the destination after it: the offer,
before anything is sent; the transfer, before the destination may let the machine run; the outcome. A receipt is logged
before its signature goes to the peer. Every method may read and write the disk: the shell calls them in a thread. What
they raise ends the session.
"""

from collections.abc import Sequence
from typing import Protocol

from proxy.authority import Question
from proxy.control import Evidence, LogHead
from proxy.report import SessionReport


class Witness(Protocol):
    """Of one session, at one side. Each method raises CryptoError or RelayError for what must end the session."""

    def offer(self) -> Evidence:
        """Source, once it knows its peer: its offer, signed."""

    def accept(self, evidence: Evidence) -> tuple[Evidence, LogHead]:
        """Destination: the source's offer, verified, signed and logged; and what it is to see of our log."""

    def accepted(self, evidence: Evidence, head: LogHead) -> LogHead:
        """Source: the destination's answer, verified and logged; and what that is to see of our log."""

    def met(self, head: LogHead) -> None:
        """Destination: the source's log is what it was, and more."""

    def facts(self) -> bytes:
        """Destination, when all has arrived: what it has to say of the session."""

    def state(self, facts: bytes, digests: Sequence[str]) -> bytes:
        """Source: both sides' facts as one statement, signed; with digests of these streams."""

    def countersign(self, receipt: bytes, digests: Sequence[str]) -> bytes:
        """Destination: that statement has these streams' digests, and agrees with what was seen: signed and logged."""

    def countersigned(self, receipt: bytes) -> None:
        """Source: the destination has signed it: logged."""

    def conclude(self) -> bytes:
        """Source, when all is done: the outcome, signed."""

    def concluded(self, receipt: bytes) -> bytes:
        """Destination: the outcome agrees with its own: signed and logged."""

    def over(self, receipt: bytes) -> None:
        """Source: the destination has signed the outcome: logged."""


class Notary(Protocol):
    """Makes the witnesses of a process."""

    def begin(self, question: Question, report: SessionReport) -> Witness:
        """Of the session that is asked about so; its report is filled in while it runs."""

    def refused(self, report: SessionReport, reason: str) -> None:
        """A session ended before it was one, and nobody else will tell. May use the disk; does not raise."""

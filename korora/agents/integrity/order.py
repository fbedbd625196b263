"""In which order a session's procedures are performed, as one literal table."""

from collections.abc import Mapping
from enum import Enum, unique
from types import MappingProxyType
from typing import Final

from korora.agents.integrity.procedures import Procedure


@unique
class Stage(Enum):
    """How far a session has come."""

    BEGUN = "begun"
    AGAIN = "begun again"  # its id has had a session before: it can be recovered, and offered no more
    OFFERED = "offered"
    ACCEPTED = "accepted"
    IDENTIFIED = "identified"
    TRANSFERRED = "transferred"
    VERIFIED = "verified"
    APPROVED = "approved"
    COMMITTED = "committed"
    RECOVERED = "recovered"
    RESOLVED = "resolved"


ORDER: Final[Mapping[tuple[Stage, Procedure], Stage]] = MappingProxyType(
    {
        (Stage.BEGUN, Procedure.OFFER): Stage.OFFERED,
        (Stage.OFFERED, Procedure.ACCEPT): Stage.ACCEPTED,
        (Stage.ACCEPTED, Procedure.IDENTIFY): Stage.IDENTIFIED,
        (Stage.IDENTIFIED, Procedure.TRANSFER): Stage.TRANSFERRED,
        (Stage.TRANSFERRED, Procedure.TRANSFER): Stage.TRANSFERRED,  # its next channel
        (Stage.TRANSFERRED, Procedure.VERIFY): Stage.VERIFIED,
        (Stage.VERIFIED, Procedure.APPROVE): Stage.APPROVED,
        (Stage.APPROVED, Procedure.APPROVE): Stage.APPROVED,
        (Stage.VERIFIED, Procedure.COMMIT): Stage.COMMITTED,
        (Stage.APPROVED, Procedure.COMMIT): Stage.COMMITTED,
        # A loss may come at any time after ACCEPT.
        (Stage.ACCEPTED, Procedure.RESUME): Stage.ACCEPTED,
        (Stage.IDENTIFIED, Procedure.RESUME): Stage.IDENTIFIED,
        (Stage.TRANSFERRED, Procedure.RESUME): Stage.TRANSFERRED,
        (Stage.VERIFIED, Procedure.RESUME): Stage.VERIFIED,
        (Stage.APPROVED, Procedure.RESUME): Stage.APPROVED,
        (Stage.COMMITTED, Procedure.RESUME): Stage.COMMITTED,
        # What a crash has left was verified before its journal said so.
        (Stage.BEGUN, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.AGAIN, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.VERIFIED, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.APPROVED, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.COMMITTED, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.RECOVERED, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.RECOVERED, Procedure.COMMIT): Stage.COMMITTED,
        (Stage.VERIFIED, Procedure.RESOLVE): Stage.RESOLVED,
        (Stage.APPROVED, Procedure.RESOLVE): Stage.RESOLVED,
        (Stage.COMMITTED, Procedure.RESOLVE): Stage.RESOLVED,
        (Stage.RECOVERED, Procedure.RESOLVE): Stage.RESOLVED,
        (Stage.RESOLVED, Procedure.RECOVER): Stage.RECOVERED,
        (Stage.RESOLVED, Procedure.COMMIT): Stage.COMMITTED,
        # Every session leaves a receipt, however it ends.
        **{(stage, Procedure.RECORD): stage for stage in Stage},
    }
)
"""Where a procedure leads; what is not in it is refused."""


def expected(stage: Stage) -> tuple[Procedure, ...]:
    """What may come next."""
    return tuple(procedure for at, procedure in ORDER if at is stage)

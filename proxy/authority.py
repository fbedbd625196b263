"""Who has a say on a session, and when: the relay asks at fixed points, and whoever is wired in answers. Sans-IO."""

from dataclasses import dataclass
from enum import StrEnum, unique
from typing import Final, Protocol

from proxy.handover.record import Record
from proxy.hypervisors.base import Vm
from proxy.session import Role

ATTESTED: Final = "tpm2"
"""The kind of attestation there is: a quote of the other host's TPM 2.0, judged by its reference."""


@unique
class Point(StrEnum):
    """When it is asked, in a session's order; RESUME whenever a source comes back."""

    OFFER = "offer"  # peer, user and tenant are known; before ACCEPT, and before any byte goes to an egress
    IDENTITY = "identity"  # the machine is known; before the bytes that tell it are passed on
    HANDOVER = "handover"  # all has arrived, and digests agree; while the source's machine still resumes by itself
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Question:
    """May this session go on?

    Attributes:
        point: where it stands.
        role: whose side asks: its machine leaves, or arrives.
        session: its id, in hexadecimal.
        peer: NAME of the other host's certificate.
        pin: SHA-256 of that certificate's SubjectPublicKeyInfo, in hexadecimal.
        egress: what the destination calls where the machine arrives.
        tenant: whose stored pages the session may refer to; empty for nobody's.
        user: the uid that began it here, by a unix socket or `korora xl`; None where that cannot be told.
        vm: the machine; None before IDENTITY, and later where its stream does not tell who it is.
        guarded: whether the relays guard its hand-over.
        attested: what the other host has proved of its platform, its kind first; empty for nothing.
        own: SHA-256 of the certificate that the other host was shown, in hexadecimal; a reload may bring another.
    """

    point: Point
    role: Role
    session: str
    peer: str
    pin: str
    egress: str
    tenant: str
    user: int | None = None
    vm: Vm | None = None
    guarded: bool = False
    attested: str = ""
    own: str = ""


@dataclass(frozen=True, slots=True)
class Act:
    """What somebody does in a session, now that it was allowed: who, which procedure, on what."""

    subject: str
    procedure: str
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ruling:
    """Yes, and why.

    Attributes:
        point: what it answers.
        rule: the name of the rule that decided.
        policy: BLAKE2b-256 of the policy's file, in hexadecimal; empty where there is no policy.
        rate_limit: bytes a second the session may send at most; None for no limit of the rule's own.
        approvers: the uids of those who have approved of it, in the order they did.
        acts: what is done by that.
    """

    point: Point
    rule: str
    policy: str = ""
    rate_limit: int | None = None
    approvers: tuple[int, ...] = ()
    acts: tuple[Act, ...] = ()


class Authority(Protocol):
    """Answers the relay's questions, for every session of a process."""

    async def ask(self, question: Question) -> Ruling:
        """Allow it; may wait, for people to approve.

        Raises:
            PolicyRefused: no; the message names the rule.
        """

    def ended(self, question: Question) -> None:
        """The session that was last asked about so is over, at this side of it."""


class Trustee(Protocol):
    """Is asked about hand-overs whose sessions are over, and about an operator's word; answers at once."""

    def recover(self, record: Record) -> None:
        """This process takes a hand-over up where its journal ends.

        Raises:
            PolicyRefused: it may not.
        """

    def commit(self, record: Record) -> None:
        """What was taken up goes on to where one side may run the machine for good.

        Raises:
            PolicyRefused: it may not.
        """

    def resolve(self, record: Record, uid: int) -> None:
        """A user of this host, whom the kernel knows by that uid, decides which copy is to run.

        Raises:
            PolicyRefused: he may not; the message names the rule.
        """

    def over(self, record: Record) -> None:
        """This process lets it go."""


class Nobody:
    """The trustee where nobody has a say."""

    def recover(self, record: Record) -> None:
        """See ``Trustee``."""

    def commit(self, record: Record) -> None:
        """See ``Trustee``."""

    def resolve(self, record: Record, uid: int) -> None:
        """See ``Trustee``."""

    def over(self, record: Record) -> None:
        """See ``Trustee``."""

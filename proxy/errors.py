"""What ends a session, as one tree; each class has its exit code.

    RelayError                       70
    ├── ConfigurationError            2   something here is set up wrongly; ``remedy`` says what to do
    │   └── JournalError              2   what is kept of hand-overs cannot be read or written
    │       ├── JournalBusy           2   another process is at work on that hand-over
    │       └── JournalDamaged        2   a file of it is not what was written
    ├── PolicyRefused                 3   a policy, here or there, said no
    │   ├── PreflightFailed           3   the two hosts do not fit together, or one lacks what it needs
    │   └── SessionCancelled          3   an operator ended the session on purpose
    ├── PeerRefused                   4   the peer did not let us in (anything before ACCEPT but a policy's no)
    │   └── PeerVanished              4   the connection ended before ACCEPT, and nobody said why
    ├── StreamCorrupt                 5   frames, digests or END disagree
    │   ├── ProtocolViolation         5   an authenticated peer broke the protocol
    │   └── VtpmRefused               5   a vTPM that is not the one meant, or that was here or elsewhere before
    ├── PeerUnreachable               6   no connection to the peer
    ├── PeerLost                      6   a connection to the peer broke or fell silent
    ├── DaemonLost                    6   the local daemon went away, and took a session along
    ├── HypervisorFailed              7   the local hypervisor's connection failed or ended too early
    │   └── VtpmFailed                7   the emulator of a vTPM, or what is kept of it, cannot be worked with
    └── PeerAborted               3–7     the peer ended the session and said why

The errors of crypto and chunking keep their own classes; ``exit_code_of`` knows them too. Everything else is a bug of
ours: 70.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from chunking.errors import StoreUnusable
from crypto.errors import (
    AuthenticationError,
    IdentityError,
    IntegrityError,
    LogUnusable,
    PkiError,
    ReceiptError,
    TpmError,
)

if TYPE_CHECKING:
    from proxy.preflight import Finding  # and with it msgspec, which an error on the command line need not wait for

EXIT_DONE: Final = 0
EXIT_CONFIGURATION: Final = 2
EXIT_POLICY: Final = 3
EXIT_AUTHENTICATION: Final = 4
EXIT_INTEGRITY: Final = 5
EXIT_LOST: Final = 6
EXIT_HYPERVISOR: Final = 7
EXIT_BUG: Final = 70
EXIT_SIGNAL_BASE: Final = 128  # plus the signal's number: 130 and 143

OUTCOMES: Final = {
    EXIT_DONE: "done",
    EXIT_CONFIGURATION: "configuration",
    EXIT_POLICY: "refused",
    EXIT_AUTHENTICATION: "authentication",
    EXIT_INTEGRITY: "integrity",
    EXIT_LOST: "lost",
    EXIT_HYPERVISOR: "hypervisor",
    EXIT_BUG: "internal",
}


class RelayError(Exception):
    """Base of everything raised on purpose in proxy/."""

    exit_code: ClassVar[int] = EXIT_BUG


class ConfigurationError(RelayError):
    """An argument, file, port or program here is wrong; ``remedy`` is a sentence without its full stop."""

    exit_code = EXIT_CONFIGURATION

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class PolicyRefused(RelayError):
    """A policy refused the session; ``rule`` is the name of the rule that did, if it was one."""

    exit_code = EXIT_POLICY

    def __init__(self, message: str, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class PreflightFailed(PolicyRefused):
    """A check before the session says that it cannot go well; ``remedy`` is a sentence without its full stop.

    ``findings`` are all that were not in order.
    """

    def __init__(self, message: str, remedy: str = "", findings: "Sequence[Finding]" = ()) -> None:
        super().__init__(message)
        self.remedy, self.findings = remedy, tuple(findings)


class SessionCancelled(PolicyRefused):
    """An operator ended the session on purpose: an answer like a policy's, and the same at both ends."""


class PeerRefused(RelayError):
    """The peer, or the way to it, failed before ACCEPT."""

    exit_code = EXIT_AUTHENTICATION


class PeerVanished(PeerRefused):
    """The control connection ended before ACCEPT without a word."""


class StreamCorrupt(RelayError):
    """A frame, its running digest or an END disagrees with what was sent."""

    exit_code = EXIT_INTEGRITY


class ProtocolViolation(StreamCorrupt):
    """An authenticated peer sent what the protocol does not allow there."""


class VtpmRefused(StreamCorrupt):
    """What arrives is another vTPM than the one that left, an older state of it, or one that was taken before."""


class PeerUnreachable(RelayError):
    """No TCP connection to the peer could be made."""

    exit_code = EXIT_LOST


class PeerLost(RelayError):
    """The control connection or a lane broke, or the peer's heartbeat stopped."""

    exit_code = EXIT_LOST


class DaemonLost(RelayError):
    """The local daemon, or the worker of it that had the session, went away."""

    exit_code = EXIT_LOST


class HypervisorFailed(RelayError):
    """The local end of a channel could not be opened, broke, or ended before its stream did."""

    exit_code = EXIT_HYPERVISOR


class VtpmFailed(HypervisorFailed):
    """The emulator of a vTPM refuses, or its ledger cannot be kept; ``remedy`` is a sentence without its full stop."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class JournalError(ConfigurationError):
    """The journal of hand-overs cannot be read or written."""


class JournalBusy(JournalError):
    """Another process holds a hand-over's lock."""


class JournalDamaged(JournalError):
    """A journal file has been changed, or a disk has lost part of it."""


class PeerAborted(RelayError):
    """The peer ended the session. ``code`` is the exit code it named, if that concerns us both."""

    _SHARED: ClassVar = frozenset({EXIT_POLICY, EXIT_AUTHENTICATION, EXIT_INTEGRITY, EXIT_LOST, EXIT_HYPERVISOR})

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the peer ended the session: {reason}")
        # A peer's own bug or signal is, seen from here, a peer that went away.
        self.code = code if code in self._SHARED else EXIT_LOST


class Interrupted(RelayError):
    """A signal asked this process to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.code = EXIT_SIGNAL_BASE + signal_number


def exit_code_of(error: BaseException) -> int:
    """The exit code a command ends with when ``error`` ended its session."""
    if isinstance(error, PeerAborted | Interrupted):
        return error.code
    if isinstance(error, RelayError):
        return error.exit_code
    if isinstance(error, AuthenticationError):
        return EXIT_AUTHENTICATION
    if isinstance(error, IntegrityError):
        return EXIT_INTEGRITY
    if isinstance(error, IdentityError | PkiError | TpmError | StoreUnusable | LogUnusable):
        return EXIT_CONFIGURATION
    if isinstance(error, ReceiptError):
        return EXIT_INTEGRITY
    return EXIT_BUG

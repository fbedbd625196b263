"""Who keeps a machine and its virtual TPM together: the relay says when, whoever is wired in does it. Sans-IO.

The vTPM follows its machine and never leads: it is read once the machine is suspended and all of it has arrived, given
before the destination promises anything, and let to answer where the hand-over says that the machine is to run. Every
method may read and write the disk and wait for an emulator: the shell calls them in threads, one at a time, and those
of the hand-over's end more than once, after a crash too.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from proxy.streams.vtpm import CarriedVtpm


class Carrier(Protocol):
    """Of one session, at one side. Each method raises VtpmFailed or VtpmRefused for what it cannot or must not do."""

    @property
    def moving(self) -> tuple[int, str] | None:
        """The epoch that was given or taken in this session, and SHA-256 of the state in hex; None before that."""

    # ---- source

    def has(self, uuid: str) -> bool:
        """Whether the machine has a vTPM that has to move with it."""

    def depart(self, uuid: str, recipient: bytes) -> bytes:
        """The vTPM of a suspended machine, wrapped for the destination's key; empty if it has none.

        Asked again, it is what was given before.
        """

    def check(self, uuid: str, proof: bytes) -> None:
        """The destination's proof is of that very vTPM."""

    def part(self, uuid: str) -> None:
        """The hypervisor has given the machine up: its vTPM answers nobody from now on. Nothing if none leaves."""

    def stay(self, uuid: str) -> None:
        """The machine is to run here: its vTPM answers, as it was. Nothing if it never left."""

    def given(self, uuid: str) -> None:
        """The machine runs at the destination: nothing is left here of its vTPM."""

    # ---- destination

    def recipient(self) -> bytes:
        """The key, made for this session, that a vTPM may be wrapped for."""

    def arrive(self, uuid: str, wrapped: bytes) -> bytes:
        """It is whole, the right one, and kept: the proof of that. It answers nobody yet."""

    def release(self, uuid: str) -> None:
        """The machine is about to run here: its vTPM answers. Nothing if none has arrived."""

    def wipe(self, uuid: str) -> None:
        """The machine never ran here: nothing is left of its vTPM. Nothing if none has arrived."""


class Verifier(Carrier, Protocol):
    """Of a vTPM that the hypervisor's stream carries: nothing is moved, and whoever got it shows that it is the same.

    ``depart`` and ``arrive`` are of what the stream had: what is given is a challenge, the proof the same as ever.
    """

    def saw(self, carried: "CarriedVtpm") -> None:
        """What this side's stream had."""


class Carriers(Protocol):
    """Makes the carriers of a process."""

    def carries(self, kind: str) -> bool:
        """Whether vTPMs of machines of such a hypervisor are seen to here."""

    def recipient(self, session: str, peer: str) -> bytes:
        """The key of a session that is to come, for this host's TPM to vouch for; its carrier has it, too."""

    def of(self, session: str, peer: str) -> Carrier:
        """Of that session, by its id in hex, with the host of that name; after a restart, too."""

    def verifier(self, session: str, peer: str) -> Verifier:
        """The same where the stream carries the vTPM."""

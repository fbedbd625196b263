"""Two hosts whose QEMUs carry a vTPM in their streams: an emulator at the source, and what the stream has of it."""

import struct
from dataclasses import dataclass
from pathlib import Path

from korora.agents.vtpm import ctrl
from korora.agents.vtpm.carried import Verifier
from korora.agents.vtpm.carrier import Agent
from korora.agents.vtpm.ctrl import Blob, Command, StateFlag
from korora.agents.vtpm.epochs import Ledger
from korora.agents.vtpm.follower import Beat
from korora.agents.vtpm.rehearsal import Keys
from proxy.streams.vtpm import CarriedPart, CarriedVtpm
from tests.korora.agents.vtpm.emulators import Emulator, keys
from tests.korora.agents.vtpm.hosts import SESSION, UUID

NONE = CarriedPart(0, b"")


def stream_of(emulator: Emulator) -> CarriedVtpm:
    """What QEMU asks an emulator for, and puts into its stream (tpm_emulator_get_state_blob)."""
    parts = []
    for blob in (Blob.PERMANENT, Blob.VOLATILE):
        asked = struct.pack(">IIII", Command.GET_STATEBLOB, StateFlag.DECRYPTED, blob, 0)
        told = ctrl.state_of(blob, emulator.swtpm._ask(Command.GET_STATEBLOB, asked))
        parts.append(CarriedPart(told.flags, told.data))
    return CarriedVtpm(*parts, NONE)


@dataclass
class CarryingHost:
    """One host: its folder, the migration key that its relay knows, if any."""

    name: str
    folder: Path
    key: Path | None

    @property
    def agent(self) -> Agent:
        """As after a restart of its relay."""
        return self.acting()

    def acting(self, beat: Beat = lambda step: None) -> Agent:
        """The same, told of each step."""
        return Agent(None, self.folder, beat, verifying=Keys() if self.key is None else keys(self.key))

    def verifier(self, session: str = SESSION, beat: Beat = lambda step: None) -> Verifier:
        """Of a session with the other one."""
        return self.acting(beat).verifier(session, "beta" if self.name == "alpha" else "alpha")

    @property
    def ledger(self) -> Ledger:
        """Of the machine's vTPM."""
        return self.agent.ledgers.read(UUID)

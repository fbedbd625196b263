"""Two hosts with an emulator each for one machine, and the agent of each."""

from dataclasses import dataclass
from pathlib import Path

from korora.agents.vtpm.carrier import Agent, Beat, Carrier, Places
from korora.agents.vtpm.epochs import Ledger
from proxy.errors import VtpmFailed
from tests.korora.agents.vtpm.emulators import Emulator, keys

UUID = "0f9c2f1e-0000-4000-8000-00000000abcd"
SESSION = "ab" * 16


@dataclass
class Host:
    """One host: its folder, its emulator, its relay's state."""

    name: str
    folder: Path
    key: Path
    emulator: Emulator
    uuid: str = UUID
    state: Path | None = None
    """Of its relay, where that is not in its folder."""

    @classmethod
    def make(cls, name: str, folder: Path, key: Path, uuid: str = UUID) -> "Host":
        """With an emulator that is not initialised."""
        return cls(name, folder, key, Emulator(folder / uuid, key), uuid)

    def restart(self) -> None:
        """As its service manager would, where the emulator has ended."""
        if not self.emulator.swtpm.listens:
            self.emulator.process.wait(5)
            self.emulator.control.unlink(missing_ok=True)
            self.emulator = Emulator(self.folder / self.uuid, self.key)

    def agent(self, beat: Beat = lambda step: None) -> Agent:
        """A new one, as after a restart of its relay."""
        places = Places(f"{self.folder}/{{uuid}}/c", f"{self.folder}/{{uuid}}/state", keys(self.key))
        return Agent(places, self.state or self.folder / "relay", beat)

    def carrier(self, session: str = SESSION, beat: Beat = lambda step: None) -> Carrier:
        """Of a session with the other one."""
        return self.agent(beat).of(session, "beta" if self.name == "alpha" else "alpha")

    @property
    def ledger(self) -> Ledger:
        """Of the machine's vTPM."""
        return self.agent().ledgers.read(self.uuid)

    @property
    def usable(self) -> bool:
        """Whether a vTPM answers here that has been started up."""
        try:
            if not self.emulator.swtpm.listens or not self.emulator.swtpm.running():
                return False
        except VtpmFailed:
            if self.emulator.swtpm.listens:
                raise
            return False  # it ended in between
        with self.emulator.guest() as guest:
            return guest.code() == 0

    def traces(self) -> list[str]:
        """What is left of a vTPM's state on this host's disk."""
        kept = self.agent().ledgers.kept(self.uuid)
        return [*self.emulator.files(), *([kept.name] if kept.exists() else [])]

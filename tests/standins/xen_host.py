"""A host whose xl is the stand-in beside this file: made, filled, broken and looked at by tests."""

import fcntl
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.proxy.streams import made
from tests.standins.xl import note_runs, running

PROGRAM = Path(__file__).with_name("xl.py")
UUID = "0f9c2f1e-0000-4000-8000-00000000abcd"
PAGES = 64
DOM0_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class Domain:
    """A domain, as one look at its host found it."""

    id: int
    name: str
    uuid: str
    paused: bool
    shutdown: str | None
    monitor: bool
    ran_seconds: float

    @property
    def state(self) -> str:
        """running, paused, or why it has shut down: suspend, reboot, poweroff, crash."""
        return self.shutdown or ("paused" if self.paused else "running")


def guest_stream(name: str, uuid: str = UUID, pages: int = PAGES) -> bytes:
    """All that xl sends of a small domain before GO."""
    batches = [made.page_data([(pfn, 0) for pfn in range(at, min(at + 512, pages))]) for at in range(0, pages, 512)]
    image = made.libxc(made.record(0x10), *batches, batches[0])
    return made.xl_header(made.config(name, uuid)) + made.libxl(image)


class XenHost:
    """A host's folder, and the program xl that belongs to it.

    Args:
        folder: an empty one of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.program = self.bin / "xl"
        self.bin.mkdir(parents=True)
        (folder / "streams").mkdir()
        (folder / "faults.json").write_text("{}")
        (folder / "log").touch()
        (folder / "state.json").write_text(json.dumps({"next_id": 1, "domains": []}))
        with self._state() as state:
            state["domains"].append(self._new(0, "Domain-0", DOM0_UUID))
        # One that bears its host: what Kororā starts gets no environment of the test's choice.
        self.program.write_text(
            f"#!/bin/sh\nexport XL_STANDIN_HOST={shlex.quote(str(folder))}\n"
            f'exec {shlex.quote(sys.executable)} -SE {shlex.quote(str(PROGRAM))} "$@"\n'
        )
        self.program.chmod(0o755)

    @property
    def env(self) -> dict[str, str]:
        """An environment in which ``xl`` is this host's."""
        return {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"}

    # ---- domains

    @contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = json.loads((self.folder / "state.json").read_text())
            before = running(state)
            yield state
            note_runs(self.folder, before, running(state))
            (self.folder / "state.json.new").write_text(json.dumps(state))
            (self.folder / "state.json.new").replace(self.folder / "state.json")

    @staticmethod
    def _new(number: int, name: str, uuid: str) -> dict[str, Any]:
        return {
            "id": number,
            "name": name,
            "uuid": uuid,
            "memory": 96,
            "vcpus": 1,
            "paused": False,
            "shutdown": None,
            "ran": 0.0,
            "since": time.time(),
            "monitor": True,
            "config": json.loads(made.config(name, uuid)[:-1]),
        }

    def create(
        self,
        name: str = "g1",
        uuid: str = UUID,
        *,
        paused: bool = False,
        shutdown: str | None = None,
        pages: int = PAGES,
        number: int | None = None,
    ) -> int:
        """A domain in any state, with the stream that it is sent away as; its id."""
        with self._state() as state:
            number = int(state["next_id"]) if number is None else number
            state["next_id"] = number + 1
            domain = self._new(number, name, uuid)
            domain.update(paused=paused, shutdown=shutdown, monitor=shutdown is None)
            state["domains"].append(domain)
        base = name.removesuffix("--incoming").removesuffix("--migratedaway")
        (self.folder / "streams" / str(number)).write_bytes(guest_stream(base, uuid, pages))
        return number

    def alter(self, number: int, **changes: Any) -> None:
        """Change what state.json says of a domain."""
        with self._state() as state:
            next(domain for domain in state["domains"] if domain["id"] == number).update(changes)

    def power_off(self, name: str) -> None:
        """Its guest shuts down, and its monitor destroys it."""
        with self._state() as state:
            state["domains"] = [domain for domain in state["domains"] if domain["name"] != name]

    def reboot(self, name: str) -> int:
        """Its guest reboots: its monitor destroys it and makes another one of its name and UUID, whose id this is."""
        domain = self.domains[name]
        self.power_off(name)
        return self.create(name, domain.uuid)

    def lose_all(self) -> None:
        """The host has crashed and come back: its domains are gone."""
        with self._state() as state:
            state["domains"] = state["domains"][:1]

    @property
    def domains(self) -> dict[str, Domain]:
        """All but dom0, by name."""
        with self._state() as state:
            listed = [
                Domain(
                    domain["id"],
                    domain["name"],
                    domain["uuid"],
                    domain["paused"],
                    domain["shutdown"],
                    domain["monitor"],
                    domain["ran"]
                    + (0 if domain["paused"] or domain["shutdown"] is not None else time.time() - domain["since"]),
                )
                for domain in state["domains"][1:]
            ]
        return {domain.name: domain for domain in listed}

    @property
    def states(self) -> dict[str, str]:
        """Name to state of all but dom0: what a test compares with."""
        return {name: domain.state for name, domain in self.domains.items()}

    @property
    def runs(self) -> list[tuple[int, str, str, int]]:
        """When which domain has begun and ceased to run: nanoseconds of CLOCK_MONOTONIC, UUID, id, and +1 or -1."""
        lines = (self.folder / "runs").read_text().splitlines()
        fields = (line.split() for line in lines)
        return [(int(at), uuid, number, 1 if sign == "+" else -1) for at, uuid, number, sign in fields]

    def running(self) -> int:
        """How many run."""
        return sum(state == "running" for state in self.states.values())

    def stream_of(self, name: str) -> bytes:
        """What a domain was received as, or is sent away as."""
        return (self.folder / "streams" / str(self.domains[name].id)).read_bytes()

    # ---- faults and log

    def fault(self, step: str, action: str, times: int = 1) -> None:
        """Let a step go wrong; see xl.py."""
        self._faults(lambda faults: faults.update({step: (action, times)}))

    def heal(self, step: str) -> None:
        """Take a fault away; who is held goes on."""
        self._faults(lambda faults: faults.pop(step, None))

    def _faults(self, change: Any) -> None:
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            faults = json.loads((self.folder / "faults.json").read_text())
            change(faults)
            (self.folder / "faults.new").write_text(json.dumps(faults))
            (self.folder / "faults.new").replace(self.folder / "faults.json")

    def end(self) -> None:
        """Kill whatever xl still runs here; those are held, hang, or wait for a channel that nobody closes."""
        for pid in self.processes:
            with suppress(OSError):
                if str(self.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    @property
    def log(self) -> list[str]:
        """What its xl was asked and did, without process ids."""
        return [line.partition(" ")[2] for line in (self.folder / "log").read_text().splitlines()]

    def reached(self, step: str) -> bool:
        """Whether any xl has come to a step."""
        return f"step {step}" in self.log

    def receiver(self, name: str) -> int:
        """The process id of the last migrate-receive that has made a copy of a domain."""
        lines = [line for line in (self.folder / "log").read_text().splitlines() if line.endswith(f" {name}--incoming")]
        return int(next(line for line in reversed(lines) if " created " in line).partition(" ")[0])

    @property
    def processes(self) -> set[int]:
        """Ids of all xl that have run here."""
        return {int(line.partition(" ")[0]) for line in (self.folder / "log").read_text().splitlines()}

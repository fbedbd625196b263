"""Guests with a vTPM each, between two hosts that attest: real daemons, swtpm for every TPM; xl alone is a stand-in.

Each daemon is killed while the guests are at their moments, and started again. Afterwards each vTPM is where its
machine runs, and there alone: usable, with its NV, its PCRs and what is sealed to them; at the other host nothing is
left of it, and no sooner did two answer. Then every guest migrates again, with all of that.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.tpms import soft_tpm
from korora.agents.vtpm.handover import Holding
from tests.attacks.processes import KORORA
from tests.attacks.wire import Way
from tests.korora.agents.vtpm.conftest import tmp_path
from tests.korora.agents.vtpm.emulators import key, known_by, lived_in
from tests.korora.agents.vtpm.hosts import Host
from tests.korora.handover.moments import MOMENTS, Moment
from tests.korora.handover.scene import Crossing, Scene, Side, scene
from tests.korora.handover.test_cuts import SETTLED_SECONDS

__all__ = ["key", "tmp_path"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ASKED = Moment("vtpm asked for", ("open", "open"), destination="receive:ready", stall=Way.BACKWARD, facts=True)
"""The destination's question for it passes, and nothing else of what that says: it has it, and cannot prove it."""
ALL = (ASKED, *(moment for moment in MOMENTS if not moment.facts))  # the others' long word is not that question
CHOSEN = ("vtpm asked for", "go passed", "committed there", "done there")
COMMAND_SECONDS_MAX = 60.0


class Vtpms:
    """The hosts' own TPMs, and at each host an emulator for each guest."""

    def __init__(self, folder: Path, key: Path, stack: ExitStack) -> None:
        self.folder, self.key, self._stack = folder, key, stack
        self.of: dict[tuple[str, str], Host] = {}
        """By host and guest."""
        self.before: dict[str, object] = {}
        self.sealed: dict[str, tuple[bytes, bytes]] = {}

    def prepare(self, both: Scene) -> None:
        """Set both hosts up, and let the guests live in their vTPMs."""
        for side in (both.alpha, both.beta):
            self._attest(side)
            told = {
                "control": f"{self.folder}/v{side.name}/{{uuid}}/c",
                "state": f"{self.folder}/v{side.name}/{{uuid}}/state",
                "migration_key": f"file={self.key},format=binary,mode=aes-256-cbc",
            }
            side.daemon.state.mkdir(mode=0o700)
            lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in told.items())
            (side.daemon.state / "vtpm.toml").write_text(lines)
            for one in both.crossings:
                host = Host.make(side.name, self.folder / f"v{side.name}", self.key, one.uuid)
                host.state = side.daemon.state
                self.of[side.name, one.guest] = host
                self._stack.callback(lambda host=host: host.emulator.close())
        for one in both.crossings:
            emulator = self.of["alpha", one.guest].emulator
            lived_in(emulator)
            self.sealed[one.guest] = emulator.sealed
            self.before[one.guest] = known_by(emulator, emulator.sealed)

    def _attest(self, side: Side) -> None:
        """It has a TPM, and demands what the other one was when that was enrolled."""
        tpm = self._stack.enter_context(soft_tpm(self.folder / f"t{side.name}"))
        other = "beta" if side.name == "alpha" else "alpha"
        command = [*KORORA, "attest", "enrol", side.name, "--tpm", tpm.tcti]
        command += ["--attestation", str(self.folder / f"{other}-knows")]
        subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_SECONDS_MAX)
        knows = self.folder / f"{side.name}-knows"
        side.daemon.settings = f'tpm = "{tpm.tcti}"\nattestation = "{knows}"\n{side.daemon.settings}'

    def usable(self, one: Crossing) -> list[str]:
        """The hosts at which its vTPM answers."""
        return [name for (name, guest), host in self.of.items() if guest == one.guest and host.usable]

    def check(self, both: Scene) -> None:
        """Each is where its machine is, and nowhere else."""
        for one in both.crossings:
            at = both.where(one.guest)
            (other,) = {"alpha", "beta"} - {at}
            case = (one.guest, one.moment.name, at, both.story())
            assert self.usable(one) == [at], case
            here, there = self.of[at, one.guest], self.of[other, one.guest]
            assert known_by(here.emulator, self.sealed[one.guest]) == self.before[one.guest], case
            assert there.traces() == [], case
            assert here.ledger.holding in (Holding.HERE, Holding.UNKNOWN), case
            assert there.ledger.holding in (Holding.GONE, Holding.WIPED, Holding.UNKNOWN), case

    def tend(self) -> None:
        """What has ended is started again, as by a service manager."""
        for host in self.of.values():
            host.restart()


@pytest.fixture
def vtpms(tmp_path: Path, key: Path) -> Iterator[Vtpms]:
    with ExitStack() as stack:
        yield Vtpms(tmp_path, key, stack)


def cases(moments: tuple[Moment, ...]) -> list[tuple[Moment, str]]:
    return [(moment, "") for moment in moments]


async def end_of(both: Scene, vtpms: Vtpms) -> None:
    """Whoever was held goes on; everything settles; and then all migrate again."""
    both.go_on()
    await both.until(both.settled, "it never settled", SETTLED_SECONDS)
    both.check_never_two()
    vtpms.check(both)
    vtpms.tend()
    for one in both.crossings:
        one.origin, one.goal = (both.alpha, both.beta) if both.where(one.guest) == "alpha" else (both.beta, both.alpha)
        await both.move(one)
    await both.until(both.settled, "a retry is not settled")
    assert [both.where(one.guest) for one in both.crossings] == [one.goal.name for one in both.crossings]
    vtpms.check(both)


@pytest.mark.parametrize("moments", [CHOSEN, pytest.param((), marks=pytest.mark.slow)], ids=["chosen", "all"])
@pytest.mark.parametrize("killed", ["alpha", "beta", pytest.param("both", marks=pytest.mark.slow)])
async def test_a_daemon_is_killed_and_each_vtpm_is_with_its_machine(
    tmp_path: Path, vtpms: Vtpms, killed: str, moments: tuple[str, ...]
) -> None:
    chosen = tuple(moment for moment in ALL if not moments or moment.name in moments)
    async with scene(tmp_path, cases(chosen), vtpms.prepare) as both:
        for one in both.crossings:
            assert len(vtpms.usable(one)) < 2
            if one.moment is ASKED:  # it is at both, and answers at the source alone
                arriving = vtpms.of["beta", one.guest]
                await both.until(lambda host=arriving: host.ledger.holding is Holding.ARRIVING, "it never arrived")
                assert vtpms.of["alpha", one.guest].ledger.holding is Holding.LEAVING
                assert vtpms.usable(one) == ["alpha"]
        sides = [side for side in (both.alpha, both.beta) if killed in (side.name, "both")]
        for side in sides:
            side.kill()
        for one in both.crossings:
            assert len(vtpms.usable(one)) < 2
        both.mend()
        for side in sides:
            side.start()
        await end_of(both, vtpms)
        for side in (both.alpha, both.beta):
            done = [report for report in side.daemon.reports() if not report["error"]]
            assert len(done) >= len(both.crossings)
            for report in done:
                assert report["attested"].startswith("tpm2 ak 000b")
                assert report["vtpm_epoch"] >= 1

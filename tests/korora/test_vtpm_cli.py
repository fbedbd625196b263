"""`korora vtpm`, and the file that turns the agent on."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.tpms import soft_tpm
from korora.agents.vtpm.carrier import Agent
from korora.agents.vtpm.epochs import Entry
from korora.agents.vtpm.host import open_agent
from korora.agents.vtpm.ledger import Ledgers, now
from korora.agents.vtpm.rehearsal import Keys
from korora.cli.main import command_line
from korora.handovers import open_handovers
from proxy.errors import ConfigurationError, VtpmFailed, VtpmRefused
from tests.korora.agents.vtpm.emulators import emulators, key, keys, known_by, lived_in
from tests.korora.agents.vtpm.hosts import SESSION, UUID, Host
from tests.standins.xen_host import XenHost

__all__ = ["key"]


def write(folder: Path, **changes: str) -> None:
    """A vtpm.toml."""
    told = {
        "control": "/run/vtpm/{uuid}/c",
        "state": "/var/lib/vtpm/{uuid}",
        "migration_key": "file=/etc/korora/vtpm.key,format=hex,mode=aes-256-cbc",
    } | changes
    folder.mkdir(exist_ok=True)
    (folder / "vtpm.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in told.items()))


def run(*words: str) -> str:
    ended = CliRunner().invoke(command_line(words), list(words))
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def test_without_the_file_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from korora.handovers import open_handovers\n"
        f"found = open_handovers(Path({str(tmp_path)!r}))\n"
        "print(found.carries('xl'), any('vtpm' in name for name in sys.modules if name.startswith('korora.agents')))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "False False\n"


def test_with_the_file_xls_machines_are_accompanied(tmp_path: Path) -> None:
    write(tmp_path, state_key="file=/etc/korora/state.key,mode=aes-256-cbc")
    handovers = open_handovers(tmp_path)
    assert handovers.carries("xl")
    assert not handovers.carries("qmp")  # QEMU has its vTPM in the stream, and nobody said that it is to be verified
    agent = open_agent(tmp_path)
    assert agent.places is not None
    assert agent.places.keys == Keys(
        "file=/etc/korora/vtpm.key,format=hex,mode=aes-256-cbc", "file=/etc/korora/state.key,mode=aes-256-cbc"
    )


def test_what_qemus_carry_is_verified_where_the_file_says_so(tmp_path: Path) -> None:
    write(tmp_path, carried="verify")
    assert [open_handovers(tmp_path).carries(kind) for kind in ("xl", "qmp")] == [True, True]
    for more, keys_then in (
        ("", Keys()),
        ('migration_key = "file=/k,mode=aes-256-cbc"', Keys("file=/k,mode=aes-256-cbc")),
    ):
        (tmp_path / "vtpm.toml").write_text(f'carried = "verify"\n{more}')
        handovers = open_handovers(tmp_path)
        assert [handovers.carries(kind) for kind in ("xl", "qmp")] == [False, True]
        assert open_agent(tmp_path).verifying == keys_then
        with pytest.raises(VtpmFailed, match="moves no vTPMs"):
            open_agent(tmp_path).of(SESSION, "beta")


@pytest.mark.parametrize("text", ["", 'carried = "off"', 'control = "/{uuid}/c"\ncarried = "verify"'])
def test_emulators_are_named_as_a_whole_or_not_at_all(tmp_path: Path, text: str) -> None:
    (tmp_path / "vtpm.toml").write_text(text)
    with pytest.raises(ConfigurationError, match="control, state and migration_key belong together"):
        open_handovers(tmp_path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"control": "/run/c"}, "control: expected an absolute path with {uuid} in it"),
        ({"control": "run/{uuid}"}, "control: expected an absolute path"),
        ({"control": "/" + "x" * 80 + "/{uuid}"}, "control: a path of more than 107 bytes"),
        ({"migration_key": "file=/k"}, "migration_key: expected what swtpm is given"),
        ({"migration_key": "file=/k,mode=aes-cbc"}, "migration_key: expected what swtpm is given"),
        ({"migration_key": "file=/k,remove=true,mode=aes-256-cbc"}, "migration_key: expected what swtpm is given"),
        ({"keys": "x"}, "keys: no such key"),
        ({"carried": "maybe"}, "carried: "),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, changes: dict[str, str], what: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=r"vtpm\.toml") as refused:
        open_handovers(tmp_path)
    assert what in str(refused.value)


@pytest.fixture
def hosts(key: Path) -> Iterator[tuple[Host, Host]]:
    """Two that are set up, the first one's vTPM has been lived in; their sockets' paths have to be short."""
    with tempfile.TemporaryDirectory(prefix="korora-") as name, emulators() as held:
        both = Host.make("alpha", Path(name, "a"), key), Host.make("beta", Path(name, "b"), key)
        held += [host.emulator for host in both]
        lived_in(both[0].emulator)
        for host in both:
            write(
                host.folder / "relay",
                control=f"{host.folder}/{{uuid}}/c",
                state=f"{host.folder}/{{uuid}}/state",
                migration_key=keys(key).migration.replace(",mode=aes-256-cbc,format=binary", "")
                + ",format=binary,mode=aes-256-cbc",
            )
        yield both
        held += [host.emulator for host in both]


def states(hosts: tuple[Host, Host]) -> tuple[str, str]:
    """Their relays' state directories."""
    here, there = (str(host.folder / "relay") for host in hosts)
    return here, there


def test_status_and_epochs(hosts: tuple[Host, Host]) -> None:
    here, there = states(hosts)
    assert run("vtpm", "status", "--state", here) == "no vTPM has come or gone yet\n"
    agents = [open_agent(Path(one)) for one in (here, there)]
    assert all(isinstance(agent, Agent) for agent in agents)
    leaving, arriving = agents[0].of(SESSION, "beta"), agents[1].of(SESSION, "alpha")
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    (told,) = json.loads(run("vtpm", "status", "--state", there, "--json"))["vtpms"]
    assert (told["uuid"], told["holding"], told["emulator"], told["epoch"]) == (UUID, "arriving", "idle", 1)
    arriving.release(UUID)
    leaving.given(UUID)
    (told,) = json.loads(run("vtpm", "status", UUID, "--state", there, "--json"))["vtpms"]
    assert (told["holding"], told["emulator"], told["peer"]) == ("here", "running", "alpha")
    line = run("vtpm", "status", "--state", here).splitlines()[1].split()
    assert line[:4] == [UUID, "1", "gone", "beta"]
    assert "absent" in line
    entries = json.loads(run("vtpm", "epochs", UUID, "--state", here, "--json"))["entries"]
    assert [entry["holding"] for entry in entries] == ["leaving", "gone"]
    assert [text.split()[3] for text in run("vtpm", "epochs", UUID, "--state", there).splitlines()] == [
        "arriving",
        "here",
    ]


def refused(*words: str) -> BaseException:
    """What a command ends by."""
    ended = CliRunner().invoke(command_line(words), list(words))
    assert ended.exception is not None, ended.output
    return ended.exception


def test_one_moves_in_a_file(
    hosts: tuple[Host, Host],
    identity_alpha: Path,
    identity_beta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The four commands, and why not: its machine is there, nobody can tell, nobody is certain."""
    here, there = (
        ("--state", state, "--identity", str(identity))
        for state, identity in zip(states(hosts), (identity_alpha, identity_beta), strict=True)
    )
    request, parcel, answer, known = (str(tmp_path / name) for name in ("request", "parcel", "answer", "known"))
    with soft_tpm(tmp_path / "tpm") as swtpm:
        run("attest", "enrol", "beta", "--tpm", swtpm.tcti, "--attestation", known, "--pcrs", "sha256:4")
        shows = ("--tpm", swtpm.tcti, "--pcrs", "sha256:4")
        run("vtpm", "request", UUID, "--from", "alpha", "--out", request, *shows, *there)
    before = known_by(hosts[0].emulator, hosts[0].emulator.sealed)
    give = (
        "vtpm",
        "export",
        UUID,
        "--request",
        request,
        "--to",
        "beta",
        "--attestation",
        known,
        "--out",
        parcel,
        *here,
    )
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", "/nonexistent")
    unknown = refused(*give)
    assert isinstance(unknown, VtpmFailed)
    assert "--certain" in unknown.remedy
    xen = XenHost(tmp_path / "xen")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("PATH", xen.env["PATH"])
    for shutdown in (None, "suspend"):
        xen.create("g1", UUID, shutdown=shutdown)
        for words in (give, (*give, "--certain")):
            present = refused(*words)
            assert isinstance(present, VtpmFailed)
            assert "is here" in str(present)
        xen.power_off("g1")
    assert hosts[0].usable
    run(*give)
    assert Path(parcel).stat().st_mode & 0o777 == 0o600
    first = Path(parcel).read_bytes()
    run(*give)
    assert Path(parcel).read_bytes() == first
    uncertain = refused("vtpm", "settle", "--keep", UUID, *here)
    assert isinstance(uncertain, ConfigurationError)
    assert "there would be two" in str(uncertain)
    run("vtpm", "import", parcel, "--out", answer, *there)
    run("vtpm", "settle", answer, *here)
    assert known_by(hosts[1].emulator, hosts[0].emulator.sealed) == before
    (told,) = json.loads(run("vtpm", "status", UUID, "--state", there[1], "--json"))["vtpms"]
    assert (told["holding"], told["epoch"], told["peer"]) == ("here", 1, "alpha")
    late = refused("vtpm", "withdraw", "--request", request, "--out", answer, *there)
    assert isinstance(late, VtpmRefused)
    assert isinstance(refused("vtpm", "import", str(tmp_path / "nothing"), "--out", answer, *there), ConfigurationError)


def test_of_a_qemus_machine_too_and_what_is_forgotten_is_kept(tmp_path: Path) -> None:
    (tmp_path / "vtpm.toml").write_text('carried = "verify"')
    with Ledgers(tmp_path).locked(UUID) as file:
        file.write(Entry("here", 3, now(), SESSION, "alpha"))
    (told,) = json.loads(run("vtpm", "status", "--state", str(tmp_path), "--json"))["vtpms"]
    assert (told["holding"], told["epoch"], told["emulator"]) == ("here", 3, "qemu's")
    said = run("vtpm", "forget", UUID, "--state", str(tmp_path))
    (kept,) = tmp_path.glob("vtpm/*.forgotten-*")
    assert said == f"kept as {kept}; do the same on its other hosts\n"
    assert b'"epoch":3' in kept.read_bytes()
    assert json.loads(run("vtpm", "status", "--state", str(tmp_path), "--json"))["vtpms"] == []
    assert run("vtpm", "forget", UUID, "--state", str(tmp_path)) == "this host has had no part in it\n"


def test_what_is_no_uuid_names_no_file(tmp_path: Path) -> None:
    ended = CliRunner().invoke(command_line(["vtpm"]), ["vtpm", "epochs", "../journal", "--state", str(tmp_path)])
    assert isinstance(ended.exception, ConfigurationError)
    assert "is no UUID" in str(ended.exception)

"""The units are valid, hardened, and start what the examples beside them describe."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROGRAM = "/opt/korora/bin/korora"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DAEMON = DEPLOY / "systemd" / "korora.service"
TEMPLATES = [unit for unit in UNITS if unit != DAEMON]
EXAMPLES = {
    "korora-receive@.service": "receive-qemu.conf",
    "korora-send@.service": "send-host-b.conf",
    "korora.service": "korora.toml",
}
EXPOSURE_MAX = 20  # of 100, as systemd-analyze counts; what the network needs and a callback in pyOpenSSL make 14

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
each_unit = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
each_template = pytest.mark.parametrize("unit", TEMPLATES, ids=lambda unit: unit.name)


def settings(unit: Path) -> dict[str, str]:
    """The [Service] section; a setting that is repeated keeps its last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit, encoding="utf-8")
    return dict(parser["Service"])


def environment(unit: Path) -> dict[str, str]:
    """The variables of the unit's example (the syntax that systemd and a shell share)."""
    lines = (DEPLOY / "examples" / EXAMPLES[unit.name]).read_text(encoding="utf-8").splitlines()
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line, comments=True))


def command(unit: Path, variables: dict[str, str], state: Path) -> list[str]:
    """ExecStart as systemd expands it: `${NAME}` is one word, `$NAME` as many as it holds (systemd.service(5)).

    `%S` is the root of state directories (systemd.unit(5)).
    """
    words: list[str] = []
    for word in settings(unit)["ExecStart"].split():
        if match := re.fullmatch(r"\$\{(\w+)\}", word):
            words.append(variables[match[1]])
        elif match := re.fullmatch(r"\$(\w+)", word):
            words += variables[match[1]].split()
        else:
            words.append(word.replace("%S", str(state)))
    return words


def runnable(unit: Path, folder: Path) -> Path:
    """A copy that names a program which exists, as `systemd-analyze verify` demands."""
    copy = folder / unit.name
    copy.write_text(unit.read_text(encoding="utf-8").replace(PROGRAM, shutil.which("true") or "/bin/true"))
    return copy


def test_there_is_an_example_for_each_unit_and_no_other() -> None:
    assert {unit.name for unit in UNITS} == set(EXAMPLES)
    assert {path.name for path in (DEPLOY / "examples").iterdir()} == set(EXAMPLES.values())


@needs_systemd
@each_unit
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", runnable(unit, tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # Where systemd does not run it may complain of that, and of other units; only what names ours counts.
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr


@needs_systemd
@each_unit
def test_the_exposure_is_small(unit: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", runnable(unit, tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd cannot judge a file")
    assert done.returncode == 0, done.stdout + done.stderr


@each_unit
def test_the_hardening_that_matters_most(unit: Path) -> None:
    have = settings(unit)
    for name, value in {
        "User": "korora",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "LimitCORE": "0",
        "UMask": "0077",
        "KillMode": "mixed",
        "SuccessExitStatus": "143",
        "RestartPreventExitStatus": "2",
    }.items():
        assert have[name] == value, name
    assert {"MemoryMax", "TasksMax", "RestrictAddressFamilies", "SystemCallFilter"} <= set(have)


@each_template
def test_the_example_sets_what_the_unit_reads(unit: Path) -> None:
    read = set(re.findall(r"\$\{?(\w+)", settings(unit)["ExecStart"]))
    assert read == set(environment(unit))
    instance = EXAMPLES[unit.name].partition("-")[2].removesuffix(".conf")
    assert settings(unit)["EnvironmentFile"].replace("%i", instance) == f"/etc/korora/{EXAMPLES[unit.name]}"


@each_template
def test_the_command_of_the_example_starts(unit: Path, identity_beta: Path, tmp_path: Path) -> None:
    variables = environment(unit)
    options = variables["KORORA_OPTIONS"].replace("/var/lib/korora", str(tmp_path))
    # The example's addresses, but for ports that may be taken here.
    variables |= {"KORORA_IDENTITY": str(identity_beta), "KORORA_OPTIONS": options, "KORORA_LISTEN": ":0"}
    variables["KORORA_FROM"] = re.sub(r"\d+$", "0", variables.get("KORORA_FROM", ""))
    program, *words = command(unit, variables, tmp_path)
    assert program == PROGRAM
    with subprocess.Popen(
        [sys.executable, "-m", "korora", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            _, log = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == int(settings(unit)["SuccessExitStatus"])
    assert log.startswith("{"), "the journal wants JSON"


def test_the_daemon_of_the_example_starts_and_drains(
    ca_dir: Path, identity_alpha: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del ca_dir
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    text = (DEPLOY / "examples" / EXAMPLES[DAEMON.name]).read_text(encoding="utf-8")
    # The example's paths and addresses, but for ports that may be taken here.
    for path in ("/var/lib/korora", "/run/korora"):
        assert path in text
        text = text.replace(path, f"{tmp_path}{path}")
        Path(f"{tmp_path}{path}").mkdir(parents=True)
    text = text.replace("/etc/korora/identity", str(identity_alpha)).replace(":8010", ":0", 1)
    text = re.sub(r'from = "(.*):\d+"', r'from = "\1:0"', text) + '\n[metrics]\naddress = ""\n'
    config = tmp_path / "korora.toml"
    config.write_text(text, encoding="utf-8")
    program, *words = command(DAEMON, {}, tmp_path)
    assert program == PROGRAM
    words = [word.replace("/etc/korora/korora.toml", str(config)) for word in words]
    with subprocess.Popen(
        [sys.executable, "-m", "korora", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            _, log = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert log.startswith("{"), "the journal wants JSON"


def test_the_daemon_s_stop_waits_for_its_drain() -> None:
    from korora.daemon.config import Limits
    from korora.daemon.supervisor import STOP_SECONDS_MAX

    assert int(settings(DAEMON)["TimeoutStopSec"]) > Limits().drain_timeout + STOP_SECONDS_MAX


def test_the_socket_unit_opens_what_the_daemon_takes(tmp_path: Path) -> None:
    from korora.daemon.notify import RELAY

    unit = DEPLOY / "systemd" / "korora.socket"
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit, encoding="utf-8")
    assert parser["Socket"]["FileDescriptorName"] == RELAY
    assert parser["Socket"].get("Accept", "no") == "no"
    if shutil.which("systemd-analyze") is None:
        return
    runnable(DAEMON, tmp_path)
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text(encoding="utf-8"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", copy],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr


def test_the_readme_installs_where_the_units_look() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert f"python3 -m venv {Path(PROGRAM).parents[1]}" in text
    for path in (DEPLOY / "systemd").iterdir():
        assert path.name in text or path.match("korora-*@.service"), path.name

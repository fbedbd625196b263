"""`korora pki` as a person or a script meets it: words, exit codes, one line for each error and never a traceback."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from crypto import certificates
from crypto.identity import IDENTITY_FILES, Identity
from crypto.pki import CA_NAME
from korora.cli import pki

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Invoke `korora pki ARGUMENTS...`."""

    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(pki.app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def ca(run: Run, tmp_path: Path) -> Path:
    assert run("init", tmp_path / "ca").exit_code == 0
    return tmp_path / "ca"


def one_line(result: Result) -> str:
    """Exit code 2, nothing on standard output, one line on standard error that ends in its remedy."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(r"korora: error: [^\n]+; [^\n]+\n", result.stderr), result.stderr
    return result.stderr


def test_from_nothing_to_a_working_identity(run: Run, tmp_path: Path) -> None:
    made = run("init", tmp_path / "ca", "--name", "Harbour", "--days", "100")
    assert made.exit_code == 0
    assert "Harbour" in made.stdout
    issued = run("issue", tmp_path / "ca", "alpha", "--out", tmp_path / "alpha", "--days", "7")
    assert issued.exit_code == 0
    assert str(tmp_path / "alpha") in issued.stdout
    now = datetime.now(UTC)
    identity = Identity.load(tmp_path / "alpha", now=now)
    assert identity.name == "alpha"
    assert identity.ca.subject.rfc4514_string() == "CN=Harbour"
    assert identity.certificate.not_valid_after_utc < now + timedelta(days=7)
    assert {path.name for path in (tmp_path / "alpha").iterdir()} == set(IDENTITY_FILES)


def test_the_default_place_is_under_hosts(run: Run, ca: Path) -> None:
    assert run("issue", ca, "alpha").exit_code == 0
    assert Identity.load(ca / "hosts" / "alpha", now=datetime.now(UTC)).name == "alpha"


def test_a_relative_out_is_remembered_as_it_was_meant(
    run: Run, ca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "work")
        assert run("issue", ca, "alpha", "--out", "mine").exit_code == 0
    revoked = run("revoke", ca, "alpha")
    assert f"refreshed: {tmp_path / 'work' / 'mine'}\n" in revoked.stdout


def test_revoke_says_what_it_refreshed_and_what_is_left_to_do(run: Run, ca: Path, tmp_path: Path) -> None:
    run("issue", ca, "alpha")
    run("issue", ca, "beta", "--out", tmp_path / "beta")
    shutil.rmtree(tmp_path / "beta")
    revoked = run("revoke", ca, "alpha")
    assert revoked.exit_code == 0
    lines = revoked.stdout.splitlines()
    assert lines[0] == "revoked 2 certificates of alpha"
    assert f"refreshed: {ca / 'hosts' / 'alpha'}" in lines
    assert "not on this machine: beta" in lines
    assert lines[-1].startswith(f"copy {ca / 'crl.pem'} by hand")
    again = run("revoke", ca, "alpha")
    assert again.exit_code == 0
    assert "no valid certificate left" in again.stdout


def test_crl_is_renewed(run: Run, ca: Path) -> None:
    run("issue", ca, "alpha")
    before = (ca / "crl.pem").read_bytes()
    renewed = run("crl", ca, "--days", "9")
    assert renewed.exit_code == 0
    assert renewed.stdout.startswith("CRL 2 in ")
    assert (ca / "crl.pem").read_bytes() != before
    assert (ca / "hosts" / "alpha" / "crl.pem").read_bytes() == (ca / "crl.pem").read_bytes()


def test_list_for_people(run: Run, ca: Path) -> None:
    run("issue", ca, "alpha")
    run("issue", ca, "a-much-longer-name")
    run("revoke", ca, "alpha")
    lines = run("list", ca).stdout.splitlines()
    assert len(lines) == 1 + 4
    column = lines[0].index("STATUS")
    assert [line[column : column + 8].strip() for line in lines[1:]] == ["revoked", "revoked", "valid", "valid"]


def test_list_for_scripts(run: Run, ca: Path) -> None:
    assert json.loads(run("list", ca, "--json").stdout) == []
    run("issue", ca, "alpha")
    run("revoke", ca, "alpha")
    host, signing = json.loads(run("list", ca, "--json").stdout)
    identity_serial = serial_of(ca / "hosts" / "alpha")
    assert host["serial"] == identity_serial
    assert (host["name"], host["usage"], host["status"]) == ("alpha", "host", "revoked")
    assert (signing["name"], signing["usage"], signing["status"]) == ("alpha", "signing", "revoked")
    assert datetime.fromisoformat(host["revoked_at"]).tzinfo is not None
    assert host["directory"] == str(ca / "hosts" / "alpha")


def serial_of(directory: Path) -> str:
    from cryptography import x509

    return f"{x509.load_pem_x509_certificate((directory / 'host.crt').read_bytes()).serial_number:x}"


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("command", [["issue", "alpha"], ["revoke", "alpha"], ["list"], ["crl"]])
def test_no_ca_there(run: Run, tmp_path: Path, command: list[str]) -> None:
    assert "korora pki init" in one_line(run(command[0], tmp_path / "nothing", *command[1:]))


def test_init_where_a_ca_stands(run: Run, ca: Path) -> None:
    assert "already" in one_line(run("init", ca))


def test_init_where_a_file_stands(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in one_line(run("init", tmp_path / "file"))


def test_init_below_what_cannot_be_written(run: Run) -> None:
    assert "/proc/korora" in one_line(run("init", "/proc/korora/ca"))


@pytest.mark.parametrize("name", ["a b", "../alpha", ".", "é", "a" * 64])
def test_issue_with_a_bad_name(run: Run, ca: Path, name: str) -> None:
    assert "cannot be a host's name" in one_line(run("issue", ca, "--", name))


def test_issue_over_an_identity(run: Run, ca: Path) -> None:
    run("issue", ca, "alpha")
    assert "--force" in one_line(run("issue", ca, "alpha"))
    assert run("issue", ca, "alpha", "--force").exit_code == 0


def test_issue_into_a_file(run: Run, ca: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in one_line(run("issue", ca, "alpha", "--out", tmp_path / "file"))


def test_revoke_a_name_never_issued(run: Run, ca: Path) -> None:
    assert "korora pki list" in one_line(run("revoke", ca, "nobody"))


def test_a_damaged_index(run: Run, ca: Path) -> None:
    (ca / "index.jsonl").write_text("{}\n")
    assert "line 1" in one_line(run("list", ca))


def test_a_key_that_others_can_read(run: Run, ca: Path) -> None:
    (ca / "ca.key").chmod(0o644)
    assert "chmod 600" in one_line(run("issue", ca, "alpha"))


@pytest.mark.parametrize("days", ["0", "-1", "36501", "many"])
def test_days_that_make_no_sense(run: Run, ca: Path, days: str) -> None:
    result = run("issue", ca, "alpha", "--days", days)
    assert result.exit_code == 2
    assert "--days" in result.stderr
    assert "Traceback" not in result.output


def test_no_secret_in_any_output(run: Run, ca: Path) -> None:
    outputs = [run("issue", ca, "alpha").output, run("list", ca).output, run("revoke", ca, "alpha").output]
    keys = [ca / "ca.key", ca / "hosts" / "alpha" / "host.key", ca / "hosts" / "alpha" / "signing.key"]
    for key in keys:
        secret_lines = [line for line in key.read_text().splitlines() if not line.startswith("-----")]
        assert not any(line in output for line in secret_lines for output in outputs)


# ------------------------------------------------------------------ the module itself


def test_importing_the_commands_loads_no_cryptography() -> None:
    """`korora --help` must stay quick; the clean interpreter is the point."""
    code = "import sys, korora.cli.pki; sys.exit(any(m.split('.')[0] in {'cryptography', 'nacl'} for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_repeated_constants_agree() -> None:
    """The command line repeats what it may not import."""
    import inspect

    assert certificates.DAYS_MAX == pki._DAYS_MAX
    assert inspect.signature(pki.init).parameters["days"].default == certificates.CA_DAYS
    assert inspect.signature(pki.init).parameters["name"].default == CA_NAME
    assert inspect.signature(pki.issue).parameters["days"].default == certificates.CERTIFICATE_DAYS
    assert inspect.signature(pki.crl).parameters["days"].default == certificates.CRL_DAYS

"""`korora attest` as an operator types it: three files between two hosts, and every way in which one is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tpms import SoftTpm, soft_tpm
from crypto.attestation import reference
from korora.agents.vtpm.tcti import Tpm
from tests.crypto.attestation.test_endorsement import ENDORSEMENT, ROOT

pytestmark = pytest.mark.timeout(120)  # a dozen processes one after the other


@pytest.fixture(scope="module")
def swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftTpm]:
    with soft_tpm(tmp_path_factory.mktemp("tpm")) as running:
        yield running


def attest(*arguments: str | Path) -> tuple[int, str, str]:
    """A command: its exit code, standard output and error."""
    command = [sys.executable, "-m", "korora", "attest", *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_three_files_enrol_a_host(swtpm: SoftTpm, tmp_path: Path) -> None:
    known, at = tmp_path / "known", lambda name: tmp_path / name
    assert attest("show", "--tpm", swtpm.tcti, "--request", at("request"))[0] == 0
    code, _, warned = attest(
        *("challenge", "beta", "--request", at("request"), "--attestation", known, "--out", at("challenge")),
        *("--pcrs", "sha256:0,7+sha1:7"),
    )
    assert code == 0
    assert "no manufacturer is asked" in warned
    assert (known / "beta.pending").stat().st_mode & 0o077 == 0
    assert attest("answer", "--tpm", swtpm.tcti, "--challenge", at("challenge"), "--out", at("answer"))[0] == 0
    assert attest("enrol", "beta", "--attestation", known, "--answer", at("answer"))[0] == 0
    assert sorted(os.listdir(known)) == ["beta.toml"]
    made = reference.load(known, "beta")
    assert {bank: sorted(held) for bank, held in made.pcrs.items()} == {"sha1": [7], "sha256": [0, 7]}
    code, output, _ = attest("verify", "beta", "--attestation", known, "--tpm", swtpm.tcti, "--json")
    assert code == 0
    assert json.loads(output)["proved"].endswith("pcrs sha1:7 sha256:0,7")
    # An answer is good for its challenge alone.
    assert attest("enrol", "beta", "--attestation", known, "--answer", at("answer"))[0] == 2
    attest("challenge", "beta", "--request", at("request"), "--attestation", known, "--out", at("other"))
    code, _, refused = attest("enrol", "beta", "--attestation", known, "--answer", at("answer"))
    assert (code, "not in one TPM" in refused) == (2, True)


def test_a_changed_host(swtpm: SoftTpm, tmp_path: Path) -> None:
    assert attest("enrol", "beta", "--attestation", tmp_path, "--tpm", swtpm.tcti, "--pcrs", "sha256:16")[0] == 0
    Tpm(swtpm.tcti).extend(16, b"x" * 32)
    code, _, refused = attest("verify", "beta", "--attestation", tmp_path, "--tpm", swtpm.tcti)
    assert code == 4
    assert "PCR 16 of sha256: expected " in refused
    code, golden, _ = attest("golden", "--tpm", swtpm.tcti, "--pcrs", "sha256:16")
    assert code == 0
    path = tmp_path / "beta.toml"
    text = path.read_text()
    path.write_text(text[: text.index("[pcrs.sha256]")] + golden)
    assert attest("verify", "beta", "--attestation", tmp_path, "--tpm", swtpm.tcti)[0] == 0


def test_a_manufacturer_is_asked(swtpm: SoftTpm, tmp_path: Path) -> None:
    """This TPM has no certificate: with --ek-ca it is not enrolled."""
    roots = tmp_path / "roots"
    roots.mkdir()
    code, _, refused = attest("enrol", "beta", "--attestation", tmp_path, "--tpm", swtpm.tcti, "--ek-ca", roots)
    assert (code, "no certificate in" in refused) == (2, True)
    from cryptography.hazmat.primitives.serialization import Encoding

    (roots / "root.pem").write_bytes(ROOT.certificate.public_bytes(Encoding.PEM))
    code, _, refused = attest("enrol", "beta", "--attestation", tmp_path, "--tpm", swtpm.tcti, "--ek-ca", roots)
    assert (code, "certificate" in refused) == (2, True)
    assert not (tmp_path / "beta.toml").exists()
    assert ENDORSEMENT.symmetric_bits == 128


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("show", "--tpm", "swtpm:host=127.0.0.1,port=1"), 2, "the TPM does not answer"),
        (("enrol", "beta", "--attestation", "{}"), 2, "--answer or --tpm"),
        (("enrol", "../beta", "--attestation", "{}", "--answer", "{}/a"), 2, "cannot read"),
        (("verify", "beta", "--attestation", "{}", "--tpm", "swtpm:"), 4, "not enrolled"),
        (("golden", "--pcrs", "sha256:99"), 2, "names no PCRs"),
        (("answer", "--challenge", "{}/none", "--out", "{}/out"), 2, "cannot read"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    ended, _, refused = attest(*(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert ended == code, refused
    assert says in refused
    assert "; " in refused.strip().splitlines()[-1]  # with a remedy


def test_files_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"{}", b"\xff", b'{"ak": "zz", "endorsement": ""}', b'{"ak": "00", "endorsement": "00"}'):
        (tmp_path / "request").write_bytes(content)
        code, _, refused = attest(
            *("challenge", "beta", "--request", tmp_path / "request", "--attestation", tmp_path / "known"),
            *("--out", tmp_path / "out"),
        )
        assert code == 2, refused
        assert not (tmp_path / "out").exists()

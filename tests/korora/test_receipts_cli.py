"""`korora receipts` as a person or a script meets it; and an auditor, who has a file and public keys, no more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crypto.certificates import peer_name
from crypto.identity import Identity
from crypto.pki import Authority
from crypto.receipts.dsse import countersign, encode, sign
from crypto.receipts.log import ENTRIES, ReceiptLog
from crypto.receipts.merkle import leaf_hash, verify_consistency, verify_inclusion
from crypto.receipts.signers import Signers
from crypto.receipts.statement import Decision, Heads, Machine, Party, Predicate, Stage, build

SECONDS = 30.0


def korora(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "korora", "receipts", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def said(*arguments: object) -> str:
    result = korora(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def told(*arguments: object) -> Any:
    return json.loads(said(*arguments, "--json"))


def refused(code: int, *arguments: object) -> str:
    result = korora(*arguments)
    assert result.returncode == code, result
    assert len(result.stderr.splitlines()) == 1, result
    return result.stderr


def session(number: int, name: str, log: ReceiptLog, source: Identity, destination: Identity) -> None:
    """Offer, transfer and outcome of one session, logged at its source."""
    base = Predicate(
        stage=Stage.OFFER,
        session=f"{number:02x}" * 16,
        source=Party(source.name, source.spki_sha256.hex(), 0),
        destination=Party(destination.name),
        vm=None,
        started=NOW,
    )
    log.append(sign(build(base, {}), source.signing_key))
    transferred = msgspec.structs.replace(
        base,
        stage=Stage.TRANSFER,
        vm=Machine(name, "6b1f0e8a-0000-4000-8000-000000000001"),
        decisions=(Decision("source", "identity", "web servers", allowed=True),),
        heads=Heads(source=log.checkpoint(source.name, source.signing_key)),
    )
    content = build(transferred, {"channel/0/forward": {"blake3": "ab" * 32}})
    log.append(countersign(sign(content, source.signing_key), destination.signing_key))
    outcome = msgspec.structs.replace(transferred, stage=Stage.OUTCOME, ended=NOW, outcome="done")
    log.append(countersign(sign(build(outcome, {}), source.signing_key), destination.signing_key))


NOW = "2031-05-17T12:00:00.000+00:00"


class Site:
    """A CA, two hosts, and the state of the one that sent two machines."""

    def __init__(self, folder: Path) -> None:
        from datetime import datetime

        moment = datetime.fromisoformat(NOW)
        authority = Authority.create(folder / "ca", now=moment)
        self.ca = folder / "ca" / "ca.crt"
        self.alpha = authority.issue("alpha", now=moment).directory
        self.beta = authority.issue("beta", now=moment).directory
        alpha, beta = (Identity.load(one, now=moment) for one in (self.alpha, self.beta))
        self.state = folder / "state"
        self.log = ReceiptLog(self.state / "receipts")
        session(1, "web-1", self.log, alpha, beta)
        session(2, "evil\x1b[31m", self.log, alpha, beta)
        self.log.checkpoint("alpha", alpha.signing_key)
        for one in (alpha, beta):
            Signers(self.log.folder).keep(one.signing_certificate.public_bytes(der()))
        self.keys = {one.name: one.signing_key for one in (alpha, beta)}
        assert peer_name(beta.signing_certificate) == "beta"


def der() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.DER


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Never changed."""
    return Site(tmp_path_factory.mktemp("receipts"))


@pytest.fixture
def state(site: Site, tmp_path: Path) -> Path:
    """A copy of its state, to be changed."""
    shutil.copytree(site.state, tmp_path / "state")
    return tmp_path / "state"


def test_list_names_sessions_their_ends_and_who_signed(site: Site) -> None:
    lines = said("list", "--state", site.state).splitlines()
    assert lines[0].split() == ["ENTRY", "SESSION", "STAGE", "VM", "FROM", "TO", "WHEN", "OUTCOME", "SIGNED", "BY"]
    assert lines[1].split() == ["0", "01010101", "offer", "—", "alpha", "beta", "2031-05-17T12:00:00", "—", "alpha"]
    assert lines[3].split()[2:] == [
        "outcome", "web-1", "alpha", "beta", "2031-05-17T12:00:00", "done", "alpha,", "beta"
    ]  # fmt: skip
    assert all(line.isprintable() for line in lines)  # a guest's name does nothing to a terminal
    rows = told("list", "--state", site.state)["receipts"]
    assert [row["index"] for row in rows] == list(range(6))
    assert rows[0]["missing"] == ["beta"]
    assert rows[5]["signed"] == ["alpha", "beta"]


def test_no_state_and_no_log(tmp_path: Path) -> None:
    assert "name it by --state" in refused(2, "list", "--state", tmp_path / "none")
    assert said("list", "--state", tmp_path) == "no receipt is logged\n"
    assert said("verify", "--state", tmp_path).startswith("the log is in order: 0 entries")


def test_show_tells_what_was_signed(site: Site) -> None:
    shown = said("show", "0101", "--state", site.state)
    assert "entry 0: alpha\n" in shown
    assert "entry 2: alpha, beta\n" in shown
    assert "rule=web servers" in shown
    assert all(line.isprintable() for line in said("show", "02", "--state", site.state).splitlines())
    full = told("show", "#1", "--state", site.state)["receipts"]
    assert full[0]["statement"]["subject"][1]["digest"] == {"blake3": "ab" * 32}
    assert "is logged here" in refused(2, "show", "03", "--state", site.state)
    assert "means 2 sessions" in refused(2, "show", "0", "--state", site.state)
    assert "none is '#6'" in refused(2, "show", "#6", "--state", site.state)


def test_the_log_is_read_through(site: Site, state: Path) -> None:
    assert said("verify", "--state", state).startswith("the log is in order: 6 entries, its head over 6 is signed")
    path = state / "receipts" / ENTRIES
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    result = korora("verify", "--state", state)
    assert result.returncode == 5
    assert "entry 1 is out of order: entry 2 stands in its place" in result.stdout
    result = korora("verify", "--state", state, "--json")
    assert result.returncode == 5
    found = json.loads(result.stdout)
    assert not found["ok"]
    assert [one["entry"] for one in found["findings"]] == [1, 2]


def test_a_log_of_a_host_whose_key_nobody_knows(site: Site, state: Path) -> None:
    shutil.rmtree(state / "receipts" / "signers")
    assert "no signing certificate of alpha is known" in refused(2, "verify", "--state", state)
    assert "without the signature of beta" in korora("verify", "--state", state, "--identity", site.alpha).stdout
    beta = f"--signer=beta={site.beta / 'signing.crt'}"
    assert said("verify", "--state", state, "--identity", site.alpha, beta).startswith("the log is in order")
    given = [f"--signer={one.name}={one / 'signing.crt'}" for one in (site.alpha, site.beta)]
    assert said("verify", "--state", state, *given).startswith("the log is in order")


def test_what_a_crash_left_is_said(state: Path) -> None:
    with (state / "receipts" / ENTRIES).open("ab") as file:
        file.write(b'{"payload":"')
    assert "12 bytes of one that was never logged" in said("verify", "--state", state)
    result = korora("list", "--state", state)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 7)
    assert "a crash left 12 bytes" in result.stderr


def test_proofs_hold(site: Site) -> None:
    proof = told("prove", 2, "--size", 5, "--state", site.state)
    path = [bytes.fromhex(one) for one in proof["proof"]]
    leaf = leaf_hash(encode(site.log.entry(2)))
    assert proof["leaf"] == leaf.hex()
    verify_inclusion(leaf, 2, 5, path, bytes.fromhex(proof["root"]))
    grown = told("consistency", 2, 5, "--state", site.state)
    path = [bytes.fromhex(one) for one in grown["proof"]]
    verify_consistency(2, bytes.fromhex(grown["old_root"]), 5, bytes.fromhex(grown["new_root"]), path)
    assert told("consistency", 2, "--state", site.state)["new"] == 6
    assert grown["old_root"] in said("consistency", 2, 5, "--state", site.state)
    assert proof["proof"][0] in said("prove", 2, "--size", 5, "--state", site.state)
    wrong = [("prove", 6), ("prove", "x"), ("prove", 2, "--size", 2), ("consistency", 5, 2), ("consistency", 7)]
    for arguments in wrong:
        assert "entr" in refused(2, *arguments, "--state", site.state)


@pytest.fixture(scope="module")
def bundle(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both sessions."""
    path = tmp_path_factory.mktemp("bundle") / "receipts.json"
    assert said("export", "--out", path, "--state", site.state) == f"6 receipts in {path}\n"
    return path


def test_a_bundle_is_verified_with_public_keys_alone(site: Site, bundle: Path, tmp_path: Path) -> None:
    """Nothing of the host that made it is at hand."""
    alone = tmp_path / "receipts.json"
    shutil.copy(bundle, alone)
    shutil.copy(site.ca, tmp_path / "ca.crt")
    shown = said("verify", alone, "--ca", tmp_path / "ca.crt")
    assert "entry 2: session 01010101, outcome: web-1 from alpha to beta, done; signed by alpha and beta\n" in shown
    assert "all stand in the log korora/alpha of 6 entries" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    verified = told("verify", alone, "--ca", tmp_path / "ca.crt", "--crl", site.ca.with_name("crl.pem"))
    assert (verified["kind"], verified["size"], len(verified["receipts"])) == ("bundle", 6, 6)
    given = [f"--signer={one.name}={one / 'signing.crt'}" for one in (site.alpha, site.beta)]
    assert told("verify", alone, *given)["receipts"] == verified["receipts"]


def test_a_bundle_of_one_session_and_to_standard_output(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(said("export", "0202", "#0", "--state", site.state))
    assert [one["index"] for one in told("verify", path, "--ca", site.ca)["receipts"]] == [0, 3, 4, 5]


def test_a_head_is_signed_anew_where_the_last_does_not_cover(site: Site, state: Path, tmp_path: Path) -> None:
    log = ReceiptLog(state / "receipts")
    log.append(log.entry(0))
    assert "covers 6 entries" in refused(2, "export", "--state", state)
    path = tmp_path / "all.json"
    result = korora("export", "--out", path, "--state", state, "--identity", site.alpha)
    if result.returncode == 0:  # the identity is of a time that has come
        assert told("verify", path, "--ca", site.ca)["size"] == 7
    else:
        assert "not valid before 2031" in result.stderr


def test_nobody_is_believed_unless_somebody_says_so(site: Site, bundle: Path, tmp_path: Path) -> None:
    assert "nothing says whose keys" in refused(2, "verify", bundle)
    from datetime import datetime

    other = Authority.create(tmp_path / "other", now=datetime.fromisoformat(NOW))
    other.issue("alpha", now=datetime.fromisoformat(NOW))
    assert "no key of 'alpha' is known" in refused(5, "verify", bundle, "--ca", tmp_path / "other" / "ca.crt")
    stranger = tmp_path / "other" / "hosts" / "alpha" / "signing.crt"
    assert "not signed by its host's key" in refused(5, "verify", bundle, "--signer", f"alpha={stranger}")
    assert "is the certificate of alpha" in refused(2, "verify", bundle, "--signer", f"beta={stranger}")
    assert "names no file" in refused(2, "verify", bundle, "--signer", "beta")
    assert "no CA's certificate" in refused(2, "verify", bundle, "--ca", site.alpha / "host.crt")
    assert "without --ca" in refused(2, "verify", bundle, "--crl", site.ca.with_name("crl.pem"))
    crl = tmp_path / "other" / "crl.pem"
    assert "was not signed by the CA" in refused(2, "verify", bundle, "--ca", site.ca, "--crl", crl)


def test_nothing_in_a_bundle_can_be_altered(site: Site, bundle: Path, tmp_path: Path) -> None:
    """Another receipt in its place, another place, another head, another proof, fewer certificates."""
    whole = json.loads(bundle.read_text())
    path = tmp_path / "altered.json"
    entries = whole["entries"]
    swapped = [{**entries[1], "envelope": entries[0]["envelope"]}]
    moved = [{**entries[1], "index": 2}]
    foreign = sign(site.log.entry(1).payload, site.keys["alpha"])  # signed by one, and never logged
    cases: list[tuple[dict[str, Any], int]] = [
        ({"entries": swapped}, 5),
        ({"entries": moved}, 5),
        ({"entries": [{**entries[1], "proof": entries[2]["proof"]}]}, 5),
        ({"entries": [{**entries[1], "proof": []}]}, 5),
        ({"entries": [{**entries[1], "envelope": json.loads(encode(foreign))}]}, 5),
        ({"entries": [{**entries[1], "index": -1}]}, 5),
        ({"checkpoint": whole["checkpoint"].replace("\n6\n", "\n7\n")}, 5),
        ({"checkpoint": ""}, 5),
        ({"signers": []}, 5),
        ({"signers": ["AA=="]}, 5),
        ({"signers": ["!"]}, 5),
        ({"type": "korora-receipts/v2"}, 5),
        ({"more": 1}, 5),
    ]
    for change, code in cases:
        path.write_text(json.dumps({**whole, **change}))
        refused(code, "verify", path, "--ca", site.ca)
    path.write_text(json.dumps(whole, indent=2))  # how it is spelled does not matter
    assert len(told("verify", path, "--ca", site.ca)["receipts"]) == 6


def test_one_envelope_is_verified_too(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(encode(site.log.entry(2)))
    given = [f"--signer={one.name}={one / 'signing.crt'}" for one in (site.alpha, site.beta)]
    assert said("verify", path, *given).endswith("signed by alpha and beta\n")
    assert told("verify", path, given[0])["receipts"][0]["missing"] == ["beta"]
    path.write_bytes(encode(site.log.entry(2)).replace(b'"sig":"', b'"sig":"A', 1))
    refused(5, "verify", path, *given)
    for content in (b"", b"{}", b"\xff" * 100_000):
        path.write_bytes(content)
        assert "not a bundle" in refused(5, "verify", path, *given)
    path.unlink()
    assert "cannot read" in refused(2, "verify", path, *given)
    os.mkfifo(path)
    assert "not a regular file" in refused(2, "verify", path, *given)

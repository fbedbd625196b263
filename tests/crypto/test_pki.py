"""The CA: real files, what OpenSSL thinks of them, and what a crash or a second process leaves behind."""

import os
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto.certificates import EKU_SIGNING, Usage, check_name, crl_number, peer_name
from crypto.errors import PkiCorrupt, PkiError, PkiExists, PkiExpired, PkiMissing, PkiNameInvalid
from crypto.identity import IDENTITY_FILES, Identity
from crypto.pki import Authority
from crypto.pki_index import Status

NOW = datetime(2031, 5, 17, 12, 0, tzinfo=UTC)
OPENSSL = shutil.which("openssl")

needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="no openssl command here")
needs_ordinary_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", now=NOW)


def load_crl(path: Path) -> x509.CertificateRevocationList:
    return x509.load_pem_x509_crl(path.read_bytes())


def openssl_verify(ca: Authority, certificate: Path, purpose: str) -> subprocess.CompletedProcess[str]:
    assert OPENSSL is not None
    command = [OPENSSL, "verify", "-x509_strict", "-attime", str(int(NOW.timestamp())), "-purpose", purpose]
    command += ["-CAfile", str(ca.directory / "ca.crt"), "-CRLfile", str(ca.directory / "crl.pem"), "-crl_check"]
    return subprocess.run([*command, str(certificate)], capture_output=True, text=True, timeout=20, check=False)


# ------------------------------------------------------------------ what is written


def test_everything_written_is_private(ca: Authority, tmp_path: Path) -> None:
    ca.issue("alpha", now=NOW)
    ca.issue("beta", now=NOW, out=tmp_path / "elsewhere" / "deep")
    for path in [ca.directory, *ca.directory.rglob("*"), tmp_path / "elsewhere", *(tmp_path / "elsewhere").rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_a_wide_umask_changes_nothing(ca: Authority) -> None:
    before = os.umask(0)
    try:
        directory = ca.issue("alpha", now=NOW).directory
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE((directory / file).stat().st_mode) for file in IDENTITY_FILES} == {0o600}


def test_an_identity_is_complete_and_loads(ca: Authority) -> None:
    issued = ca.issue("alpha", now=NOW)
    assert {path.name for path in issued.directory.iterdir()} == set(IDENTITY_FILES)
    identity = Identity.load(issued.directory, now=NOW)
    assert identity.name == "alpha"
    assert identity.certificate.serial_number == issued.host_serial
    assert identity.signing_certificate.serial_number == issued.signing_serial
    assert identity.ca == ca.certificate


def test_certificates_say_exactly_what_they_are_for(ca: Authority) -> None:
    identity = Identity.load(ca.issue("alpha", now=NOW).directory, now=NOW)

    def purposes(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)

    assert purposes(identity.certificate) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    assert purposes(identity.signing_certificate) == [EKU_SIGNING]
    constraints = ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert peer_name(identity.certificate) == peer_name(identity.signing_certificate) == "alpha"


@needs_openssl
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_agrees_on_a_good_host_certificate(ca: Authority, purpose: str) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    result = openssl_verify(ca, directory / "host.crt", purpose)
    assert result.returncode == 0, result.stderr


@needs_openssl
@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_refuses_the_signing_certificate_for_tls(ca: Authority, purpose: str) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    result = openssl_verify(ca, directory / "signing.crt", purpose)
    assert result.returncode != 0
    assert "unsuitable certificate purpose" in result.stderr


def test_validity_starts_a_little_earlier_and_ends_with_the_ca(tmp_path: Path) -> None:
    ca = Authority.create(tmp_path / "ca", now=NOW, days=10)
    certificate = Identity.load(ca.issue("alpha", now=NOW, days=300).directory, now=NOW).certificate
    assert certificate.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert certificate.not_valid_after_utc == NOW + timedelta(days=10)


# ------------------------------------------------------------------ what is refused


def test_a_second_ca_in_one_directory_is_refused(ca: Authority) -> None:
    before = (ca.directory / "ca.key").read_bytes()
    with pytest.raises(PkiExists):
        Authority.create(ca.directory, now=NOW)
    assert (ca.directory / "ca.key").read_bytes() == before


def test_a_lost_ca_certificate_does_not_let_init_overwrite_the_key(ca: Authority) -> None:
    ca.issue("alpha", now=NOW)
    (ca.directory / "ca.crt").unlink()
    with pytest.raises(PkiExists):
        Authority.create(ca.directory, now=NOW)


def test_an_interrupted_init_can_be_repeated(ca: Authority) -> None:
    (ca.directory / "ca.crt").unlink()  # the last file that init writes
    again = Authority.create(ca.directory, now=NOW)
    assert Identity.load(again.issue("alpha", now=NOW).directory, now=NOW).name == "alpha"


@pytest.mark.parametrize("file", IDENTITY_FILES)
def test_an_existing_identity_is_not_overwritten(ca: Authority, tmp_path: Path, file: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / file).write_bytes(b"precious")
    with pytest.raises(PkiExists) as caught:
        ca.issue("alpha", now=NOW, out=out)
    assert "--force" in caught.value.remedy
    assert [path.name for path in out.iterdir()] == [file]
    assert (out / file).read_bytes() == b"precious"
    assert ca.entries(now=NOW) == ()


def test_force_replaces_an_identity_and_leaves_the_rest(ca: Authority) -> None:
    first = ca.issue("alpha", now=NOW)
    (first.directory / "state").mkdir()
    second = ca.issue("alpha", now=NOW, force=True)
    assert second.directory == first.directory
    assert Identity.load(first.directory, now=NOW).certificate.serial_number == second.host_serial
    assert (first.directory / "state").is_dir()


def test_a_symbolic_link_is_replaced_not_followed(ca: Authority, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "host.key").symlink_to(victim)
    ca.issue("alpha", now=NOW, out=out, force=True)
    assert victim.read_bytes() == b"precious"
    assert not (out / "host.key").is_symlink()


def test_a_directory_with_something_in_it_keeps_its_mode(ca: Authority, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    shared.chmod(0o755)
    (shared / "README").touch()
    ca.issue("alpha", now=NOW, out=shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a b", "a/b", "../x", "a\n", "é", "a" * 64, "a\0", "корора"])
def test_names_that_no_host_can_have(ca: Authority, name: str) -> None:
    with pytest.raises(PkiNameInvalid):
        ca.issue(name, now=NOW)
    assert ca.entries(now=NOW) == ()


@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_good_name_comes_back_from_its_certificate(ca: Authority, name: str) -> None:
    identity = Identity.load(ca.issue(name, now=NOW, force=True).directory, now=NOW)
    assert identity.name == name


@given(name=st.text(max_size=80))
def test_a_name_is_ascii_and_no_path(name: str) -> None:
    try:
        check_name(name)
    except PkiNameInvalid:
        return
    assert name.isascii()
    assert not set(name) & set("/\\\0\n :@?#%")
    assert name not in {"", ".", ".."}


@pytest.mark.parametrize("days", [0, -1, 36_501])
def test_days_out_of_range(ca: Authority, days: int) -> None:
    with pytest.raises(ValueError, match="days"):
        ca.issue("alpha", now=NOW, days=days)
    with pytest.raises(ValueError, match="days"):
        ca.publish_crl(now=NOW, days=days)


def test_an_expired_ca_issues_nothing(tmp_path: Path) -> None:
    ca = Authority.create(tmp_path / "ca", now=NOW, days=1)
    later = NOW + timedelta(days=2)
    with pytest.raises(PkiExpired):
        ca.issue("alpha", now=later)
    with pytest.raises(PkiExpired):
        ca.publish_crl(now=later)


def test_no_ca_there(tmp_path: Path) -> None:
    with pytest.raises(PkiMissing) as caught:
        Authority.open(tmp_path / "nothing")
    assert "pki init" in caught.value.remedy


def test_a_key_that_others_can_read_is_refused(ca: Authority) -> None:
    (ca.directory / "ca.key").chmod(0o640)
    with pytest.raises(PkiCorrupt, match="0640"):
        Authority.open(ca.directory)


def test_a_key_of_another_ca_is_refused(ca: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", now=NOW)
    shutil.copy(other.directory / "ca.key", ca.directory / "ca.key")
    with pytest.raises(PkiCorrupt, match="not the key"):
        Authority.open(ca.directory)


@given(content=st.binary(max_size=200) | st.just(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("file", ["ca.crt", "ca.key", "index.jsonl"])
def test_damaged_files_give_documented_errors(ca: Authority, file: str, content: bytes) -> None:
    original = (ca.directory / file).read_bytes()
    (ca.directory / file).write_bytes(content)
    try:
        Authority.open(ca.directory).issue("alpha", now=NOW, force=True)
    except PkiError as error:
        assert error.remedy  # noqa: PT017 - an unterminated line is allowed to pass, so nothing may be raised
    finally:
        (ca.directory / file).write_bytes(original)


# ------------------------------------------------------------------ revocation


def test_revoking_covers_both_certificates_and_every_copy(ca: Authority, tmp_path: Path) -> None:
    alpha = ca.issue("alpha", now=NOW)
    second = ca.issue("alpha", now=NOW, out=tmp_path / "second")
    beta = ca.issue("beta", now=NOW)
    revocation = ca.revoke("alpha", now=NOW)
    wanted = {alpha.host_serial, alpha.signing_serial, second.host_serial, second.signing_serial}
    assert set(revocation.serials) == wanted
    assert set(revocation.published.refreshed) == {alpha.directory, second.directory, beta.directory}
    assert revocation.published.failed == ()
    for path in [ca.directory, alpha.directory, second.directory, beta.directory]:
        assert {entry.serial_number for entry in load_crl(path / "crl.pem")} == wanted
    assert Identity.load(beta.directory, now=NOW).name == "beta"


@needs_openssl
def test_openssl_sees_the_revocation(ca: Authority) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    ca.revoke("alpha", now=NOW)
    result = openssl_verify(ca, directory / "host.crt", "sslserver")
    assert result.returncode != 0
    assert "revoked" in result.stderr


def test_a_name_can_be_issued_again_after_revocation(ca: Authority) -> None:
    ca.issue("alpha", now=NOW)
    ca.revoke("alpha", now=NOW)
    again = ca.issue("alpha", now=NOW, force=True)
    assert Identity.load(again.directory, now=NOW).certificate.serial_number == again.host_serial


def test_revoking_twice_publishes_again_and_revokes_nothing(ca: Authority) -> None:
    ca.issue("alpha", now=NOW)
    first = ca.revoke("alpha", now=NOW)
    second = ca.revoke("alpha", now=NOW)
    assert len(first.serials) == 2
    assert second.serials == ()
    assert second.published.number == first.published.number + 1
    assert len(load_crl(ca.directory / "crl.pem")) == 2


def test_a_name_that_was_never_issued(ca: Authority) -> None:
    with pytest.raises(PkiNameInvalid, match="issued nothing"):
        ca.revoke("gamma", now=NOW)


def test_identities_that_left_this_machine_are_named(ca: Authority, tmp_path: Path) -> None:
    away = ca.issue("away", now=NOW, out=tmp_path / "away").directory
    here = ca.issue("here", now=NOW).directory
    shutil.rmtree(away)
    published = ca.publish_crl(now=NOW)
    assert published.elsewhere == ("away",)
    assert published.refreshed == (here,)
    assert not away.exists()


def test_a_ca_that_was_moved_still_refreshes_its_hosts(ca: Authority, tmp_path: Path) -> None:
    ca.issue("alpha", now=NOW)
    moved = Authority.open(ca.directory.rename(tmp_path / "moved"))
    published = moved.publish_crl(now=NOW)
    assert published.refreshed == (tmp_path / "moved" / "hosts" / "alpha",)
    assert published.elsewhere == ()


def test_an_identity_of_another_ca_in_the_same_place_is_left_alone(ca: Authority, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ca.issue("alpha", now=NOW, out=out)
    other = Authority.create(tmp_path / "other", now=NOW)
    other.issue("alpha", now=NOW, out=out, force=True)
    before = (out / "crl.pem").read_bytes()
    assert ca.revoke("alpha", now=NOW).published.refreshed == ()
    assert (out / "crl.pem").read_bytes() == before


def test_a_copy_that_cannot_be_replaced_is_reported(ca: Authority) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    (directory / "crl.pem").unlink()
    (directory / "crl.pem").mkdir()  # root too cannot rename a file over a directory
    published = ca.publish_crl(now=NOW)
    assert [path for path, _ in published.failed] == [directory]
    assert published.refreshed == ()
    assert sorted(path.name for path in directory.iterdir()) == sorted(IDENTITY_FILES)  # no temporary file stays


@needs_ordinary_user
def test_a_directory_that_cannot_be_read_is_reported(ca: Authority) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    directory.chmod(0)
    try:
        assert [path for path, _ in ca.publish_crl(now=NOW).failed] == [directory]
    finally:
        directory.chmod(0o700)


def test_crl_numbers_only_rise(ca: Authority) -> None:
    numbers = [crl_number(load_crl(ca.directory / "crl.pem"))]
    ca.issue("alpha", now=NOW)
    numbers += [ca.publish_crl(now=NOW).number for _ in range(3)]
    (ca.directory / "crl.pem").unlink()
    numbers.append(ca.revoke("alpha", now=NOW).published.number)
    assert numbers == sorted(set(numbers))
    assert crl_number(load_crl(ca.directory / "crl.pem")) == numbers[-1]


def test_crl_is_valid_as_long_as_asked(ca: Authority) -> None:
    assert ca.publish_crl(now=NOW, days=7).next_update == NOW + timedelta(days=7)
    crl = load_crl(ca.directory / "crl.pem")
    assert crl.next_update_utc == NOW + timedelta(days=7)
    assert crl.last_update_utc == NOW - timedelta(minutes=5)


def test_an_identity_is_never_born_with_an_expired_crl(ca: Authority) -> None:
    later = NOW + timedelta(days=31)
    directory = ca.issue("alpha", now=later).directory
    assert Identity.load(directory, now=later).name == "alpha"


# ------------------------------------------------------------------ the index


def test_entries_tell_the_status_of_each_certificate(ca: Authority) -> None:
    ca.issue("old", now=NOW, days=1)
    ca.issue("bad", now=NOW)
    ca.issue("good", now=NOW)
    ca.revoke("bad", now=NOW)
    entries = ca.entries(now=NOW + timedelta(days=2))
    assert [(entry.name, entry.status) for entry in entries if entry.usage is Usage.HOST] == [
        ("old", Status.EXPIRED),
        ("bad", Status.REVOKED),
        ("good", Status.VALID),
    ]
    assert [entry.usage for entry in entries[:2]] == [Usage.HOST, Usage.SIGNING]
    assert entries[2].revoked_at == NOW


def test_a_line_cut_by_a_crash_is_dropped(ca: Authority) -> None:
    ca.issue("alpha", now=NOW)
    with (ca.directory / "index.jsonl").open("ab") as index:
        index.write(b'{"event":"issued","serial":"12')
    assert len(ca.entries(now=NOW)) == 2
    ca.issue("beta", now=NOW)
    assert [entry.name for entry in ca.entries(now=NOW)] == ["alpha", "alpha", "beta", "beta"]


def test_a_revocation_cut_short_is_finished_by_the_next_crl(ca: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    issued = ca.issue("alpha", now=NOW)

    def crash(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Authority, "_publish", crash)
        with pytest.raises(OSError, match="no space"):
            ca.revoke("alpha", now=NOW)
    ca.publish_crl(now=NOW)
    assert {entry.serial_number for entry in load_crl(issued.directory / "crl.pem")} == {
        issued.host_serial,
        issued.signing_serial,
    }


def test_a_certificate_is_known_before_any_file_of_it_exists(ca: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("crypto.pki.write_private", crash)
        with pytest.raises(OSError, match="no space"):
            ca.issue("alpha", now=NOW)
    assert len(ca.revoke("alpha", now=NOW).serials) == 2


def test_processes_at_once_lose_nothing(ca: Authority) -> None:
    script = (
        "import sys; from datetime import UTC, datetime; from pathlib import Path; from crypto.pki import Authority\n"
        "for n in range(4):\n"
        "    Authority.open(Path(sys.argv[1])).issue(f'{sys.argv[2]}{n}', now=datetime.fromisoformat(sys.argv[3]))\n"
    )
    arguments = [sys.executable, "-c", script, str(ca.directory)]
    processes = [subprocess.Popen([*arguments, prefix, NOW.isoformat()]) for prefix in "abcd"]
    assert [process.wait(timeout=50) for process in processes] == [0, 0, 0, 0]
    entries = ca.entries(now=NOW)
    assert len(entries) == 4 * 4 * 2
    assert len({entry.serial for entry in entries}) == len(entries)
    for directory in {entry.directory for entry in entries}:
        Identity.load(directory, now=NOW)

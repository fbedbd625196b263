"""Every way an identity can be out of order has an error of its own, with a remedy, before anything is done with it."""

import base64
import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto.errors import (
    CertificateMalformed,
    CrlExpired,
    CrlMalformed,
    CrlMissing,
    IdentityError,
    IdentityExpired,
    IdentityMalformed,
    IdentityMismatch,
    IdentityMissing,
    IdentityPermissions,
    IdentityRevoked,
    IdentityUntrusted,
)
from crypto.identity import IDENTITY_FILES, Identity, peer_name
from crypto.pki import Authority

NOW = datetime(2031, 5, 17, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a CA `ca` and its identities `alpha` and `beta`; never changed."""
    directory = tmp_path_factory.mktemp("identities")
    ca = Authority.create(directory / "ca", now=NOW)
    ca.issue("alpha", now=NOW, out=directory / "alpha")
    ca.issue("beta", now=NOW, out=directory / "beta")
    return directory


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    """A CA of this test's own."""
    return Authority.create(tmp_path / "ca", now=NOW)


@pytest.fixture
def alpha(pair: Path, tmp_path: Path) -> Path:
    """A copy of alpha's identity that a test may spoil."""
    return Path(shutil.copytree(pair / "alpha", tmp_path / "alpha"))


def refused(directory: Path, error: type[IdentityError], *, now: datetime = NOW) -> IdentityError:
    """Loading fails with exactly this error, and says what to do."""
    with pytest.raises(IdentityError) as caught:
        Identity.load(directory, now=now)
    assert type(caught.value) is error
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_a_good_identity_holds(pair: Path) -> None:
    identity = Identity.load(pair / "alpha", now=NOW)
    spki = identity.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert identity.name == "alpha"
    assert identity.directory == pair / "alpha"
    assert identity.spki_sha256 == hashlib.sha256(spki).digest()
    assert identity.private_key.public_key() == identity.certificate.public_key()
    signed = identity.signing_key.sign(b"receipt")
    assert identity.signing_key.verify_key.verify(signed) == b"receipt"


def test_repr_shows_no_key(pair: Path) -> None:
    text = repr(Identity.load(pair / "alpha", now=NOW))
    assert "private_key" not in text
    assert "signing_key" not in text


def test_it_cannot_be_changed(pair: Path) -> None:
    identity = Identity.load(pair / "alpha", now=NOW)
    with pytest.raises(AttributeError):
        identity.name = "beta"  # type: ignore[misc]


def test_now_needs_a_time_zone(pair: Path) -> None:
    with pytest.raises(ValueError, match="aware"):
        Identity.load(pair / "alpha", now=datetime(2031, 5, 17))  # noqa: DTZ001 - the point of the test


# ------------------------------------------------------------------ files


def test_no_directory(tmp_path: Path) -> None:
    assert "pki issue" in refused(tmp_path / "nowhere", IdentityMissing).remedy


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file", IdentityMissing)


@pytest.mark.parametrize("file", IDENTITY_FILES)
def test_a_file_is_missing(alpha: Path, file: str) -> None:
    (alpha / file).unlink()
    error = refused(alpha, CrlMissing if file == "crl.pem" else IdentityMissing)
    assert file in str(error)


@pytest.mark.parametrize("file", IDENTITY_FILES)
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_cannot_be_read(alpha: Path, file: str) -> None:
    (alpha / file).chmod(0)
    assert "cannot be read" in str(refused(alpha, IdentityMissing))


@pytest.mark.parametrize("file", ["host.key", "signing.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o644])
def test_a_key_that_others_can_reach(alpha: Path, file: str, mode: int) -> None:
    (alpha / file).chmod(mode)
    error = refused(alpha, IdentityPermissions)
    assert f"{mode:04o}" in str(error)
    assert f"chmod 600 {alpha / file}" in error.remedy


@pytest.mark.parametrize("file", IDENTITY_FILES)
def test_a_fifo_does_not_hang(alpha: Path, file: str) -> None:
    (alpha / file).unlink()
    os.mkfifo(alpha / file, 0o600)
    refused(alpha, CrlMalformed if file == "crl.pem" else IdentityMalformed)


@pytest.mark.parametrize("file", IDENTITY_FILES)
def test_an_endless_file_is_not_read_to_its_end(alpha: Path, file: str) -> None:
    with (alpha / file).open("r+b") as handle:
        handle.truncate(64 * 1024**3)  # sparse
    refused(alpha, CrlMalformed if file == "crl.pem" else IdentityMalformed)


@pytest.mark.parametrize("file", IDENTITY_FILES)
@given(content=st.binary(max_size=300))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_in_any_file(alpha: Path, file: str, content: bytes) -> None:
    original = (alpha / file).read_bytes()
    (alpha / file).write_bytes(content)
    try:
        refused(alpha, CrlMalformed if file == "crl.pem" else IdentityMalformed)
    finally:
        (alpha / file).write_bytes(original)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # the library's word; the signature is refused anyway
@pytest.mark.parametrize("file", IDENTITY_FILES)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spoiled_pem_gives_a_documented_error_or_the_same_identity(
    alpha: Path, file: str, data: st.DataObject
) -> None:
    """One byte changed: line ends may vary, anything else is refused, and nothing else is ever raised."""
    original = (alpha / file).read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    spoiled = bytearray(original)
    spoiled[position] = data.draw(st.integers(0, 255))
    (alpha / file).write_bytes(bytes(spoiled))
    try:
        identity = Identity.load(alpha, now=NOW)
    except IdentityError as error:
        assert error.remedy  # noqa: PT017 - both ends are allowed
    else:
        assert identity.name == "alpha"
    finally:
        (alpha / file).write_bytes(original)


@pytest.mark.parametrize("file", ["host.crt", "signing.crt", "ca.crt"])
def test_two_certificates_in_one_file(alpha: Path, file: str) -> None:
    (alpha / file).write_bytes((alpha / file).read_bytes() * 2)
    assert "holds 2 certificates" in str(refused(alpha, IdentityMalformed))


def test_an_encrypted_key(alpha: Path) -> None:
    key = load_pem_private_key((alpha / "host.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass"))
    (alpha / "host.key").write_bytes(locked)
    assert "unencrypted" in str(refused(alpha, IdentityMalformed))


def test_a_signing_key_of_a_wrong_length(alpha: Path) -> None:
    """Found by fuzzing: this one got past the library's parser and failed inside OpenSSL."""
    inner = der(0x04, der(0x04, bytes(30)))
    content = der(0x30, bytes.fromhex("020100") + der(0x30, bytes.fromhex("06032b6570")) + inner)
    (alpha / "signing.key").write_bytes(pem("PRIVATE KEY", content))
    refused(alpha, IdentityMalformed)


# ------------------------------------------------------------------ what belongs together


@pytest.mark.parametrize("file", ["host.key", "signing.key"])
def test_a_key_of_another_host(pair: Path, alpha: Path, file: str) -> None:
    shutil.copy(pair / "beta" / file, alpha / file)
    refused(alpha, IdentityMismatch)


def test_certificates_of_two_hosts(pair: Path, alpha: Path) -> None:
    for file in ("signing.crt", "signing.key"):
        shutil.copy(pair / "beta" / file, alpha / file)
    assert "different hosts" in str(refused(alpha, IdentityMismatch))


@pytest.mark.parametrize(("target", "source"), [("host", "signing"), ("signing", "host")])
def test_a_certificate_in_the_place_of_the_other(alpha: Path, target: str, source: str) -> None:
    for suffix in ("crt", "key"):
        shutil.copy(alpha / f"{source}.{suffix}", alpha / f"{target}.{suffix}")
    refused(alpha, IdentityUntrusted)


@pytest.mark.parametrize(("target", "source"), [("host", "signing"), ("signing", "host")])
def test_a_key_in_the_place_of_the_other(alpha: Path, target: str, source: str) -> None:
    shutil.copy(alpha / f"{source}.key", alpha / f"{target}.key")
    refused(alpha, IdentityMalformed)


def test_the_ca_of_somebody_else_with_the_same_name(alpha: Path, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", now=NOW)
    shutil.copy(other.directory / "ca.crt", alpha / "ca.crt")
    refused(alpha, IdentityUntrusted)


def test_a_host_certificate_in_the_place_of_the_ca(alpha: Path) -> None:
    shutil.copy(alpha / "host.crt", alpha / "ca.crt")
    assert "not a CA" in str(refused(alpha, IdentityUntrusted))


# ------------------------------------------------------------------ time


@pytest.mark.parametrize("days", [-1, 398, 5000])
def test_outside_its_time(alpha: Path, days: int) -> None:
    refused(alpha, IdentityExpired, now=NOW + timedelta(days=days))


def test_validity_to_the_second(ca: Authority) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    ca.publish_crl(now=NOW, days=1000)
    end = Identity.load(directory, now=NOW).certificate.not_valid_after_utc
    assert Identity.load(directory, now=end).name == "alpha"
    refused(directory, IdentityExpired, now=end + timedelta(seconds=1))


# ------------------------------------------------------------------ the CRL


def test_an_expired_crl(alpha: Path) -> None:
    error = refused(alpha, CrlExpired, now=NOW + timedelta(days=31))
    assert "pki crl" in error.remedy


def test_a_crl_from_the_future(ca: Authority) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    ca.publish_crl(now=NOW + timedelta(hours=1))
    assert "clock" in refused(directory, CrlExpired).remedy


def test_a_crl_of_another_ca(alpha: Path, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", now=NOW)
    shutil.copy(other.directory / "crl.pem", alpha / "crl.pem")
    assert "not signed" in str(refused(alpha, CrlMalformed))


def test_a_crl_without_an_end(ca: Authority) -> None:
    """RFC 5280 §5.1.2.5 demands nextUpdate; without it a list could be withheld for ever."""
    directory = ca.issue("alpha", now=NOW).directory
    crl = x509.load_pem_x509_crl((directory / "crl.pem").read_bytes())
    content = crl.tbs_certlist_bytes.replace(der(0x17, f"{crl.next_update_utc:%y%m%d%H%M%SZ}".encode()), b"")
    assert len(content) == len(crl.tbs_certlist_bytes) - 15
    tbs = der(0x30, content[content[1] - 0x80 + 2 if content[1] & 0x80 else 2 :])
    signature = ca_key(ca).sign(tbs, ec.ECDSA(hashes.SHA256()))
    algorithm = der(0x30, bytes.fromhex("06082a8648ce3d040302"))  # ecdsa-with-SHA256, RFC 5758 §3.2
    endless = x509.load_der_x509_crl(der(0x30, tbs + algorithm + der(0x03, b"\0" + signature)))
    assert endless.next_update_utc is None
    (directory / "crl.pem").write_bytes(endless.public_bytes(Encoding.PEM))
    assert "when it ends" in str(refused(directory, CrlMalformed))


@pytest.mark.parametrize("which", ["certificate", "signing_certificate"])
def test_one_of_the_two_revoked(ca: Authority, which: str) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    serial = getattr(Identity.load(directory, now=NOW), which).serial_number
    entry = x509.RevokedCertificateBuilder(serial_number=serial, revocation_date=NOW).build()
    crl = (
        x509.CertificateRevocationListBuilder(issuer_name=ca.certificate.subject)
        .last_update(NOW)
        .next_update(NOW + timedelta(days=1))
        .add_revoked_certificate(entry)
        .sign(ca_key(ca), hashes.SHA256())
    )
    (directory / "crl.pem").write_bytes(crl.public_bytes(Encoding.PEM))
    refused(directory, IdentityRevoked)


def test_revoked_through_the_ca(ca: Authority) -> None:
    directory = ca.issue("alpha", now=NOW).directory
    ca.revoke("alpha", now=NOW)
    refused(directory, IdentityRevoked)


def ca_key(ca: Authority) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key((ca.directory / "ca.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def pem(label: str, content: bytes) -> bytes:
    """RFC 7468 §2."""
    body = base64.encodebytes(content).decode()
    return f"-----BEGIN {label}-----\n{body}-----END {label}-----\n".encode()


def der(tag: int, content: bytes) -> bytes:
    """One DER element (X.690 §8.1) of less than 64 KiB."""
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    if length < 0x100:
        return bytes([tag, 0x81, length]) + content
    return bytes([tag, 0x82]) + length.to_bytes(2) + content


# ------------------------------------------------------------------ the name


def certificate_with(names: list[x509.GeneralName] | None) -> x509.Certificate:
    """Self-signed: `peer_name` says nothing about trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([])
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, NOW, NOW + timedelta(days=1))
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(key, hashes.SHA256())


URI: Callable[[str], x509.GeneralName] = x509.UniformResourceIdentifier


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        [x509.DNSName("alpha")],
        [URI("https://host/alpha")],
        [URI("korora://host/alpha"), URI("korora://host/beta")],
        [URI("korora://host/alpha"), URI("korora://host/alpha")],
        [URI("korora://host/alpha"), URI("KORORA://host/beta")],
        [URI("korora://host/alpha"), URI("korora:beta")],
        [URI("korora://host/")],
        [URI("korora://host/a/b")],
        [URI("korora://host/alpha\n")],
        [URI("korora://host/alpha?x")],
        [URI("korora://host/%61lpha")],
        [URI("korora://HOST/alpha")],
        [URI("Korora://host/alpha")],
        [URI("korora://user/alpha")],
        [URI("korora://host/" + "a" * 64)],
    ],
    ids=repr,
)
def test_no_single_good_name(names: list[x509.GeneralName] | None) -> None:
    with pytest.raises(CertificateMalformed):
        peer_name(certificate_with(names))


def test_other_names_beside_it_do_not_matter() -> None:
    names = [x509.DNSName("beta"), URI("https://host/gamma"), URI("korora://host/alpha")]
    assert peer_name(certificate_with(names)) == "alpha"


@given(path=st.text(alphabet=st.characters(min_codepoint=0, max_codepoint=127), max_size=80))
@settings(max_examples=40, deadline=None)
def test_any_uri_gives_its_name_or_the_documented_error(path: str) -> None:
    certificate = certificate_with([URI(f"korora://host/{path}")])
    with contextlib.suppress(CertificateMalformed):
        assert peer_name(certificate) == path

"""The throwaway certificates: keys nobody else can read, chains that hold."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bench.certificates import make_qemu_credentials, make_self_signed


def load(path: Path) -> x509.Certificate:
    """The certificate in a PEM file."""
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize(
    ("role", "purpose"),
    [("server", ExtendedKeyUsageOID.SERVER_AUTH), ("client", ExtendedKeyUsageOID.CLIENT_AUTH)],
)
def test_qemus_files_have_the_names_and_purposes_it_looks_for(
    role: str, purpose: x509.ObjectIdentifier, tmp_path: Path
) -> None:
    folder = make_qemu_credentials(tmp_path)
    authority, certificate = load(folder / "ca-cert.pem"), load(folder / f"{role}-cert.pem")
    certificate.verify_directly_issued_by(authority)
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert stat.S_IMODE((folder / f"{role}-key.pem").stat().st_mode) == 0o600


def test_both_kinds_are_made_once(tmp_path: Path) -> None:
    path = make_self_signed(tmp_path)
    first = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert make_self_signed(tmp_path).read_bytes() == first
    folder = make_qemu_credentials(tmp_path)
    key = (folder / "server-key.pem").read_bytes()
    assert (make_qemu_credentials(tmp_path) / "server-key.pem").read_bytes() == key

"""Who signed: believed only under the CA and at the time, and never for somebody else's session."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from crypto.errors import LogUnusable, ReceiptMalformed, SignatureInvalid, SignatureMissing, SignerUntrusted
from crypto.identity import Identity
from crypto.pki import Authority
from crypto.receipts import signers as signers_module
from crypto.receipts.dsse import countersign, keyid, sign
from crypto.receipts.limits import CERTIFICATE_BYTES_MAX
from crypto.receipts.receipt import examine
from crypto.receipts.signers import Signers, Trust, read_signer, verified_signer
from crypto.receipts.statement import Stage, build
from tests.crypto.receipts.making import ALPHA, BETA, STRANGER, Known, predicate, receipt, statement

NOW = datetime(2031, 5, 17, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    ca = Authority.create(tmp_path_factory.mktemp("signers") / "ca", now=NOW)
    return Identity.load(ca.issue("alpha", now=NOW).directory, now=NOW)


def der_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def test_a_good_certificate_gives_the_key_and_its_host(alpha: Identity) -> None:
    signer = verified_signer(der_of(alpha.signing_certificate), alpha.ca, alpha.crl, NOW, "alpha")
    assert (signer.name, signer.key) == ("alpha", alpha.signing_key.verify_key)
    assert signer.keyid == keyid(alpha.signing_key.verify_key)
    assert verified_signer(signer.der, alpha.ca, None, NOW, "") == signer


def test_another_ca_host_usage_or_time_is_refused(alpha: Identity, tmp_path: Path) -> None:
    good = der_of(alpha.signing_certificate)
    other = Authority.create(tmp_path / "other", now=NOW).certificate
    cases = [
        (good, other, NOW, "alpha", "not issued by the CA"),
        (good, alpha.ca, NOW, "beta", "of alpha, expected beta"),
        (good, alpha.ca, NOW - timedelta(days=1), "alpha", "not valid at 2031-05-16"),
        (good, alpha.ca, NOW + timedelta(days=1000), "alpha", "not valid at"),
        (der_of(alpha.certificate), alpha.ca, NOW, "alpha", "not for signing"),
        (der_of(alpha.ca), alpha.ca, NOW, "alpha", "not a signing certificate"),
        (good[:-1], alpha.ca, NOW, "alpha", "not a signing certificate"),
        (b"", alpha.ca, NOW, "alpha", "not a signing certificate"),
        (good + bytes(CERTIFICATE_BYTES_MAX), alpha.ca, NOW, "alpha", "allowed"),
    ]
    for der, ca, now, name, match in cases:
        with pytest.raises(SignerUntrusted, match=match):
            verified_signer(der, ca, alpha.crl, now, name)


def test_a_revoked_certificate_counts_for_what_was_signed_before(tmp_path: Path) -> None:
    ca = Authority.create(tmp_path / "ca", now=NOW)
    identity = Identity.load(ca.issue("alpha", now=NOW).directory, now=NOW)
    ca.revoke("alpha", now=NOW + timedelta(days=10))
    crl = x509.load_pem_x509_crl((tmp_path / "ca" / "crl.pem").read_bytes())
    der = der_of(identity.signing_certificate)
    assert verified_signer(der, ca.certificate, crl, NOW + timedelta(days=9), "alpha").name == "alpha"
    with pytest.raises(SignerUntrusted, match="was revoked at 2031-05-27"):
        verified_signer(der, ca.certificate, crl, NOW + timedelta(days=11), "alpha")


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # serials below zero
def test_no_altered_byte_of_a_certificate_is_believed(alpha: Identity) -> None:
    good = der_of(alpha.signing_certificate)
    signed = alpha.signing_certificate.tbs_certificate_bytes
    end = good.index(signed) + len(signed)
    for place in range(len(good)):
        altered = good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]
        try:
            signer = verified_signer(altered, alpha.ca, alpha.crl, NOW, "alpha")
        except SignerUntrusted:
            continue
        # The one byte that may say something else counts the bits that its signature leaves unused.
        assert place >= end, place
        assert signer.certificate.tbs_certificate_bytes == signed


def test_certificates_are_kept_and_read_back(alpha: Identity, tmp_path: Path) -> None:
    kept = Signers(tmp_path / "receipts")
    assert list(kept.all()) == []
    signer = kept.keep(der_of(alpha.signing_certificate))
    assert kept.keep(signer.der) == signer
    assert kept.get(signer.keyid) == signer
    assert list(kept.all()) == [signer]
    assert kept.get("0" * 64) is None
    path = kept.folder / f"{signer.keyid}.der"
    path.rename(kept.folder / f"{'1' * 64}.der")
    with pytest.raises(SignerUntrusted, match="holds the key"):
        kept.get("1" * 64)
    path.write_bytes(b"x" * (CERTIFICATE_BYTES_MAX + 1))
    with pytest.raises(SignerUntrusted, match="larger"):
        kept.get(signer.keyid)
    assert kept.keep(signer.der) == signer  # written anew
    for _ in range(2):
        path.unlink()  # also behind the back of a process that has seen it there
        kept.keep(signer.der)
        assert kept.get(signer.keyid) == signer


def test_certificates_do_not_fill_the_disk(alpha: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signers_module, "SIGNERS_MAX", 0)
    with pytest.raises(LogUnusable, match="holds 0 certificates"):
        Signers(tmp_path).keep(der_of(alpha.signing_certificate))


# ---- receipts


def test_a_receipt_tells_who_has_signed() -> None:
    told = examine(receipt(), Known())
    assert told.signed == {"alpha", "beta"}
    assert (told.missing, told.unknown) == ((), ())
    told = examine(countersign(sign(statement(), BETA), STRANGER), Known())
    assert (told.signed, told.missing, told.unknown) == ({"beta"}, ("alpha",), (keyid(STRANGER.verify_key),))


def test_who_must_sign_at_which_stage() -> None:
    trust = Known()
    examine(sign(statement(stage=Stage.OFFER), ALPHA), trust)
    examine(sign(statement(), BETA), trust)
    for envelope, missing in (
        (sign(statement(stage=Stage.OFFER), BETA), "alpha"),
        (sign(statement(stage=Stage.TRANSFER), ALPHA), "beta"),
        (sign(statement(stage=Stage.TRANSFER), BETA), "alpha"),
        (sign(statement(), STRANGER), "any host"),
    ):
        with pytest.raises(SignatureMissing, match=missing):
            examine(envelope, trust)


def test_a_host_cannot_sign_for_sessions_of_others() -> None:
    content = build(msgspec.structs.replace(predicate(), destination=predicate().source), {})
    with pytest.raises(SignerUntrusted, match="beta, who has no part"):
        examine(countersign(sign(content, ALPHA), BETA), Known())


def test_a_signature_that_does_not_hold_is_never_passed_over() -> None:
    envelope = receipt()
    forged = replace(envelope, signatures=(envelope.signatures[0], replace(envelope.signatures[1], sig=bytes(64))))
    with pytest.raises(SignatureInvalid):
        examine(forged, Known())


def test_a_time_that_is_none_is_refused() -> None:
    content = build(msgspec.structs.replace(predicate(), started="2026-13-02T03:04:05.678+00:00"), {})
    with pytest.raises(ReceiptMalformed, match="a time"):
        examine(sign(content, ALPHA), Known())


def test_carried_certificates_are_believed_only_under_the_ca_and_at_the_time(alpha: Identity, tmp_path: Path) -> None:
    signer = read_signer(der_of(alpha.signing_certificate))
    trust = Trust(carried=[signer], ca=alpha.ca)
    assert trust.signer(signer.keyid, NOW) == signer
    assert trust.keys("alpha") == (signer.key,)
    assert trust.keys("beta") == ()
    with pytest.raises(SignerUntrusted):
        trust.signer(signer.keyid, NOW - timedelta(days=1))
    without = Trust(carried=[signer])
    assert without.signer(signer.keyid, NOW) is None
    assert without.keys("alpha") == ()
    assert Trust(believed=[signer]).signer(signer.keyid, NOW - timedelta(days=1)) == signer
    stranger = Trust(carried=[signer], ca=Authority.create(tmp_path / "other", now=NOW).certificate)
    assert stranger.keys("alpha") == ()
    with pytest.raises(SignerUntrusted, match="not issued by the CA"):
        stranger.signer(signer.keyid, NOW)

"""A real TPM (swtpm) attests, is enrolled, and is left as it was found."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tpms import SoftTpm, soft_tpm
from crypto.attestation.endorsement import challenge
from crypto.attestation.quote import verify_quote
from crypto.attestation.structures import Alg, Public, Selection
from crypto.errors import TpmUnusable
from korora.agents.vtpm import tcti
from korora.agents.vtpm.tcti import Tpm

SELECTION = Selection.of({"sha1": (0,), "sha256": range(24)})


@pytest.fixture(scope="module")
def swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftTpm]:
    with soft_tpm(tmp_path_factory.mktemp("tpm")) as running:
        yield running


def transient(swtpm: SoftTpm) -> list[int]:
    """Handles of objects and sessions that are loaded."""
    tpm = Tpm(swtpm.tcti)
    with tpm._open() as opened:
        return [int(each) for first in (0x80000000, 0x02000000, 0x03000000) for each in tcti._handles(opened, first)]


def test_it_quotes_what_it_has(swtpm: SoftTpm) -> None:
    tpm = Tpm(swtpm.tcti)
    before = tpm.attest(b"q" * 32, SELECTION, hpke_public=b"key")
    tpm.extend(16, b"x" * 32)
    after = tpm.attest(b"q" * 32, SELECTION)
    for shown in (before, after):
        arguments = {"qualifying": b"q" * 32, "selection": SELECTION, "pcrs": shown.pcrs}
        verify_quote(shown.quote, shown.signature, shown.ak_public, **arguments)  # type: ignore[arg-type]
    assert before.hpke_public == b"key"
    changed = [index for index in range(24) if before.pcrs["sha256"][index] != after.pcrs["sha256"][index]]
    assert changed == [16]
    assert transient(swtpm) == []


@pytest.mark.parametrize("kind", [Alg.ECC, Alg.RSA])
def test_a_challenge_opens_in_this_tpm_alone(
    swtpm: SoftTpm, kind: Alg, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which endorsement key is taken goes by its certificate; here by us, so that both kinds are tried."""
    monkeypatch.setattr(tcti, "_endorsement", lambda tpm: (kind, b""))
    tpm = Tpm(swtpm.tcti)
    shown = tpm.show()
    endorsement, attestation = Public.parse(shown.endorsement), Public.parse(shown.ak)
    assert endorsement.kind is kind
    made = challenge(endorsement, attestation)
    assert tpm.answer(made.blob, made.seed) == made.secret
    with pytest.raises(TpmUnusable):
        tpm.answer(made.blob[:-1] + bytes([made.blob[-1] ^ 1]), made.seed)
    with soft_tpm(tmp_path) as other:
        with pytest.raises(TpmUnusable):
            Tpm(other.tcti).answer(made.blob, made.seed)
        theirs = Tpm(other.tcti).show()
        assert theirs.ak != shown.ak
        mixed = challenge(endorsement, Public.parse(theirs.ak))  # their key, said to be in our TPM
    with pytest.raises(TpmUnusable):
        tpm.answer(mixed.blob, mixed.seed)
    assert transient(swtpm) == []


def test_a_key_that_is_kept_is_the_same(swtpm: SoftTpm) -> None:
    tpm = Tpm(swtpm.tcti)
    derived = tpm.show().ak
    tpm.keep()
    tpm.keep()
    assert tpm.show().ak == derived
    shown = tpm.attest(b"q" * 32, SELECTION)
    assert shown.ak_public == derived


def test_logs_go_along_where_they_are_wanted(swtpm: SoftTpm, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a log")
    tpm = Tpm(swtpm.tcti, event_log=tmp_path / "log", ima=tmp_path / "none")
    assert tpm.attest(b"q" * 32, SELECTION).event_log == b""
    shown = tpm.attest(b"q" * 32, SELECTION, event_log=True, ima=True)
    assert (shown.event_log, shown.ima) == (b"a log", b"")


@pytest.mark.parametrize("where", ["swtpm:host=127.0.0.1,port=1", "device:/dev/null/none", "nothing:"])
def test_no_tpm(where: str) -> None:
    with pytest.raises(TpmUnusable):
        Tpm(where).attest(b"q" * 32, SELECTION)


def test_a_bank_that_it_has_not(swtpm: SoftTpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPM answers such a selection by leaving the bank out."""
    monkeypatch.setitem(tcti.__dict__, "_tpm_selection", lambda _: _without_banks())
    with pytest.raises(TpmUnusable, match="no bank"):
        Tpm(swtpm.tcti).attest(b"q" * 32, Selection.of({"sha512": (0,)}))


def _without_banks() -> object:
    from tpm2_pytss.types import TPML_PCR_SELECTION

    return TPML_PCR_SELECTION()


def test_a_tpm_that_hangs_holds_nobody_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPM may never answer; who waits for its turn behind that is told after a while."""
    monkeypatch.setattr(tcti, "TURN_SECONDS_MAX", 0.2)
    tpm = Tpm("swtpm:host=127.0.0.1,port=1")
    with tpm._lock, pytest.raises(TpmUnusable, match="another session"):
        tpm.attest(b"q" * 32, SELECTION)
    with pytest.raises(TpmUnusable, match="does not answer"):  # its turn is given back
        tpm.attest(b"q" * 32, SELECTION)
    with pytest.raises(TpmUnusable, match="does not answer"):
        tpm.attest(b"q" * 32, SELECTION)

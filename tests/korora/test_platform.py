"""This host's platform with a real TPM: one session's evidence is nothing in another, and a TPM does not go back."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.tpms import SoftTpm, soft_tpm
from crypto.attestation.binding import Binding, Side
from crypto.attestation.reference import Reference, render
from crypto.errors import AttestationMissing, PlatformUnknown, QuoteInvalid, ReferenceInvalid
from crypto.keys import SessionId
from korora.agents.vtpm.tcti import Tpm
from korora.platform import HostPlatform, open_platform
from proxy.control import Bank, Wanted

WANTED = Wanted((Bank("sha256", (0, 7)),))
BINDING = Binding(b"e" * 32, SessionId(b"s" * 16), Side.SOURCE, b"n" * 32)


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[SoftTpm]:
    with soft_tpm(tmp_path / "tpm") as running:
        yield running


@pytest.fixture
def references(tmp_path: Path, swtpm: SoftTpm) -> Path:
    folder = tmp_path / "references"
    folder.mkdir()
    tpm = Tpm(swtpm.tcti)
    tpm.keep()
    reference = Reference("beta", tpm.show().ak, "00", pcrs={"sha256": {0: ZERO, 7: ZERO}})
    (folder / "beta.toml").write_text(render(reference))
    return folder


ZERO = frozenset({bytes(32)})


def test_evidence_that_was_recorded(swtpm: SoftTpm, references: Path) -> None:
    attests, judges = open_platform(swtpm.tcti, None), open_platform("", references)
    assert judges.demands("beta") == WANTED
    recorded = attests.attest(BINDING, WANTED)
    proved = judges.appraise("beta", recorded, BINDING)
    assert proved.attested.startswith("tpm2 ak 000b")
    for other in (
        replace(BINDING, session=SessionId(b"t" * 16)),
        replace(BINDING, exporter=b"f" * 32),
        replace(BINDING, nonce=b"m" * 32),
        replace(BINDING, side=Side.DESTINATION),
    ):
        with pytest.raises(QuoteInvalid):
            judges.appraise("beta", recorded, other)


def test_a_key_that_the_tpm_vouches_for(swtpm: SoftTpm, references: Path) -> None:
    binding = replace(BINDING, hpke_public=b"a key")
    shown = open_platform(swtpm.tcti, None).attest(binding, WANTED)
    assert open_platform("", references).appraise("beta", shown, BINDING).hpke_public == b"a key"


def test_hosts_without_a_tpm_or_a_file(references: Path, tmp_path: Path) -> None:
    judges = open_platform("", references)
    with pytest.raises(AttestationMissing):
        judges.appraise("beta", open_platform("", references).attest(BINDING, WANTED), BINDING)
    with pytest.raises(PlatformUnknown):
        judges.demands("gamma")
    with pytest.raises(ReferenceInvalid):
        open_platform("", tmp_path / "nowhere")


def test_an_older_state_of_the_tpm(tmp_path: Path, references: Path, swtpm: SoftTpm) -> None:
    """A copy of its state from before a reset, started beside it: keys and PCRs are the same."""
    judges = open_platform("", references)
    swtpm.process.terminate()
    swtpm.process.wait(10)
    shutil.copytree(tmp_path / "tpm", tmp_path / "copy")
    for _ in range(2):
        with soft_tpm(tmp_path / "tpm") as later:
            judges.appraise("beta", HostPlatform(Tpm(later.tcti), None).attest(BINDING, WANTED), BINDING)
    with soft_tpm(tmp_path / "copy") as older:
        shown = HostPlatform(Tpm(older.tcti), None).attest(BINDING, WANTED)
        with pytest.raises(QuoteInvalid) as refusal:
            judges.appraise("beta", shown, BINDING)
        assert "gone back" in refusal.value.told
        open_platform("", references).appraise("beta", shown, BINDING)  # whoever has not seen it cannot know

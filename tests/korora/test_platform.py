"""This host's platform with a real TPM: one session's evidence is nothing in another, and a TPM does not go back."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.tpms import SoftTpm, soft_tpm
from crypto.attestation import evidence as messages
from crypto.attestation.binding import Binding, Side
from crypto.attestation.reference import Reference, render
from crypto.attestation.structures import Clock, Quote
from crypto.errors import AttestationMissing, PlatformUnknown, QuoteInvalid, ReferenceInvalid
from crypto.keys import SessionId
from korora.agents.vtpm.tcti import Tpm
from korora.clocks import Clocks
from korora.platform import HostPlatform, open_platform
from proxy.attestation import Demand
from proxy.control import Bank, Wanted

WANTED = Wanted((Bank("sha256", (0, 7)),))
DEMAND = Demand(WANTED)
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
    assert judges.demands("beta") == DEMAND
    recorded = attests.attest(BINDING, WANTED)
    proved = judges.appraise("beta", recorded, BINDING, DEMAND)
    assert proved.attested.startswith("tpm2 ak 000b")
    for other in (
        replace(BINDING, session=SessionId(b"t" * 16)),
        replace(BINDING, exporter=b"f" * 32),
        replace(BINDING, nonce=b"m" * 32),
        replace(BINDING, side=Side.DESTINATION),
    ):
        with pytest.raises(QuoteInvalid):
            judges.appraise("beta", recorded, other, DEMAND)


def test_a_key_that_the_tpm_vouches_for(swtpm: SoftTpm, references: Path) -> None:
    binding = replace(BINDING, hpke_public=b"a key")
    shown = open_platform(swtpm.tcti, None).attest(binding, WANTED)
    assert open_platform("", references).appraise("beta", shown, BINDING, DEMAND).hpke_public == b"a key"


def test_hosts_without_a_tpm_or_a_file(references: Path, tmp_path: Path) -> None:
    judges = open_platform("", references)
    with pytest.raises(AttestationMissing):
        judges.appraise("beta", open_platform("", references).attest(BINDING, WANTED), BINDING, DEMAND)
    with pytest.raises(PlatformUnknown):
        judges.demands("gamma")
    with pytest.raises(ReferenceInvalid):
        open_platform("", tmp_path / "nowhere")


def judged(judges: HostPlatform, tpm: SoftTpm) -> None:
    """One session of its host."""
    demand = judges.demands("beta")
    assert demand is not None
    judges.appraise("beta", HostPlatform(Tpm(tpm.tcti), None).attest(BINDING, WANTED), BINDING, demand)


@pytest.mark.parametrize("started_again", [False, True])
def test_an_older_state_of_the_tpm(tmp_path: Path, references: Path, swtpm: SoftTpm, started_again: bool) -> None:
    """A copy of its state from before a reset, started beside it: keys and PCRs are the same."""
    state = tmp_path / "state"
    judges = open_platform("", references, state=state)
    swtpm.process.terminate()
    swtpm.process.wait(10)
    shutil.copytree(tmp_path / "tpm", tmp_path / "copy")
    for _ in range(2):
        with soft_tpm(tmp_path / "tpm") as later:
            judged(judges, later)
    if started_again:
        judges = open_platform("", references, state=state)
    with soft_tpm(tmp_path / "copy") as older:
        with pytest.raises(QuoteInvalid) as refusal:
            judged(judges, older)
        assert "gone back" in refusal.value.told
        judged(open_platform("", references), older)  # whoever has not seen it cannot know
    (kept,) = (state / "attested").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600


def test_quotes_of_sessions_that_begin_together_are_judged_in_any_order(
    references: Path, swtpm: SoftTpm, tmp_path: Path
) -> None:
    """But none that was made before it was asked for, not by a millisecond."""
    judges, attests = open_platform("", references, state=tmp_path), HostPlatform(Tpm(swtpm.tcti), None)
    together = [judges.demands("beta") for _ in range(3)]
    shown = []
    for _ in together:
        shown.append(attests.attest(BINDING, WANTED))
        clock = Quote.parse(messages.decode(shown[-1]).quote).clock.milliseconds
        while Quote.parse(messages.decode(attests.attest(BINDING, WANTED)).quote).clock.milliseconds == clock:
            pass  # its clock goes on in a millisecond
    for demand, evidence in zip(together, reversed(shown), strict=True):
        assert demand is not None
        judges.appraise("beta", evidence, BINDING, demand)
    later = judges.demands("beta")
    assert later is not None
    with pytest.raises(QuoteInvalid):
        judges.appraise("beta", shown[1], BINDING, later)
    judges.appraise("beta", shown[2], BINDING, later)


def test_a_clock_is_of_its_key(tmp_path: Path) -> None:
    """A host that was enrolled anew, by another TPM, begins anew; damage is told and not believed."""
    clocks = Clocks(tmp_path)
    assert clocks.known("beta", "000b" + "aa" * 32) is None
    clocks.saw("beta", "000b" + "aa" * 32, Clock(9, 5, 1, safe=True))
    clocks.saw("beta", "000b" + "aa" * 32, Clock(8, 5, 1, safe=True))  # another session's, judged later
    again = Clocks(tmp_path)
    assert again.known("beta", "000b" + "aa" * 32) == Clock(9, 5, 1, safe=True)
    assert again.known("beta", "000b" + "bb" * 32) is None
    again.saw("beta", "000b" + "bb" * 32, Clock(1, 1, 0, safe=True))
    assert clocks.known("beta", "000b" + "bb" * 32) == Clock(1, 1, 0, safe=True)
    for damage in (b"", b"{}", b"x" * 1000):
        (tmp_path / "attested" / "beta").write_bytes(damage)
        assert clocks.known("beta", "000b" + "bb" * 32) is None

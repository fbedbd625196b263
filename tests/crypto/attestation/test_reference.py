"""What a host may be, and the judgement: one wrong PCR, event or file is named to the operator, and to nobody else."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.attestation import reference as references
from crypto.attestation.binding import Binding, Side
from crypto.attestation.evidence import Evidence
from crypto.attestation.reference import Files, Reference, appraise, load, parse, render
from crypto.attestation.structures import Clock
from crypto.errors import (
    AttestationError,
    AttestationMissing,
    EvidenceMalformed,
    PlatformChanged,
    PlatformUnknown,
    QuoteInvalid,
    ReferenceInvalid,
)
from crypto.keys import SessionId
from tests.crypto.attestation.samples import Signer, quote_of
from tests.crypto.attestation.test_logs import LIST, SPEC, event, measured, old

SIGNER = Signer()
BINDING = Binding(b"e" * 32, SessionId(b"s" * 16), Side.DESTINATION, b"n" * 32)
PCRS = {"sha256": {0: b"\x01" * 32, 7: b"\x07" * 32}}
REFERENCE = Reference(
    host="beta",
    ak=SIGNER.public,
    endorsement="ab" * 32,
    endorsed_by=('CN="quoted"\\',),
    enrolled="2026-11-26T09:00:00Z",
    pcrs={"sha256": {0: frozenset({b"\x01" * 32, b"\x02" * 32}), 7: frozenset({b"\x07" * 32})}},
)


def evidence(pcrs: dict[str, dict[int, bytes]] = PCRS, signer: Signer = SIGNER, **more: Any) -> Evidence:
    binding = replace(BINDING, hpke_public=more.get("hpke_public", b""))
    quote = quote_of(pcrs, binding.qualifying())
    return Evidence("tpm2", signer.public, quote, signer.sign(quote), pcrs, **more)  # type: ignore[arg-type]


def test_a_host_that_is_what_it_may_be() -> None:
    found = appraise(evidence(hpke_public=b"a key"), expected=REFERENCE, binding=BINDING)
    assert (found.host, found.hpke_public) == ("beta", b"a key")
    assert found.proved == f"tpm2 ak {found.ak_name} pcrs sha256:0,7"


def test_a_changed_pcr_is_told_to_us_alone() -> None:
    changed = {"sha256": {**PCRS["sha256"], 7: b"\x08" * 32}}
    with pytest.raises(PlatformChanged) as refusal:
        appraise(evidence(changed), expected=REFERENCE, binding=BINDING)
    assert str(refusal.value) == "attestation failed"
    for part in ("PCR 7 of sha256", f"expected {'07' * 32}", f"seen {'08' * 32}"):
        assert part in refusal.value.told
    assert "PCR 0" not in refusal.value.told


def test_a_host_with_nothing_to_show() -> None:
    with pytest.raises(AttestationMissing):
        appraise(Evidence("none"), expected=REFERENCE, binding=BINDING)


def test_a_key_that_was_not_enrolled_for_this_host() -> None:
    with pytest.raises(PlatformUnknown):
        appraise(evidence(signer=Signer()), expected=REFERENCE, binding=BINDING)


@pytest.mark.parametrize(
    "elsewhere",
    [
        replace(BINDING, session=SessionId(b"t" * 16)),
        replace(BINDING, exporter=b"f" * 32),
        replace(BINDING, nonce=b"m" * 32),
        replace(BINDING, side=Side.SOURCE),
    ],
    ids=["session", "channel", "challenge", "reflected"],
)
def test_evidence_of_elsewhere(elsewhere: Binding) -> None:
    with pytest.raises(QuoteInvalid):
        appraise(evidence(), expected=REFERENCE, binding=elsewhere)


def test_a_key_to_wrap_to_that_was_put_in_on_the_way() -> None:
    true = evidence(hpke_public=b"a key")
    forged = Evidence(true.backend, true.ak_public, true.quote, true.signature, true.pcrs, hpke_public=b"mine")
    with pytest.raises(QuoteInvalid):
        appraise(forged, expected=REFERENCE, binding=BINDING)


def test_a_tpm_that_has_gone_back() -> None:
    with pytest.raises(QuoteInvalid):
        appraise(evidence(), expected=REFERENCE, binding=BINDING, earlier=Clock(5, 4, 0, safe=True))


def chain(*parts: bytes) -> bytes:
    value = bytes(32)
    for part in parts:
        value = hashlib.sha256(value + hashlib.sha256(part).digest()).digest()
    return value


LOG = old(0, 3, bytes(20), SPEC) + event(4, 0xD, b"loader") + event(4, 0xD, b"kernel")
EVENTS = replace(
    REFERENCE,
    events={"sha256": {4: frozenset(hashlib.sha256(one).digest() for one in (b"loader", b"kernel", b"new"))}},
)


def test_events_are_known_one_by_one() -> None:
    pcrs = {"sha256": {**PCRS["sha256"], 4: chain(b"loader", b"kernel")}}
    appraise(evidence(pcrs, event_log=LOG), expected=EVENTS, binding=BINDING)
    with pytest.raises(AttestationMissing):
        appraise(evidence(pcrs), expected=EVENTS, binding=BINDING)
    with pytest.raises(PlatformChanged) as another:  # a log of another boot
        appraise(evidence(pcrs, event_log=LOG + event(4, 0xD, b"new")), expected=EVENTS, binding=BINDING)
    assert "PCR 4" in another.value.told
    unknown = old(0, 3, bytes(20), SPEC) + event(4, 0xD, b"rootkit")
    pcrs["sha256"][4] = chain(b"rootkit")
    with pytest.raises(PlatformChanged) as refusal:
        appraise(evidence(pcrs, event_log=unknown), expected=EVENTS, binding=BINDING)
    assert hashlib.sha256(b"rootkit").hexdigest() in refusal.value.told


def files(*allowed: bytes, violations: bool = False) -> Reference:
    allow = tuple(f"sha256:{hashlib.sha256(each).hexdigest()}" for each in allowed)
    return replace(REFERENCE, files=Files(allow=allow, violations=violations))


def listed(data: bytes, count: int) -> Evidence:
    value = bytes(32)
    for entry in references.ima.parse(data)[:count]:
        by = b"\xff" * 32 if entry.violation else hashlib.sha256(entry.template).digest()
        value = hashlib.sha256(value + by).digest()
    return evidence({"sha256": {**PCRS["sha256"], 10: value}}, ima=data)


def test_measured_files() -> None:
    assert appraise(listed(LIST, 2), expected=files(b"pcrs", b"shell"), binding=BINDING).files == 2
    with pytest.raises(PlatformChanged) as refusal:
        appraise(listed(LIST, 2), expected=files(b"pcrs"), binding=BINDING)
    assert "/bin/sh" in refusal.value.told
    with pytest.raises(PlatformChanged):
        appraise(listed(LIST, 3), expected=files(b"pcrs", b"shell"), binding=BINDING)
    appraise(listed(LIST, 3), expected=files(b"pcrs", b"shell", violations=True), binding=BINDING)
    cut = listed(LIST, 2)
    shorter = measured(b"boot_aggregate", b"pcrs")
    with pytest.raises(PlatformChanged):  # an entry was left out
        appraise(evidence(cut.pcrs, ima=shorter), expected=files(b"pcrs"), binding=BINDING)  # type: ignore[arg-type]
    with pytest.raises(AttestationMissing):
        appraise(evidence(listed(LIST, 2).pcrs), expected=files(b"pcrs"), binding=BINDING)  # type: ignore[arg-type]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    everything = replace(EVENTS, files=Files(allow=("sha256:ab",), violations=True))
    assert parse(render(everything), "it") == everything
    (tmp_path / "beta.toml").write_text(render(everything))
    assert load(tmp_path, "beta") == everything
    (tmp_path / "alpha.toml").write_text(render(everything))
    with pytest.raises(ReferenceInvalid):
        load(tmp_path, "alpha")
    with pytest.raises(PlatformUnknown):
        load(tmp_path, "gamma")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("version = 1", "version = 2"),
        lambda text: text.replace("version = 1", "unknown = 1\nversion = 1"),
        lambda text: text.replace(SIGNER.public.hex(), SIGNER.public.hex()[2:]),
        lambda text: text.replace("07" * 32, "07" * 31),
        lambda text: text.replace("\n7 = ", "\n24 = "),
        lambda text: text + "[events.sha256]\n7 = ['" + "07" * 32 + "']\n",
        lambda text: text[:-3],
    ],
    ids=["version", "unknown", "key", "value", "index", "twice", "cut"],
)
def test_no_reference(change: Callable[[str], str]) -> None:
    parse(render(REFERENCE), "it")
    with pytest.raises(ReferenceInvalid):
        parse(change(render(REFERENCE)), "it")


def test_a_reference_that_demands_nothing() -> None:
    with pytest.raises(ReferenceInvalid):
        appraise(evidence(), expected=replace(REFERENCE, pcrs={}), binding=BINDING)


@given(
    st.binary(max_size=64),
    st.binary(max_size=64),
    st.dictionaries(st.integers(0, 23), st.binary(min_size=32, max_size=32), min_size=1),
)
def test_whatever_is_shown_is_no_yes(quote: bytes, signature: bytes, pcrs: dict[int, bytes]) -> None:
    shown = Evidence("tpm2", SIGNER.public, quote, signature, {"sha256": pcrs})
    with pytest.raises((AttestationError, EvidenceMalformed)):
        appraise(shown, expected=REFERENCE, binding=BINDING)

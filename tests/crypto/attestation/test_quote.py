"""Quotes: one of a real swtpm holds, and each thing that a forger or a wrong key may say instead is refused by name."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.attestation.binding import Binding, Side
from crypto.attestation.evidence import Evidence, decode, encode
from crypto.attestation.quote import check_clock, verify_quote
from crypto.attestation.structures import Attributes, Clock, Public, Quote, Reader, Selection, Signature
from crypto.errors import AttestationError, EvidenceMalformed, QuoteInvalid
from crypto.keys import SessionId
from tests.crypto.attestation.samples import (
    AK_ATTRIBUTES,
    QUALIFYING,
    RECORDED,
    SELECTION,
    Signer,
    quote_of,
    recorded,
    recorded_pcrs,
)

PCRS = {"sha256": {0: bytes(32), 7: b"\x07" * 32, 23: b"\x17" * 32}}
SIGNER = Signer()


def verify(quote: bytes, signature: bytes, public: bytes = SIGNER.public, **changed: Any) -> Any:
    arguments: dict[str, Any] = {"qualifying": QUALIFYING, "selection": SELECTION, "pcrs": PCRS, **changed}
    return verify_quote(quote, signature, public, **arguments)


def recorded_quote(**changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "qualifying": recorded("qualifying"),
        "selection": Selection.of({bank: map(int, held) for bank, held in RECORDED["pcrs"].items()}),
        "pcrs": recorded_pcrs(),
        **changed,
    }
    return verify_quote(recorded("quote"), recorded("signature"), recorded("ak"), **arguments)


def test_what_a_real_tpm_has_signed_holds() -> None:
    quoted = recorded_quote()
    assert quoted.name == recorded("name")
    assert quoted.clock.resets >= 1
    assert quoted.pcrs == recorded_pcrs()


def test_a_quote_of_one_session_is_nothing_in_another() -> None:
    with pytest.raises(QuoteInvalid, match="attestation failed") as refusal:
        recorded_quote(qualifying=bytes(32))
    assert "another session" in refusal.value.told


@pytest.mark.parametrize("bank", ["sha1", "sha256"])
def test_a_value_beside_the_quote_cannot_be_changed(bank: str) -> None:
    pcrs = recorded_pcrs()
    index = next(iter(pcrs[bank]))
    pcrs[bank][index] = bytes([pcrs[bank][index][0] ^ 1]) + pcrs[bank][index][1:]
    with pytest.raises(QuoteInvalid) as refusal:
        recorded_quote(pcrs=pcrs)
    assert "other values" in refusal.value.told


def test_every_bit_of_quote_and_signature_counts() -> None:
    """Whatever bit is turned, one of the documented errors comes, and never a yes."""
    quote = quote_of(PCRS)
    signature = SIGNER.sign(quote)
    verify(quote, signature)
    for what, data in (("quote", quote), ("signature", signature)):
        for bit in range(len(data) * 8):
            turned = bytearray(data)
            turned[bit // 8] ^= 1 << bit % 8
            parts = {"quote": quote, "signature": signature, what: bytes(turned)}
            with pytest.raises(AttestationError):
                verify(parts["quote"], parts["signature"])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: quote_of(PCRS, magic=0xFF544348), EvidenceMalformed),
        (lambda: quote_of(PCRS, kind=0x8017), EvidenceMalformed),
        (lambda: quote_of(PCRS) + b"\0", EvidenceMalformed),
        (lambda: quote_of(PCRS)[:-1], EvidenceMalformed),
        (lambda: quote_of(PCRS, safe=2), EvidenceMalformed),
        (lambda: quote_of(PCRS, QUALIFYING[:-1]), QuoteInvalid),
        (lambda: quote_of({"sha256": {0: bytes(32), 7: b"\x07" * 32}}), QuoteInvalid),
        (lambda: quote_of({"sha256": {**PCRS["sha256"], 8: bytes(32)}}), QuoteInvalid),
        (lambda: quote_of(PCRS, clock=(0, 0, 0)), QuoteInvalid),
    ],
    ids=["magic", "type", "trailing", "short", "safe", "nonce", "fewer", "more", "clock"],
)
def test_what_even_the_right_key_may_not_say(make: Callable[[], bytes], kind: type[AttestationError]) -> None:
    quote = make()
    with pytest.raises(kind):
        verify(quote, SIGNER.sign(quote))


@pytest.mark.parametrize(
    "attributes",
    [AK_ATTRIBUTES & ~one for one in AK_ATTRIBUTES if one is not Attributes.USER_WITH_AUTH]
    + [AK_ATTRIBUTES | Attributes.DECRYPT],
    ids=repr,
)
def test_a_key_that_could_sign_what_its_tpm_has_not_made(attributes: Attributes) -> None:
    """An unrestricted key signs a quote that anybody has written; one that can leave its TPM may be in another."""
    signer = Signer(attributes)
    quote = quote_of(PCRS)
    with pytest.raises(QuoteInvalid):
        verify(quote, signer.sign(quote), signer.public)


def test_a_signature_by_another_key() -> None:
    quote = quote_of(PCRS)
    with pytest.raises(QuoteInvalid):
        verify(quote, Signer().sign(quote))


def test_a_binding_has_every_part_in_it() -> None:
    binding = Binding(b"e" * 32, SessionId(b"s" * 16), Side.SOURCE, b"n" * 32, b"key")
    others = [
        replace(binding, exporter=b"E" * 32),
        replace(binding, session=SessionId(b"S" * 16)),
        replace(binding, side=Side.DESTINATION),
        replace(binding, nonce=b"N" * 32),
        replace(binding, hpke_public=b""),
        replace(binding, hpke_public=b"kez"),
    ]
    assert len({each.qualifying() for each in [binding, *others]}) == 7
    zeros = Binding(bytes(32), SessionId(bytes(16)), Side.SOURCE, bytes(32))
    assert zeros.qualifying() == hashlib.sha256(b"korora-attest-v1" + bytes(32 + 16 + 1 + 32 + 32)).digest()
    with pytest.raises(ValueError, match="fixed lengths"):
        replace(binding, nonce=b"n" * 31).qualifying()


@pytest.mark.parametrize(
    ("before", "after", "good"),
    [
        ((100, 2, 1), (101, 2, 1), True),
        ((100, 2, 1), (99, 2, 2), True),
        ((100, 2, 1), (99, 3, 0), True),
        ((90_000, 2, 1), (90_000, 2, 1), True),
        ((90_000, 2, 1), (89_999, 2, 1), False),
        ((100, 2, 1), (200, 2, 0), False),
        ((100, 2, 1), (200, 1, 5), False),
    ],
)
def test_a_tpm_does_not_go_back(before: tuple[int, int, int], after: tuple[int, int, int], good: bool) -> None:
    earlier, later = Clock(*before, safe=True), Clock(*after, safe=True)
    if good:
        check_clock(earlier, later)
    else:
        with pytest.raises(QuoteInvalid):
            check_clock(earlier, later)


@pytest.mark.parametrize("parser", [Public.parse, Quote.parse, Signature.parse, decode], ids=lambda p: p.__qualname__)
@given(data=st.data())
def test_nothing_but_the_documented_error(parser: Callable[[bytes], object], data: st.DataObject) -> None:
    """Noise, and real structures with bytes changed, cut or put in."""
    seed = data.draw(
        st.sampled_from([recorded("ak"), recorded("quote"), recorded("signature"), encode(Evidence("none")), b""])
    )
    changed = bytearray(seed)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=4)), max_size=4)):
        changed[at : at + data.draw(st.integers(0, 4))] = value
    try:
        parser(bytes(changed))
    except EvidenceMalformed:
        return


@given(
    st.dictionaries(
        st.sampled_from(["sha1", "sha256", "sha384", "sha512"]), st.sets(st.integers(0, 23), min_size=1), min_size=1
    )
)
def test_a_selection_is_read_as_it_was_written(banks: dict[str, set[int]]) -> None:
    selection = Selection.of(banks)
    reader = Reader(selection.encode(), "it")
    assert Selection.read(reader) == selection
    reader.end()


@pytest.mark.parametrize("banks", [{}, {"sha256": []}, {"md5": [1]}, {"sha256": [24]}, {"sha256": [1], "x": [1]}])
def test_a_selection_of_nothing(banks: dict[str, list[int]]) -> None:
    with pytest.raises(EvidenceMalformed):
        Selection.of(banks)


def test_evidence_comes_back_as_it_went() -> None:
    evidence = Evidence("tpm2", recorded("ak"), recorded("quote"), recorded("signature"), recorded_pcrs())  # type: ignore[arg-type]
    assert decode(encode(evidence)) == evidence
    with pytest.raises(EvidenceMalformed):
        decode(encode(evidence) + b"\0")


def test_a_pcr_in_anothers_place() -> None:
    """PCR 16 can be reset and extended to whatever PCR 7 should have: the digest over its values is the same."""
    values = PCRS["sha256"]
    quote = quote_of({"sha256": {0: values[0], 16: values[7], 23: values[23]}})
    assert Quote.parse(quote).digest == SELECTION.digest(PCRS, "sha256")
    with pytest.raises(QuoteInvalid) as refusal:
        verify(quote, SIGNER.sign(quote))
    assert "other PCRs" in refusal.value.told

"""Heads: C2SP's formats, and none that is not exactly that, that host's and signed."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import VerifyKey

from crypto.errors import HeadMalformed, PkiNameInvalid
from crypto.receipts.checkpoint import Checkpoint, key_hash, origin_of, parse, sign, verify
from crypto.receipts.limits import CHECKPOINT_BYTES_MAX
from tests.crypto.receipts.making import ALPHA, BETA

HEAD = Checkpoint("korora/alpha", 17, bytes(range(32)))
TEXT = sign(HEAD, ALPHA)
KEY = ALPHA.verify_key


def test_the_key_and_signature_of_the_first_signed_note() -> None:
    """Those of the Go library's own test, which every implementation is held against."""
    name, key_id, blob = ["PeterNeumann", "c74f20a3", "ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"]
    key = VerifyKey(base64.b64decode(blob)[1:])
    assert key_hash(name, key).hex() == key_id
    note = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    signature = base64.b64decode(
        "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    )
    assert signature[:4] == key_hash(name, key)
    key.verify(note.encode(), signature[4:])


def test_a_head_is_three_lines_an_empty_one_and_a_signature() -> None:
    lines = TEXT.split("\n")
    assert lines[:4] == ["korora/alpha", "17", base64.b64encode(HEAD.root).decode(), ""]
    assert lines[4].startswith("— korora/alpha ")
    assert lines[5:] == [""]
    assert verify(TEXT, "korora/alpha", KEY) == parse(TEXT) == HEAD


def test_the_specifications_example_is_read() -> None:
    told = parse(
        "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
        "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE"
        "+xeMcTOAYQ8=\n"
    )
    assert (told.origin, told.size) == ("example.com/behind-the-sofa", 20852163)


def test_witnesses_signatures_count_for_nothing_and_harm_nothing() -> None:
    witnessed = f"{TEXT}— witness.example/w1 {base64.b64encode(bytes(76)).decode()}\n"
    assert verify(witnessed, "korora/alpha", KEY) == HEAD


def test_a_head_with_lines_of_an_extension_is_signed_with_them() -> None:
    body = "korora/alpha\n17\n" + base64.b64encode(HEAD.root).decode() + "\nmore\n"
    blob = base64.b64encode(key_hash("korora/alpha", KEY) + ALPHA.sign(body.encode()).signature).decode()
    assert verify(f"{body}\n— korora/alpha {blob}\n", "korora/alpha", KEY) == HEAD
    with pytest.raises(HeadMalformed, match="altered"):
        verify(f"{body}\n— korora/alpha {blob}\n".replace("more", "less"), "korora/alpha", KEY)


def test_another_hosts_head_and_another_key_are_refused() -> None:
    with pytest.raises(HeadMalformed, match="expected"):
        verify(TEXT, "korora/beta", KEY)
    with pytest.raises(HeadMalformed, match="not signed"):
        verify(TEXT, "korora/alpha", BETA.verify_key)
    stolen = sign(Checkpoint("korora/alpha", 18, HEAD.root), BETA)
    with pytest.raises(HeadMalformed, match="not signed"):
        verify(stolen, "korora/alpha", KEY)


@given(st.integers(0, len(TEXT.encode()) - 1), st.integers(1, 255))
def test_no_altered_byte_passes(place: int, flip: int) -> None:
    content = bytearray(TEXT.encode())
    content[place] ^= flip
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return
    with pytest.raises(HeadMalformed):
        verify(text, "korora/alpha", KEY)


@given(st.text(max_size=200) | st.text("korora/alpha17— =\n", max_size=80))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(HeadMalformed):
        verify(text, "korora/alpha", KEY)


@pytest.mark.parametrize(
    "altered",
    [
        TEXT[:-1],
        TEXT.replace("\n\n", "\n"),
        TEXT.replace("\n17\n", "\n017\n"),
        TEXT.replace("\n17\n", "\n+17\n"),
        TEXT.replace("\n17\n", "\n-17\n"),
        TEXT.replace("\n17\n", "\n1_7\n"),
        TEXT.replace("\n17\n", "\n\u0661\n"),
        TEXT.replace("\n17\n", "\n" + "9" * 14 + "\n"),
        TEXT.replace("\n17\n", "\n1700000000000\n"),
        TEXT.replace("\n17\n", "\n"),
        TEXT.replace("=\n\n", "\n\n"),
        TEXT.replace("—", "-"),
        TEXT.replace("\n", "\r\n"),
        TEXT + TEXT.split("\n\n")[1] * 20,
        TEXT + " " * CHECKPOINT_BYTES_MAX,
        "\n17\n" + TEXT,
    ],
)
def test_what_is_no_head_is_refused(altered: str) -> None:
    assert altered != TEXT
    with pytest.raises(HeadMalformed):
        verify(altered, "korora/alpha", KEY)


@pytest.mark.parametrize("name", ["", "../x", "a b", "a\nb", "x" * 64])
def test_a_name_that_no_host_has_gives_no_origin(name: str) -> None:
    with pytest.raises(PkiNameInvalid):
        origin_of(name)


def test_a_signature_in_another_name_and_a_root_of_another_length_are_refused() -> None:
    """Both signed by the right key."""
    with pytest.raises(HeadMalformed, match="not signed"):
        verify(TEXT.replace("— korora/alpha", "— witness.example/w1"), "korora/alpha", KEY)
    for length in (0, 31, 33):
        with pytest.raises(HeadMalformed, match="wrong length"):
            verify(sign(Checkpoint("korora/alpha", 17, bytes(length)), ALPHA), "korora/alpha", KEY)

"""What is wrapped opens for one key and one use, and for nothing else."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.errors import WrapBroken
from crypto.hpke import PLAIN_BYTES_MAX, PUBLIC_BYTES, SECRET_BYTES, WRAP_BYTES, Recipient, fingerprint, wrap

RECIPIENT = Recipient()
WRAPPED = wrap(b"a vTPM", RECIPIENT.public, b"use")


@given(plain=st.binary(max_size=5000), info=st.binary(max_size=100))
def test_it_opens_for_its_recipient(plain: bytes, info: bytes) -> None:
    wrapped = wrap(plain, RECIPIENT.public, info)
    assert len(wrapped) == WRAP_BYTES + len(plain)
    assert RECIPIENT.unwrap(wrapped, info) == plain


def test_twice_the_same_is_not_the_same() -> None:
    assert wrap(b"a vTPM", RECIPIENT.public, b"use") != WRAPPED


@pytest.mark.parametrize("info", [b"", b"us", b"another use"])
def test_not_for_another_use(info: bytes) -> None:
    with pytest.raises(WrapBroken):
        RECIPIENT.unwrap(WRAPPED, info)


def test_not_for_another_key() -> None:
    with pytest.raises(WrapBroken):
        Recipient().unwrap(WRAPPED, b"use")


@given(at=st.integers(0, len(WRAPPED) - 1), bit=st.integers(0, 7))
def test_not_with_a_bit_changed(at: int, bit: int) -> None:
    forged = bytearray(WRAPPED)
    forged[at] ^= 1 << bit
    if at == 1088 + 31 and bit == 7:
        return  # X25519 ignores the point's highest bit (RFC 7748 §5), and HPKE hashes it: either is right
    with pytest.raises(WrapBroken):
        RECIPIENT.unwrap(bytes(forged), b"use")


@given(wrapped=st.binary(max_size=WRAP_BYTES + 10))
def test_nor_anything_else(wrapped: bytes) -> None:
    with pytest.raises(WrapBroken):
        RECIPIENT.unwrap(wrapped, b"use")


@given(public=st.one_of(st.binary(max_size=PUBLIC_BYTES + 1), st.just(b"\xff" * PUBLIC_BYTES), st.just(bytes(1216))))
def test_a_key_that_is_none(public: bytes) -> None:
    if public == bytes(1216):
        with pytest.raises(WrapBroken):  # a point of small order: the secret would be known to everybody
            wrap(b"a vTPM", public, b"use")
        return
    with pytest.raises(WrapBroken):
        wrap(b"a vTPM", public, b"use")


def test_what_is_too_long() -> None:
    with pytest.raises(ValueError, match="1048577 bytes to wrap"):
        wrap(bytes(PLAIN_BYTES_MAX + 1), RECIPIENT.public, b"")
    with pytest.raises(WrapBroken, match="cannot have been wrapped"):
        RECIPIENT.unwrap(bytes(WRAP_BYTES + PLAIN_BYTES_MAX + 1), b"")


def test_its_fingerprint_is_what_a_quote_certifies() -> None:
    assert len(RECIPIENT.public) == PUBLIC_BYTES
    assert fingerprint(RECIPIENT.public) == hashlib.sha256(RECIPIENT.public).digest()


def test_a_recipient_made_again_reads_the_same() -> None:
    made = Recipient()
    again = Recipient(made.secret)
    assert again.public == made.public
    assert again.unwrap(wrap(b"what waits", made.public, b"use"), b"use") == b"what waits"
    for length in (1, SECRET_BYTES - 1, SECRET_BYTES + 1):
        with pytest.raises(ValueError, match="secret"):
            Recipient(bytes(length))
    assert made.secret.hex() not in repr(made)

"""What is sealed at rest opens in its own place, under its own host's key, and nowhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.at_rest import SEAL_BYTES, WRAP_BYTES, HostKeys
from crypto.errors import CryptoError, SealBroken

KEYS = HostKeys(b"k" * 32)
FOLDER = KEYS.folder("tenant")
SEGMENT = b"s" * 16


def sealed(part: int, *pieces: bytes) -> tuple[list[bytes], bytes]:
    """Pieces of a new segment, and its key file."""
    sealer, wrapped = KEYS.make(FOLDER, SEGMENT, b"note")
    out = []
    for piece in pieces:
        buffer = bytearray(len(piece) + SEAL_BYTES)
        sealer.seal(part, piece, buffer)
        out.append(bytes(buffer))
    return out, wrapped


def test_what_was_sealed_opens() -> None:
    pieces, wrapped = sealed(3, b"one", b"", b"three" * 1000)
    assert len(wrapped) == WRAP_BYTES + 4
    opener, note = KEYS.unwrap(FOLDER, SEGMENT, wrapped)
    assert note == b"note"
    for number, plain in enumerate((b"one", b"", b"three" * 1000)):
        out = bytearray(len(plain))
        opener.open(3, number, pieces[number], out)
        assert out == plain


@given(st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_does_not_open(at: int, bit: int) -> None:
    (piece,), wrapped = sealed(0, b"content of a page")
    opener, _ = KEYS.unwrap(FOLDER, SEGMENT, wrapped)
    changed = bytearray(piece)
    changed[at % len(changed)] ^= 1 << bit
    with pytest.raises(SealBroken):
        opener.open(0, 0, changed, bytearray(17))
    changed = bytearray(wrapped)
    changed[at % len(changed)] ^= 1 << bit
    with pytest.raises(SealBroken):
        KEYS.unwrap(FOLDER, SEGMENT, bytes(changed))


def test_another_place_does_not_open() -> None:
    (first, second), wrapped = sealed(0, b"same", b"same")
    assert first != second
    opener, _ = KEYS.unwrap(FOLDER, SEGMENT, wrapped)
    for part, number, piece in ((0, 1, first), (1, 0, first), (0, 0, second), (0, 0, first[:-1]), (0, 0, b"")):
        with pytest.raises(SealBroken):
            opener.open(part, number, piece, bytearray(max(0, len(piece) - SEAL_BYTES)))
    with pytest.raises(SealBroken):
        opener.open(0, 0, first, bytearray(5))  # room for another length
    for folder, segment in ((KEYS.folder("other"), SEGMENT), (FOLDER, b"t" * 16)):
        with pytest.raises(SealBroken):
            KEYS.unwrap(folder, segment, wrapped)
    with pytest.raises(SealBroken):
        HostKeys(b"K" * 32).unwrap(FOLDER, SEGMENT, wrapped)
    for cut in (0, WRAP_BYTES - 1, len(wrapped) - 1):
        with pytest.raises(SealBroken):
            KEYS.unwrap(FOLDER, SEGMENT, wrapped[:cut])
    assert issubclass(SealBroken, CryptoError)


def test_keys_are_apart_by_tenant_and_by_host() -> None:
    other = HostKeys(b"K" * 32)
    folders = {keys.folder(tenant) for keys in (KEYS, other) for tenant in ("a", "b", "")}
    assert len(folders) == 6
    assert all(len(folder) == 32 for folder in folders)
    assert len({keys.page_key(folder) for keys in (KEYS, other) for folder in folders}) == 12
    assert KEYS.folder("a") == HostKeys(b"k" * 32).folder("a")
    with pytest.raises(ValueError, match="32 bytes"):
        HostKeys(b"short")


def test_the_derivations_are_frozen() -> None:
    """A store must open after an upgrade: these values change only with a new version of the store."""
    assert KEYS.folder("tenant") == "ef605d1384d7d5653bb4931a6e5d8604"
    assert KEYS.page_key(FOLDER).hex() == "36d0304358d67db5b0f587d1251f8b558f9dff31bfcde283799bb0b477ff55ea"

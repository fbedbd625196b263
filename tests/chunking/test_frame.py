"""The layout of frames is frozen: relays of different age read each other's, until the layout's number changes."""

import hashlib
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chunking.cache import NO_LOCATION
from chunking.decoder import Decoder
from chunking.frame import Columns, Flags, pack, shuffled, unpack, unshuffled
from chunking.pages import PAGE_BYTES
from chunking.regime import Regime
from tests.chunking.support import ENGINE, MemoryStore, Pair, pieces

VECTORS = Path(__file__).parents[1] / "vectors" / "frames"
SLOTS = 16
STORED = [bytes([number]) * PAGE_BYTES for number in (1, 2, 3)]

COLUMNS = Columns(
    runs=np.array([[3, 2, 4], [300, 0, 1]], np.uint32),
    other=np.arange(303, dtype=np.uint8),
    words=np.frombuffer(bytes(range(16)), np.uint8),
    big_endian=True,
    kinds=np.array([0, 1, 2, 3, 4], np.uint8),
    locations=np.array([NO_LOCATION, 5, 7, NO_LOCATION, 18], np.uint32),
    slots=np.array([NO_LOCATION, NO_LOCATION, 15, 0, 1], np.uint32),
    masks=np.array([5, *[0] * 63], np.uint8),
    values=np.array([1, 2**63], np.uint64),
)


def test_columns_are_frozen() -> None:
    header, meta = pack(COLUMNS, SLOTS)
    assert header.pack().hex() == (
        "010001000000000200000001000001" + "2f" + "0000000200010001000100010001000000020000000f00000000"
    )
    assert len(meta) == header.columns_bytes
    assert hashlib.sha256(meta).hexdigest() == ("9d2464c482ab56c72882d3ae27b1569486b40eef5ffea268408deee703ca9465")


def test_slots_out_of_turn_are_a_column() -> None:
    slots = COLUMNS.slots.copy()
    slots[-1] = 9
    header, meta = pack(COLUMNS._replace(slots=slots), SLOTS)
    assert Flags.SLOTS in header.flags
    assert unpack(header, np.frombuffer(meta, np.uint8), SLOTS).slots.tolist() == slots.tolist()


def test_columns_come_back() -> None:
    header, meta = pack(COLUMNS, SLOTS)
    for ours, theirs in zip(COLUMNS, unpack(header, np.frombuffer(meta, np.uint8), SLOTS), strict=True):
        assert np.array_equal(ours, theirs)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_shuffled_numbers_come_back(values: list[int]) -> None:
    column = np.array(values, np.uint32)
    assert unshuffled(np.frombuffer(shuffled(column), np.uint8)).tolist() == values


def test_bodies_of_an_older_relay_are_read() -> None:
    """Whole bodies as they were once made, zstd included; a newer zstd makes others, and reads these."""
    decoder = Decoder(SLOTS * PAGE_BYTES, stored=MemoryStore(STORED))
    bodies = sorted(VECTORS.glob("*.body"))
    assert len(bodies) == len(ENGINE)
    for path, (raw, _) in zip(bodies, stream(), strict=True):
        body = path.read_bytes()
        out = bytearray(len(raw))
        decoder.chain_of(body)
        decoder.rebuild(decoder.unpress(body, len(raw)), memoryview(out))
        assert out == raw


def stream() -> list[tuple[bytes, object]]:
    """What the bodies in tests/vectors/frames stand for."""
    return list(pieces(2024, len(ENGINE), runs=2, pages_max=5))


def write_vectors() -> None:
    """Make the bodies anew, after a change of the layout's number."""
    pair = Pair(SLOTS, 2, MemoryStore(STORED, {3: 1, 5: 2}))
    VECTORS.mkdir(exist_ok=True)
    for number, ((raw, spans), regime) in enumerate(zip(stream(), ENGINE, strict=True)):
        _, body = pair.carry(raw, spans, Regime(regime))  # type: ignore[arg-type]
        if body is None:
            raise RuntimeError("a frame without pages proves nothing")
        (VECTORS / f"{number}-{regime.name.lower()}.body").write_bytes(body)


if __name__ == "__main__":
    write_vectors()

"""What Xen's own verifier accepts is followed to its end, and what is changed in a record's head is judged alike.

verify-stream-v2 is run as the external program that it is; deploy/rig/fetch-verify-stream gets it. It differs by design
where nothing is asked here: it refuses padding and reserved fields that are not zero, which a restore must ignore, it
looks into bodies, it knows neither big-endian streams nor optional records, and it stops at the first END.
"""

import os
import random
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proxy.streams.describing import cut, describe
from tests.proxy.streams.made import GO, libxc, page_data, record, vector

CHECKOUT = Path(__file__).parents[3]
VERIFIER = Path(os.environ.get("KORORA_RIG", CHECKOUT / ".cache" / "rig")) / "verify-stream"
PYTHON = Path("/usr/bin/python3")
REAL = ["xen417-pv.xlmig-up", "xen417-pvh.xlmig-up", "xen417-pv.xlsave"]
HEADS = 12  # changed records for each stream: each costs a process

pytestmark = pytest.mark.skipif(
    not (VERIFIER / "bin" / "verify-stream-v2").is_file() or not PYTHON.exists(),
    reason="there is no verify-stream-v2: deploy/rig/fetch-verify-stream gets it, and says why it cannot",
)


def accepted(stream: bytes, kind: str) -> bool:
    """Whether Xen's verifier takes the whole stream for a good one. It reads files only: a pipe reads short."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(stream)
        file.flush()
        done = subprocess.run(
            [PYTHON, VERIFIER / "bin" / "verify-stream-v2", "-f", kind, "-i", file.name],
            capture_output=True,
            env={"PYTHONPATH": str(VERIFIER / "lib" / "python"), "PYTHONDONTWRITEBYTECODE": "1"},
            timeout=30,
            check=False,
        )
    assert done.returncode in (0, 1, 2), done.stderr
    return done.returncode == 0


def followed(stream: bytes) -> bool:
    """Whether our parser follows it to an END."""
    facts = describe(cut(stream)).facts
    return facts.opaque_reason is None and facts.records.get("END") == 1


def records_of(image: bytes) -> list[int]:
    """Where the records of a libxc image begin."""
    found, at = [], 40
    while at < len(image):
        found.append(at)
        kind, size = struct.unpack_from("<II", image, at)
        at += 8 + size + -size % 8
        if kind == 0:
            break
    return found


def image_of(name: str) -> bytes:
    """The libxc image within a real stream: END of libxl's and xl's GO stand behind it."""
    stream = vector(name).removesuffix(GO)
    return stream[stream.index(b"\xff" * 8 + b"XENF") : -8]


@pytest.mark.parametrize("name", REAL)
def test_real_streams_are_good_to_both(name: str) -> None:
    stream = vector(name)
    assert accepted(stream, "xl")
    assert followed(stream)
    libxl = stream[stream.index(b"LibxlFmt") :].removesuffix(GO)
    assert accepted(libxl, "libxl")
    assert followed(libxl)
    assert accepted(image_of(name), "libxc")
    assert followed(image_of(name))


@pytest.mark.parametrize("name", REAL)
def test_a_changed_type_or_length_is_judged_alike(name: str) -> None:
    """Seeded. Types become ones that are unknown or END; lengths change by whole words, and by more than a body has."""
    image = image_of(name)
    places = records_of(image)
    dice = random.Random(name)
    for place in dice.sample(places, min(HEADS, len(places))):
        kind, size = struct.unpack_from("<II", image, place)
        changes = [(0x13, size), (0x7FFF_FFFF, size), (kind, size + 8 * dice.randrange(1, 1000)), (kind, 0xFFFF_FFF8)]
        if kind == 1:
            changes += [(kind, size - 8), (kind, size - 4096), (0x0, size)]
        changed = bytearray(image)
        struct.pack_into("<II", changed, place, *dice.choice(changes))
        stream = bytes(changed)
        assert accepted(stream, "libxc") is followed(stream) is False, (place, stream[place : place + 8].hex())


@pytest.mark.parametrize("name", REAL)
def test_a_changed_table_is_judged_alike(name: str) -> None:
    """Seeded: the count of a PAGE_DATA record, and an entry's type; some changes leave the stream a good one."""
    image = image_of(name)
    places = [place for place in records_of(image) if struct.unpack_from("<I", image, place)[0] == 1]
    dice = random.Random(name)
    for _ in range(HEADS):
        place = dice.choice(places)
        (count,) = struct.unpack_from("<I", image, place + 8)
        changed = bytearray(image)
        if dice.random() < 0.3:
            struct.pack_into("<I", changed, place + 8, dice.choice([0, count - 1, count + 1, 2**31, 2**32 - 1]))
        else:
            at = place + 16 + 8 * dice.randrange(count) + 7
            changed[at] = changed[at] & 0x0F | dice.randrange(16) << 4
        stream = bytes(changed)
        assert accepted(stream, "libxc") is followed(stream), (place, stream[place : place + 24].hex())


@pytest.mark.parametrize(
    ("change", "good"),
    [
        (lambda image: image, True),
        (lambda image: image[:15] + b"\x02" + image[16:], True),
        (lambda image: image[:15] + b"\x04" + image[16:], False),
        (lambda image: image[:24] + b"\x02" + image[25:], True),
        (lambda image: image[:24] + b"\x03" + image[25:], False),
        (lambda image: image[:28] + b"\x0d" + image[29:], False),
        (lambda image: b"\xfe" + image[1:], False),
        (lambda image: image[:8] + b"x" + image[9:], False),
    ],
)
def test_changed_headers_are_judged_alike(change: Callable[[bytes], bytes], good: bool) -> None:
    stream = change(libxc(page_data([(1, 0), (2, 0xF)]), record(0xD), page_data([(3, 9)])))
    assert accepted(stream, "libxc") is good
    assert followed(stream) is good


def test_a_shortened_stream_is_good_to_neither() -> None:
    image = image_of("xen417-pv.xlsave")
    for size in random.Random(7).sample(range(40, len(image)), 6):
        assert not accepted(image[:size], "libxc")
        assert not followed(image[:size])

"""A source with a good identity whose frames of pages are none: nothing of them, or after them, reaches the hypervisor.

Each abuse begins with a session in good order: `PROLOGUE` was delivered. Then comes the abuse and a good frame behind
it, then the destination has to have ended the session with exit code 5 and its hypervisor has to have seen a reset.
"""

import struct
from contextlib import suppress

import pytest
import zstandard

from crypto.records import RecordType
from tests.attacks.paged import (
    ALONE,
    CACHE_PAGES,
    COPY,
    DELTA,
    HEADER,
    PAGE,
    REF,
    ZERO,
    ZSTD,
    ZSTD_RESET,
    Body,
    literal,
    paged_scene,
)
from tests.attacks.relays import Identities, noise, on_uvloop, shorten
from tests.attacks.rogue import MIB, Gone, ack, message

PAGE_A, PAGE_B = noise(PAGE, 10), noise(PAGE, 11)


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rogue does not close its connections when it is told to: do not wait 5 s for that each time."""
    shorten(monkeypatch, DRAIN_SECONDS_MAX=0.02, ABORT_SECONDS_MAX=0.2)


def words(page: bytes) -> list[int]:
    return list(struct.unpack("<512Q", page))


def squeezed(data: bytes, *, window_log: int = 20) -> bytes:
    """A whole zstd frame."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def wide(window_log: int, padding: int = 0) -> bytes:
    """A zstd frame of a page that asks for a window of so many bytes, as a power of two; made by hand.

    ``padding`` blocks of it hold nothing.
    """
    return b"\x28\xb5\x2f\xfd\x00" + bytes(((window_log - 10) << 3,)) + padding * bytes(3) + b"\x03\x80\x00" + b"A"


@on_uvloop
async def test_the_rogue_can_make_pages(identities: Identities) -> None:
    """Bodies of these tools are good where they should be: what fails below fails for its reason."""
    changed = bytearray(PAGE_A)
    changed[8:16] = bytes(8)
    async with paged_scene(identities) as made:
        await made.sends(literal(PAGE_A), PAGE_A)
        await made.hears(PAGE_A)
        await made.sends(Body([ZERO, REF], [0], other=b"between"), b"between" + bytes(PAGE) + PAGE_A)
        await made.hears(b"between" + bytes(PAGE) + PAGE_A)
        body = Body([DELTA], [0], first=1, masks=b"\x02" + bytes(63), words=[words(PAGE_A)[1]])
        await made.sends(body, bytes(changed))
        await made.hears(bytes(changed))
        await made.sends(literal(squeezed(PAGE_B), slots=[63], flags=ZSTD | ALONE), PAGE_B)
        await made.sends(Body([REF, REF], [1, 63]), bytes(changed) + PAGE_B)
        await made.hears(PAGE_B + bytes(changed) + PAGE_B)
        await made.lane.frame(made.plain(noise(2 * MIB, 3)))
        await made.hears(noise(2 * MIB, 3))
        await made.lane.frame(made.stream.end(order=made.order))
        while (await made.lane.receive())[0] is not RecordType.FRAME:
            pass
        await made.lane.record(RecordType.ACK, ack(0, 1, 1, MIB))
        await made.rogue.control.say(message("finish"))
        assert await made.rogue.control.hear() == {"type": "finished"}
        assert await made.receiver.verdict(5.0) == 0


BODIES: dict[str, tuple[Body | bytes, bytes]] = {
    "no header": (b"x" * (HEADER.size - 1), PAGE_A),
    "only a header": (HEADER.pack(1, 0, 4, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0), PAGE_A),
    "another layout": (literal(PAGE_A, layout=2), PAGE_A),
    "an unknown flag": (literal(PAGE_A, flags=64), PAGE_A),
    "a chain not agreed on": (literal(PAGE_A, chain=2), PAGE_A),
    "a chain that cannot be": (literal(PAGE_A, chain=16), PAGE_A),
    "chain 255": (literal(PAGE_A, chain=255), PAGE_A),
    "fewer pages than bytes": (literal(PAGE_A), PAGE_A + b"x"),
    "more pages than bytes": (literal(PAGE_A), PAGE_A[:-1]),
    "65535 pages": (literal(PAGE_A, counts={"zero": 65535}), PAGE_A),
    "4294967295 runs": (literal(PAGE_A, counts={"runs": 2**32 - 1}), PAGE_A),
    "large runs that are none": (literal(PAGE_A, counts={"large": 3}), PAGE_A),
    "4294967295 changed words": (literal(PAGE_A, counts={"changed": 2**32 - 1}), PAGE_A),
    "changed words and no delta": (literal(PAGE_A, counts={"changed": 1}), PAGE_A),
    "columns beyond the body": (literal(PAGE_A, counts={"meta": 2**32 - 1}), PAGE_A),
    "columns that are no zstd": (literal(PAGE_A, meta=noise(100, 1)), PAGE_A),
    "columns that never came": (literal(PAGE_A, meta=b""), PAGE_A),
    "columns too short": (literal(PAGE_A, columns=b"\x00\x00\x01"), PAGE_A),
    "columns too long": (literal(PAGE_A, columns=b"\x00\x00\x01\x03\x00"), PAGE_A),
    "columns of a gibibyte": (literal(PAGE_A, meta=squeezed(bytes(64 * MIB))), PAGE_A),
    "runs that do not add up": (literal(PAGE_A, columns=b"\x00\x00\x02\x03"), PAGE_A),
    "an unknown kind": (literal(PAGE_A, columns=b"\x00\x00\x01\x05"), PAGE_A),
    "another kind than counted": (literal(PAGE_A, columns=b"\x00\x00\x01\x00"), PAGE_A),
    "a slot out of range": (literal(PAGE_A, slots=[CACHE_PAGES]), PAGE_A),
    "a slot far out of range": (literal(PAGE_A, slots=[2**32 - 2]), PAGE_A),
    "the slot that is none": (literal(PAGE_A, slots=[2**32 - 1]), PAGE_A),
    "a reference out of range": (Body([REF], [CACHE_PAGES]), PAGE_A),
    "a reference far out of range": (Body([REF], [2**32 - 2]), PAGE_A),
    "a reference to none": (Body([REF], [2**32 - 1]), PAGE_A),
    "a reference to a slot never filled": (Body([REF], [7]), PAGE_A),
    "a delta of a base out of range": (Body([DELTA], [CACHE_PAGES], masks=bytes(64)), PAGE_A),
    "a delta of a base far out of range": (Body([DELTA], [2**32 - 2], masks=bytes(64)), PAGE_A),
    "a delta with fewer words than bits": (Body([DELTA], [0], masks=b"\xff" * 64, words=[1]), PAGE_A),
    "a delta with more words than bits": (Body([DELTA], [0], masks=bytes(64), words=[1]), PAGE_A),
    "a copy of a slot": (Body([COPY], [0]), bytes(PAGE)),
    "a copy of a page that nobody stores": (Body([COPY], [CACHE_PAGES]), PAGE_A),
    "fewer literals than counted": (literal(PAGE_A[:-1]), PAGE_A),
    "more literals than counted": (literal(PAGE_A + b"x"), PAGE_A),
    "literals that are no zstd": (literal(noise(100, 1), flags=ZSTD | ZSTD_RESET), PAGE_A),
    "literals of a stream that never began": (literal(squeezed(PAGE_A), flags=ZSTD), PAGE_A),
    "literals of a gibibyte": (literal(squeezed(bytes(64 * MIB)), flags=ZSTD | ALONE), PAGE_A),
    "literals that end early": (literal(squeezed(PAGE_A[:-1]), flags=ZSTD | ALONE), PAGE_A),
    "literals cut short": (literal(squeezed(PAGE_A)[:-5], flags=ZSTD | ALONE), PAGE_A),
    "a window of 64 MiB": (literal(wide(26), flags=ZSTD | ALONE), b"A" * PAGE),
    "a window of 2 TiB": (literal(wide(41), flags=ZSTD | ALONE), b"A" * PAGE),
    "another page": (literal(PAGE_B), PAGE_A),
    "a zero page for another": (Body([ZERO]), PAGE_A),
}


@pytest.mark.parametrize("name", BODIES)
@on_uvloop
async def test_a_body_that_is_none_ends_the_session(identities: Identities, name: str) -> None:
    body, raw = BODIES[name]
    async with paged_scene(identities) as made:
        packed = body if isinstance(body, bytes) else body.pack(made.chain)
        with suppress(Gone):
            await made.lane.frame(made.frame(packed, raw))
            await made.sends(literal(PAGE_B), PAGE_B)
            await made.lane.frame(made.plain(b"and more"))
        await made.ends()


@on_uvloop
async def test_the_widest_window_that_is_allowed_is_taken(identities: Identities) -> None:
    """The windows refused above are refused for their size."""
    async with paged_scene(identities) as made:
        await made.sends(literal(wide(25), flags=ZSTD | ALONE), b"A" * PAGE)
        await made.hears(b"A" * PAGE)

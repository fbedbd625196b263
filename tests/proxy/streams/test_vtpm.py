"""The vTPM that QEMU's stream carries, as a relay sees it pass: the one that QEMU put there, whole, or none."""

import json
import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.limits import KIB, QEMU_DEVICES_MAX, VTPM_STATE_BYTES_MAX
from proxy.streams.parser import StreamParser
from proxy.streams.vtpm import CarriedPart, CarriedVtpm, VtpmWatch
from tests.proxy.streams.describing import Described, cut, describe, pieces_of
from tests.proxy.streams.made import BLOCKS, EOS, Ram, block_list, footer, qemu_header, ram, section, text, vector

NAME = b"tpm-emulator"
SEED = random.Random(7)
PERMANENT, VOLATILE = SEED.randbytes(6011), SEED.randbytes(2027)
CARRIED = CarriedVtpm(CarriedPart(2, PERMANENT), CarriedPart(3, VOLATILE), CarriedPart(0, b""))


def content(carried: CarriedVtpm = CARRIED) -> bytes:
    """Of the vTPM's section."""
    parts = (carried.permanent, carried.volatile, carried.savestate)
    return b"".join(struct.pack(">II", part.flags, len(part.data)) + part.data for part in parts)


@dataclass(frozen=True)
class Device:
    """A full section, and what the description says of it."""

    name: bytes
    content: bytes
    instance: int = 0
    version: int = 1
    sizes: Sequence[int] = ()
    number: int = 0

    def pack(self, number: int) -> bytes:
        number = self.number or number
        head = b"\x04" + struct.pack(">I", number) + text(self.name)
        return head + struct.pack(">II", self.instance, self.version) + self.content + footer(number)


def vtpm(carried: CarriedVtpm = CARRIED, instance: int = 0) -> Device:
    parts = (carried.permanent, carried.volatile, carried.savestate)
    sizes = [size for part in parts for size in (4, 4, len(part.data))]
    return Device(NAME, content(carried), instance, 0, sizes)


BEFORE, BEHIND = Device(b"timer", bytes(24)), Device(b"0000:00:03.0/e1000", SEED.randbytes(900), 3, 2)


def described(devices: Iterable[Device]) -> bytes:
    listed = [
        {
            "name": one.name.decode(),
            "instance_id": one.instance,
            "version": one.version,
            "fields": [{"name": "x", "size": size} for size in one.sizes or [len(one.content)]],
        }
        for one in devices
    ]
    return json.dumps({"page_size": 4096, "devices": listed}).encode()


def made(*devices: Device, description: bytes | None = None, pages: Sequence[Ram] = ()) -> bytes:
    """A whole stream of that machine."""
    told = described(devices) if description is None else description
    parts = [qemu_header(), section(1, 2, b"ram", block_list(BLOCKS) + EOS), section(3, 2, None, ram(pages))]
    parts += [device.pack(10 + number) for number, device in enumerate(devices)]
    return b"".join(parts) + b"\0\x06" + struct.pack(">I", len(told)) + told


def watched(stream: bytes, cuts: Iterable[int] = ()) -> tuple[VtpmWatch, Described]:
    watch = VtpmWatch()
    return watch, describe(cut(stream, cuts), StreamParser(watch))


def trouble(stream: bytes) -> str:
    watch, _ = watched(stream)
    assert watch.carried is None
    return watch.trouble


def test_it_is_taken_from_the_devices() -> None:
    stream = made(BEFORE, vtpm(), BEHIND)
    watch, seen = watched(stream)
    assert (watch.trouble, watch.carried) == ("", CARRIED)
    assert seen.facts.opaque_reason is None
    assert seen.same(describe(cut(stream)))  # watching changes nothing of what is said of the stream


def test_the_last_and_the_only_device() -> None:
    for stream in (made(vtpm()), made(BEFORE, vtpm())):
        assert watched(stream)[0].carried == CARRIED


@pytest.mark.parametrize("size", [1, 3, 7, 1000, 4096])
def test_however_it_is_cut(size: int) -> None:
    watch = VtpmWatch()
    describe(pieces_of(made(BEFORE, vtpm(), BEHIND), size), StreamParser(watch))
    assert watch.carried == CARRIED


def test_a_machine_without_one() -> None:
    watch, _ = watched(made(BEFORE, BEHIND))
    assert (watch.trouble, watch.carried) == ("", None)


def test_nothing_is_said_before_the_end() -> None:
    stream = made(BEFORE, vtpm(), BEHIND)
    parser = StreamParser(watch := VtpmWatch())
    notified: list[bool] = []
    watch.notify = lambda: notified.append(watch.told)
    assert watch.trouble == "no main stream of a QEMU was read"
    parser.feed(memoryview(stream)[:-1], final=False)
    assert watch.trouble == "the stream has not come to its end"
    assert (watch.carried, watch.told, notified) == (None, False, [])
    parser.feed(memoryview(stream)[-1:], final=False)
    assert watch.carried == CARRIED
    assert notified == [True]


def test_a_real_one() -> None:
    """QEMU 7.2 with swtpm 0.7, whose guest is its firmware (tests/vectors/README.md)."""
    stream = vector("q72-vtpm.qemu")
    watch, seen = watched(stream)
    assert watch.trouble == ""
    assert watch.carried is not None
    assert seen.facts.opaque_reason is None
    assert [len(part.data) > KIB for part in (watch.carried.permanent, watch.carried.volatile)] == [True, True]
    assert watch.carried.savestate.data == b""
    for size in (1000, 65536):
        again = VtpmWatch()
        assert describe(pieces_of(stream, size), StreamParser(again)).same(seen)
        assert again.carried == watch.carried


@pytest.mark.parametrize("name", ["q10-plain.qemu", "q10-q35.qemu", "q10-bitmap.qemu", "q10-uuid.qemu"])
def test_real_streams_without_one(name: str) -> None:
    watch, _ = watched(vector(name))
    assert (watch.trouble, watch.carried) == ("", None)


# ------------------------------------------------------------------ what a guest may try, and what QEMU never sends


def test_memory_that_looks_like_one_is_memory() -> None:
    """Whatever a guest has in its pages, their places are told by QEMU."""
    forged = vtpm(CarriedVtpm(CarriedPart(0, b"forged"), CarriedPart(0, b"forged"), CarriedPart(0, b""))).pack(99)
    page = footer(2) + forged + bytes(4096 - len(footer(2) + forged))
    assert len(page) == 4096
    parts = Ram("page", 4096, b"pc.ram").pack()[:-4096] + page
    stream = made(BEFORE, vtpm(), BEHIND).replace(section(3, 2, None, EOS), section(3, 2, None, parts + EOS))
    watch, seen = watched(stream)
    assert len(seen.pages) == 1
    assert watch.carried == CARRIED


FORGED = CarriedVtpm(CarriedPart(0, b"forged state"), CarriedPart(0, b"of the guest's"), CarriedPart(0, b""))


def hidden(number: int, within: int) -> bytes:
    """What a guest writes into a device that it fills, which has that number, to look like its end and a vTPM."""
    return b"x" * 40 + footer(within) + vtpm(FORGED).pack(number)[: -len(footer(number))]


def test_a_device_that_imitates_one_spoils_it() -> None:
    """In front of the real one, behind it, and in its place: nobody is made to believe the guest's own."""
    for devices in (
        (Device(b"virtio-console", hidden(99, 10) + footer(99)), vtpm()),
        (vtpm(), Device(b"virtio-console", hidden(99, 11) + footer(99))),
        (Device(b"virtio-console", hidden(99, 10) + footer(99)), BEHIND),
        (Device(b"virtio-console", hidden(99, 10) + footer(99) + Device(b"timer", b"z" * 9).pack(98)),),
    ):
        watch, _ = watched(made(*devices))
        assert watch.trouble
        assert watch.carried is None


def test_a_guest_that_fills_two_devices_forges_none() -> None:
    """It knows everything: the sizes, the names, the numbers. Its own is found, with all the names of the description.

    The device before ends early, the one behind begins early, and the real one is within that: only the lengths tell.
    """
    same = CarriedVtpm(CarriedPart(2, bytes(len(PERMANENT))), CarriedPart(3, bytes(len(VOLATILE))), CarriedPart(0, b""))
    false_begin = BEHIND.pack(12)[: -len(BEHIND.content) - len(footer(12))]
    filled = Device(b"virtio-console", b"x" * 40 + footer(10) + vtpm(same).pack(99) + false_begin + b"y" * 40)
    stream = made(filled, vtpm(), BEHIND)
    assert trouble(stream) == "its devices are not as long as its description tells"


def test_a_guest_cannot_hide_one() -> None:
    """What fills a device in front seems to begin a section with the number of the one behind, and to end with that."""
    begin = footer(10) + b"\x04" + struct.pack(">I", 12) + text(b"y") + bytes(8)
    filled = Device(b"virtio-console", b"x" * 40 + begin + b"y" * 40)
    stream = made(filled, vtpm(), BEHIND)
    assert trouble(stream) == "it has a vTPM by its description, and none was found"


def test_an_end_that_a_guest_imitates_is_none_wherever_the_pieces_are_cut() -> None:
    """All of a machine without a vTPM, or with the guest's own, and a description that fits: then QEMU's rest comes."""
    for forged in ((), (vtpm(FORGED),)):
        short = Device(b"virtio-console", b"x" * 40)
        told = described([short, *forged])
        end = b"".join(one.pack(99) for one in forged) + b"\0\x06" + struct.pack(">I", len(told)) + told
        stream = made(Device(b"virtio-console", short.content + footer(10) + end), vtpm(), BEHIND)
        for cuts in ((), (stream.index(end) + len(end),)):
            watch, _ = watched(stream, cuts)
            assert (watch.carried, watch.trouble) == (None, "the stream is followed no longer (after_end)")


def test_two_of_them() -> None:
    assert trouble(made(vtpm(), vtpm(FORGED, 1))) == "it has two vTPMs"


def test_another_version() -> None:
    other = Device(NAME, content(), 0, 1, vtpm().sizes)
    assert trouble(made(BEFORE, other, BEHIND)) == "its section tpm-emulator has version 1, which is not known here"


def test_sizes_that_the_description_does_not_tell() -> None:
    longer = CarriedVtpm(CarriedPart(2, PERMANENT + b"x"), CarriedPart(3, VOLATILE), CarriedPart(0, b""))
    shifted = CarriedVtpm(CarriedPart(2, PERMANENT + b"x"), CarriedPart(3, VOLATILE[:-1]), CarriedPart(0, b""))
    for other, what in (
        (longer, "its devices are not as long as its description tells"),
        (shifted, "its vTPM is not the one that its description tells of"),
    ):
        assert trouble(made(BEFORE, vtpm(), description=described([BEFORE, vtpm(other)]))) == what
    before = Device(BEFORE.name, BEFORE.content + b"x")
    assert "not as long" in trouble(made(BEFORE, vtpm(), description=described([before, vtpm()])))


@pytest.mark.parametrize(
    "devices",
    [
        [BEFORE, vtpm()],
        [BEFORE, vtpm(), BEHIND, BEHIND],
        [vtpm(), BEFORE, BEHIND],
        [BEFORE, vtpm(CARRIED, 1), BEHIND],
        [],
    ],
)
def test_devices_that_the_description_does_not_tell(devices: list[Device]) -> None:
    stream = made(BEFORE, vtpm(), BEHIND, description=described(devices))
    assert trouble(stream) == "its devices are not those that its description names"


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"devices": [{}]}', b"\xff\xfe", b"[" * 100_000])
def test_a_description_that_is_none(text: bytes) -> None:
    assert trouble(made(vtpm(), description=text)) == "its description is none"


def test_parts_and_descriptions_have_a_most() -> None:
    large = CarriedVtpm(CarriedPart(2, bytes(VTPM_STATE_BYTES_MAX)), CarriedPart(3, VOLATILE), CarriedPart(0, b""))
    assert watched(made(BEFORE, vtpm(large), BEHIND))[0].carried == large
    more = CarriedVtpm(CarriedPart(2, bytes(VTPM_STATE_BYTES_MAX + 1)), CarriedPart(3, b"v"), CarriedPart(0, b""))
    watch, seen = watched(made(BEFORE, vtpm(more), BEHIND))
    assert watch.trouble == f"a part of its vTPM has {VTPM_STATE_BYTES_MAX + 1} bytes"
    assert seen.facts.opaque_reason is None  # it is passed as any device
    stream = made(vtpm(), description=described([vtpm()]) + b" " * (4 << 20))
    assert "its description has 4" in trouble(stream)


def test_more_devices_than_any_machine_has() -> None:
    devices = [Device(b"d", b"", number) for number in range(QEMU_DEVICES_MAX)]
    assert trouble(made(*devices, vtpm())) == "it has too many devices"
    assert watched(made(*devices[1:], vtpm()))[0].carried == CARRIED


def test_a_stream_that_is_followed_no_longer() -> None:
    stream = made(BEFORE, vtpm(), BEHIND).replace(footer(11), b"\x7e\0\0\0\x0c")
    assert trouble(stream) == "the stream is followed no longer (footer)"
    assert trouble(made(vtpm()) + b"more") == "the stream is followed no longer (after_end)"
    assert trouble(b"not QEMU's") == "what comes is no stream of a QEMU's that can be read"


def test_two_main_streams_in_a_migration() -> None:
    watch = VtpmWatch()
    for _ in range(2):
        describe(cut(made(vtpm())), StreamParser(watch))
    assert (watch.carried, watch.trouble) == (None, "the migration has two main streams")


@given(st.lists(st.integers(0, 12_000), max_size=12), st.lists(st.tuples(st.integers(0, 12_000), st.integers(1, 255))))
def test_changed_streams_lose_no_byte_and_forge_no_vtpm(cuts: list[int], changes: list[tuple[int, int]]) -> None:
    """Bytes of the state itself may change: that is for the channel's digests, and for the vTPM's own keys."""
    changed = bytearray(made(BEFORE, vtpm(), BEHIND))
    for place, by in changes:
        changed[place % len(changed)] ^= by
    watch, seen = watched(bytes(changed), cuts)
    assert seen.size == len(changed)
    if watch.carried is not None:
        assert (len(watch.carried.permanent.data), len(watch.carried.volatile.data)) == (len(PERMANENT), len(VOLATILE))


@given(st.integers(0, 12_000), st.binary(min_size=1, max_size=60))
def test_bytes_put_in_between_lose_no_byte(place: int, data: bytes) -> None:
    stream = made(BEFORE, vtpm(), BEHIND)
    place %= len(stream)
    _, seen = watched(stream[:place] + data + stream[place:], [place, place + 1])
    assert seen.size == len(stream) + len(data)

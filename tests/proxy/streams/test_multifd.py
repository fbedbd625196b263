"""What the parser of QEMU's multifd channels understands, and what it carries as it is."""

import struct

import pytest

from proxy.limits import MULTIFD_PAGES_MAX
from tests.proxy.streams.describing import Described, cut, describe
from tests.proxy.streams.made import (
    PAGE,
    multifd_device,
    multifd_init,
    multifd_packet,
    number_of,
    page,
    vector,
)

RAM = number_of(b"pc.ram")


def seen(*parts: bytes) -> Described:
    return describe(cut(multifd_init() + b"".join(parts)))


def test_pages_lie_behind_the_offsets_and_zero_pages_are_only_named() -> None:
    stream = multifd_init() + multifd_packet([5 * PAGE, 0], [9 * PAGE]) + multifd_packet([PAGE], block=b"pc.bios")
    said = describe(cut(stream))
    assert [pfn for _, pfn in said.pages] == [RAM | 5, RAM, number_of(b"pc.bios") | 1]
    assert said.marked == [RAM | 9]
    assert [stream[at : at + PAGE] for at, _ in said.pages] == [page(5), page(0), page(1)]
    assert (said.facts.pages_zero_marked, said.facts.records) == (1, {"INIT": 1, "PACKET": 2})
    assert sorted(block.name for block in said.facts.blocks.values()) == ["pc.bios", "pc.ram"]
    assert said.facts.opaque_reason is None


def test_channels_and_the_main_stream_call_a_page_by_one_number() -> None:
    main = describe(cut(vector("q10-plain.qemu")))
    channel = describe(cut(vector("q10-multifd-legacy-1.multifd")))
    assert set(channel.facts.blocks) <= set(main.facts.blocks)


@pytest.mark.parametrize("allocated", [0, 128])
def test_sync_packets_of_old_and_new_versions(allocated: int) -> None:
    """Newer ones leave the count at 0 and send the whole header all the same; older ones repeat a stale size."""
    sync = multifd_packet(flags=1, allocated=allocated, size=524288 if allocated else 0)
    said = seen(sync, multifd_packet([PAGE]), sync)
    assert said.facts.records == {"INIT": 1, "SYNC": 2, "PACKET": 1}
    assert len(said.pages) == 1
    assert said.facts.opaque_reason is None


@pytest.mark.parametrize("method", [1, 2, 4, 8, 16])
def test_compressed_packets_are_passed_by_their_size(method: int) -> None:
    packet = multifd_packet([PAGE, 2 * PAGE], [3 * PAGE], flags=method << 1, compressed=b"x" * 99)
    said = seen(packet, multifd_packet([PAGE]))
    assert said.facts.pages_compressed == 2
    assert sorted(said.marked) == [RAM | 1, RAM | 2, RAM | 3]
    assert len(said.pages) == 1
    assert said.facts.opaque_reason is None


def test_device_state_is_passed_by_its_size() -> None:
    said = seen(multifd_device(b"vfio" * 999), multifd_packet([PAGE]), multifd_device(b""))
    assert said.facts.records["DEVICE_STATE"] == 2
    assert len(said.pages) == 1


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (bytes(12), "magic"),
        (struct.pack(">III", 0x11223344, 2, 0), "version"),
        (struct.pack(">III", 0x11223344, 1, 1 << 7), "multifd_flags"),
        (multifd_packet([PAGE] * 2, allocated=MULTIFD_PAGES_MAX + 1), "multifd_pages"),
        (struct.pack(">IIIIIIQIIQQQ256s", 0x11223344, 1, 0, 2, 2, 8192, 0, 1, 0, 0, 0, 0, b""), "multifd_pages"),
        (multifd_packet([PAGE], size=16384), "page_size"),
        (multifd_packet([PAGE + 1]), "page_offset"),
        (multifd_packet([1 << 52]), "page_offset"),
    ],
)
def test_what_surprises_makes_the_rest_opaque(packet: bytes, reason: str) -> None:
    said = seen(multifd_packet([PAGE]), packet, bytes(999))
    assert said.facts.opaque_reason == reason
    assert len(said.pages) == 1


def test_the_guests_uuid() -> None:
    assert describe(cut(multifd_init(bytes(range(16))))).facts.vm_uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert describe(cut(multifd_init())).facts.vm_uuid is None


@pytest.mark.parametrize(
    ("name", "packets", "data", "zero", "compressed"),
    [
        ("q10-multifd-new-1", 17, 6, 1851, 0),
        ("q10-multifd-new-2", 20, 108, 2261, 0),
        ("q10-multifd-legacy-1", 3, 112, 0, 0),
        ("q10-multifd-zlib", 2, 0, 0, 50),
    ],
)
def test_real_channels(name: str, packets: int, data: int, zero: int, compressed: int) -> None:
    facts = describe(cut(vector(f"{name}.multifd"))).facts
    assert facts.opaque_reason is None
    assert facts.records["PACKET"] == packets
    assert facts.records["SYNC"] == 3
    assert (facts.pages_data, facts.pages_zero_marked, facts.pages_compressed) == (data, zero, compressed)
    assert facts.vm_uuid == "3c8c0f2e-1111-4222-8333-123456789abc"

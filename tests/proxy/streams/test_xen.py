"""What the parsers of xl, libxl and libxc understand, what they carry as it is, and what they say of it."""

import struct

import pytest

from proxy.limits import XEN_RECORD_BYTES_MAX, XL_CONFIG_BYTES_MAX
from tests.proxy.streams.describing import Described, cut, describe
from tests.proxy.streams.made import (
    GO,
    config,
    libxc,
    libxc_header,
    libxl,
    libxl_header,
    page_data,
    record,
    vector,
    xl_header,
)

NOTAB, L1TAB, L4PIN, BROKEN, XALLOC, XTAB = 0x0, 0x1, 0xC, 0xD, 0xE, 0xF
ONE = page_data([(7, NOTAB)])
PV = "xen417-pv.xlmig-up"


def seen(stream: bytes) -> Described:
    return describe(cut(stream))


def opaque(stream: bytes) -> str | None:
    return seen(stream).facts.opaque_reason


# ------------------------------------------------------------------ pages


@pytest.mark.parametrize("order", ["<", ">"])
def test_pages_lie_behind_the_table_in_the_order_of_the_entries_that_carry_one(order: str) -> None:
    entries = [(5, NOTAB), (6, XTAB), (9, L1TAB), (10, BROKEN), (11, XALLOC), (2, L4PIN)]
    said = seen(libxc(page_data(entries, order), order=order))
    first = 40 + 8 + 8 + 8 * len(entries)
    assert said.pages == [(first, 5), (first + 4096, 9), (first + 8192, 2)]
    assert said.words == [pfn | kind << 60 for pfn, kind in entries]
    assert (said.facts.entries_xtab, said.facts.entries_broken, said.facts.entries_xalloc) == (1, 1, 1)
    assert said.facts.opaque_reason is None
    assert said.marked == []


def test_a_batch_of_entries_without_pages() -> None:
    said = seen(libxc(page_data([(number, XTAB) for number in range(1024)]), ONE))
    assert said.facts.entries_xtab == 1024
    assert [pfn for _, pfn in said.pages] == [7]


def test_a_pfn_that_comes_again_comes_again() -> None:
    assert [pfn for _, pfn in seen(libxc(ONE, ONE, ONE)).pages] == [7, 7, 7]


def test_reserved_bits_are_not_looked_at() -> None:
    """docs/specs/libxc-migration-stream.pandoc: reserved fields are ignored during restore."""
    entry = struct.pack("<Q", 0x0AB0_0000_0000_0007)
    stream = libxc(record(1, struct.pack("<II", 1, 0xFFFF_FFFF) + entry + bytes(4096)))
    said = seen(stream[:18] + b"\xff" * 6 + stream[24:])
    assert [pfn for _, pfn in said.pages] == [0xB0_0000_0000_0007 & (1 << 52) - 1]
    assert said.facts.opaque_reason is None


# ------------------------------------------------------------------ records


def test_records_are_counted_by_the_names_of_the_specification() -> None:
    said = seen(libxc(record(0x10), ONE, record(7, bytes(4096)), record(0xD), ONE, record(0x80000009, b"what")))
    assert said.facts.records == {
        "STATIC_DATA_END": 1,
        "PAGE_DATA": 2,
        "SHARED_INFO": 1,
        "VERIFY": 1,
        "OPTIONAL": 1,
        "END": 1,
    }
    assert said.facts.opaque_reason is None
    assert said.facts.hypervisor == "Xen 4.17"
    assert said.facts.machine == "x86 PV"


def test_empty_records_of_older_versions_are_records() -> None:
    """Zero-length HVM_PARAMS and X86_PV_VCPU_* exist (Xen 4.6 to 4.8)."""
    said = seen(libxc(record(0xA), record(4), record(6), ONE, version=2, kind=2, xen=(4, 6)))
    assert said.facts.opaque_reason is None
    assert (said.facts.hypervisor, said.facts.machine) == ("Xen 4.6", "x86 HVM")


def test_a_converted_stream_says_so() -> None:
    assert seen(libxc(ONE, xen=(0, 2))).facts.hypervisor == "Xen before 4.6, converted"


def test_a_libxc_stream_with_checkpoints_goes_on_behind_each() -> None:
    said = seen(libxc(ONE, record(0xE), ONE, record(0xE)))
    assert said.facts.records["CHECKPOINT"] == 2
    assert len(said.pages) == 2
    assert said.facts.opaque_reason is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_within_libxl_each_checkpoint_is_followed_by_libxls_records(order: str) -> None:
    """tools/libs/light: after libxc's CHECKPOINT emulator state and CHECKPOINT_END, then libxc's records go on."""
    emulator = record(3, struct.pack(f"{order}II", 2, 0) + b"state", order)
    batch = page_data([(7, NOTAB)], order)
    again = record(0xE, order=order) + emulator + record(4, order=order) + batch
    said = seen(libxl(libxc(batch, again, again, order=order), emulator, order=order))
    assert len(said.pages) == 3
    assert said.facts.records["LIBXL_CHECKPOINT_END"] == 2
    assert said.facts.records["LIBXL_EMULATOR_CONTEXT"] == 3
    assert said.facts.opaque_reason is None


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (libxc(record(0x13)), "mandatory_record"),
        (libxl_header() + record(6), "mandatory_record"),
        (libxc_header() + record(0, b"x"), "record_length"),
        (libxc_header() + struct.pack("<II", 9, XEN_RECORD_BYTES_MAX + 1), "record_length"),
        (libxl_header() + struct.pack("<II", 3, XEN_RECORD_BYTES_MAX + 1), "record_length"),
        (libxl_header() + record(1, b"x"), "record_length"),
        (libxl_header() + record(4), "record_order"),
        (libxl(libxc(record(0xE) + record(0))), "record_order"),
        (libxl(libxc(record(0xE) + record(1))), "record_order"),
        (libxc(ONE, version=1), "version"),
        (libxc(ONE, version=4), "version"),
        (libxl_header(version=3), "version"),
        (libxc(ONE, kind=3), "domain_type"),
        (libxc(ONE, shift=13), "page_size"),
        (libxl(libxl_header() + bytes(8)), "magic"),
        (libxc(ONE) + b"\0", "after_end"),
        (libxl(libxc(ONE)) + b"\0", "after_end"),
        (xl_header(config()) + libxl(libxc(ONE)) + GO[:-1] + b"!", "after_end"),
        (xl_header(config()) + libxl(libxc(ONE)) + GO + b"!", "after_end"),
        (xl_header(config()) + libxc(ONE), "magic"),
        (xl_header(config(), mandatory=7), "mandatory_flags"),
        (b"Xen saved domain, xl format\n \0 \r" + bytes(16), "byte_order"),
        (libxc(page_data([(1, 5)])), "page_type"),
        (libxc(page_data([(1, 8), (2, 0)])), "page_type"),
        (libxc(record(1, bytes(8))), "page_data_length"),
        (libxc(record(1)), "page_data_length"),
        (libxc(record(1, struct.pack("<II", 0, 0) + bytes(4096))), "page_data_length"),
        (libxc(record(1, struct.pack("<IIQ", 1, 0, 0) + bytes(4095))), "page_data_length"),
        (libxc(record(1, struct.pack("<IIQ", 1, 0, 0))), "page_data_length"),
        (libxc(record(1, struct.pack("<IIQ", 1, 0, XTAB << 60) + bytes(4096))), "page_data_length"),
        (libxc(record(1, struct.pack("<IIQ", 2**32 - 1, 0, 0) + bytes(4096))), "page_data_length"),
    ],
)
def test_what_surprises_makes_the_rest_opaque(stream: bytes, reason: str) -> None:
    said = seen(stream)
    assert said.facts.opaque_reason == reason
    assert said.size == len(stream)


def test_pages_before_a_surprise_stay_described() -> None:
    said = seen(libxc(ONE, record(0x13), ONE))
    assert [pfn for _, pfn in said.pages] == [7]
    assert said.facts.opaque_bytes == len(ONE) + 8


# ------------------------------------------------------------------ xl


def test_an_xl_migration_ends_with_go() -> None:
    said = seen(xl_header(config()) + libxl(libxc(ONE)) + GO)
    assert said.facts.records["XL_GO"] == 1
    assert said.facts.opaque_reason is None
    assert (said.facts.vm_name, said.facts.vm_uuid) == ("guest", "0f9c2f1e-0000-4000-8000-00000000abcd")


def test_a_saved_domain_ends_without() -> None:
    said = seen(xl_header(config()) + libxl(libxc(ONE)))
    assert "XL_GO" not in said.facts.records
    assert said.facts.opaque_reason is None


def test_a_big_endian_header_is_read() -> None:
    said = seen(xl_header(config(), ">") + libxl(libxc(ONE), order=">"))
    assert said.facts.vm_name == "guest"
    assert len(said.pages) == 1


def test_an_old_xl_stream_holds_libxc_at_once() -> None:
    """Without the STREAMv2 flag there is no libxl stream around it."""
    said = seen(xl_header(b"name = 'guest'\n", mandatory=0) + libxc(ONE))
    assert len(said.pages) == 1
    assert said.facts.vm_name is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 20_000,
        b'{"c_info": 1}',
        b'{"c_info": {"name": 1, "uuid": []}}',
        b'{"c_info": {"name": "", "uuid": "0f9c2f1e"}}',
        b'{"c_info": {"name": "a\\u0000b"}}',
        b'{"c_info": {"name": "a\\ud800b"}}',
        b'{"c_info": {"name": "a\\nb"}}',
        b'{"c_info": {"name": "' + b"x" * 256 + b'"}}',
        b'{"c_info": {"name": "one", "name": "other"}}',
        b'{"c_info": {"name": "one"}, "c_info": {"name": "other"}}',
        b'{"n": ' + b"9" * 50_000 + b"}",
        b"\xff\xfe{}",
        '{"c_info": {"name": "utf-16"}}'.encode("utf-16"),
        b'{"c_info": \0 {"name": "behind"}}',
    ],
)
def test_a_configuration_that_tells_no_name_for_certain_gives_none(text: bytes) -> None:
    """A name that stands there twice would be read one way here and another way by xl."""
    said = seen(xl_header(text + b"\0") + libxl(libxc(ONE)))
    assert (said.facts.vm_name, said.facts.vm_uuid) == (None, None)
    assert said.facts.opaque_reason is None
    assert len(said.pages) == 1


def test_a_name_and_a_uuid_are_each_taken_for_themselves() -> None:
    assert seen(xl_header(config(uuid="none"))).facts.vm_name == "guest"
    assert seen(xl_header(config(name=None))).facts.vm_uuid is not None
    assert seen(xl_header(config(uuid="0F9C2F1E-0000-4000-8000-00000000ABCD"))).facts.vm_uuid == (
        "0f9c2f1e-0000-4000-8000-00000000abcd"
    )
    assert seen(xl_header(config(name="Kororā"))).facts.vm_name == "Kororā"


def test_a_configuration_longer_than_any_is_passed_unread() -> None:
    long = config().replace(b"{", b"{" + b" " * XL_CONFIG_BYTES_MAX, 1)
    said = seen(xl_header(long) + libxl(libxc(ONE)))
    assert said.facts.vm_name is None
    assert len(said.pages) == 1


# ------------------------------------------------------------------ real ones


def test_a_real_migration() -> None:
    said = seen(vector(PV))
    assert said.facts.records["PAGE_DATA"] == 27
    assert said.facts.records["XL_GO"] == 1
    assert said.facts.vm_name == "ida"
    assert len(said.pages) == 135
    for at, pfn in said.pages:
        (begins,) = struct.unpack_from("<Q", vector(PV), at)
        assert begins == 0 or begins & (1 << 52) - 1 == pfn


def test_the_streams_within_a_real_one() -> None:
    stream = vector(PV)
    libxl_at, libxc_at = stream.index(b"LibxlFmt"), stream.index(b"\xff" * 8 + b"XENF")
    inner = seen(stream[libxl_at : -len(GO)])
    image = seen(stream[libxc_at : -len(GO) - 8])
    assert inner.facts.opaque_reason is image.facts.opaque_reason is None
    assert len(inner.pages) == len(image.pages) == 135

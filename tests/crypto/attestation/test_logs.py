"""Logs: what they lead the PCRs to, by hand; and bytes that are none."""

import hashlib
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.attestation import eventlog, ima
from crypto.errors import EvidenceMalformed

SPEC = struct.pack("<16sIBBBBI", b"Spec ID Event03\0", 0, 0, 2, 0, 2, 2) + struct.pack("<HHHHB", 4, 20, 0xB, 32, 0)


def old(pcr: int, kind: int, digest: bytes, data: bytes) -> bytes:
    return struct.pack("<II20sI", pcr, kind, digest, len(data)) + data


def event(pcr: int, kind: int, what: bytes, data: bytes = b"told") -> bytes:
    return (
        struct.pack("<IIIH", pcr, kind, 2, 4)
        + hashlib.sha1(what).digest()
        + struct.pack("<H", 0xB)
        + hashlib.sha256(what).digest()
        + struct.pack("<I", len(data))
        + data
    )


LOG = (
    old(0, 3, bytes(20), SPEC)
    + event(0, 3, b"", b"StartupLocality\0\x03")
    + event(0, 8, b"version")
    + event(7, 0x80000001, b"secure boot")
    + event(0, 4, b"separator")
)


@pytest.mark.parametrize(("bank", "size"), [("sha1", 20), ("sha256", 32)])
def test_a_log_leads_to_pcrs(bank: str, size: int) -> None:
    def h(data: bytes) -> bytes:
        return hashlib.new(bank, data).digest()

    events = eventlog.parse(LOG)
    assert [each.pcr for each in events] == [0, 0, 0, 7, 0]
    start = bytes(size - 1) + b"\x03"
    assert eventlog.replay(events, bank) == {
        0: h(h(start + h(b"version")) + h(b"separator")),
        7: h(bytes(size) + h(b"secure boot")),
    }


def test_a_log_in_the_old_layout() -> None:
    log = old(4, 8, b"a" * 20, b"x") + old(4, 8, b"b" * 20, b"")
    first = hashlib.sha1(bytes(20) + b"a" * 20).digest()
    assert eventlog.replay(eventlog.parse(log), "sha1") == {4: hashlib.sha1(first + b"b" * 20).digest()}
    with pytest.raises(EvidenceMalformed):
        eventlog.replay(eventlog.parse(log), "sha256")


@pytest.mark.parametrize(
    "log",
    [
        b"",
        LOG[:-1],
        old(24, 8, bytes(20), b""),
        old(0, 3, bytes(20), SPEC + b"\0"),
        old(0, 3, bytes(20), SPEC[:-1]),
        old(0, 3, bytes(20), SPEC) + struct.pack("<III", 0, 8, 3),
        old(0, 3, bytes(20), SPEC) + struct.pack("<IIIH", 0, 8, 1, 0xC),
        struct.pack("<II20sI", 0, 8, bytes(20), 1 << 30),
    ],
)
def test_no_log(log: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        eventlog.parse(log)


def test_a_start_that_is_told_too_late() -> None:
    log = old(0, 3, bytes(20), SPEC) + event(0, 8, b"x") + event(0, 3, b"", b"StartupLocality\0\x03")
    with pytest.raises(EvidenceMalformed, match="attestation failed") as refusal:
        eventlog.replay(eventlog.parse(log), "sha256")
    assert "after PCR 0" in refusal.value.told


def measured(path: bytes, content: bytes, *, violation: bool = False) -> bytes:
    digest = b"sha256:\0" + (bytes(32) if violation else hashlib.sha256(content).digest())
    template = struct.pack("<I", len(digest)) + digest + struct.pack("<I", len(path) + 1) + path + b"\0"
    told = bytes(20) if violation else hashlib.sha1(template).digest()
    return struct.pack("<I", 10) + told + struct.pack("<I", 6) + b"ima-ng" + struct.pack("<I", len(template)) + template


LIST = measured(b"boot_aggregate", b"pcrs") + measured(b"/bin/sh", b"shell") + measured(b"/tmp/x", b"", violation=True)


@pytest.mark.parametrize("padded", [False, True], ids=["own digest", "padded SHA-1"])
def test_a_list_leads_to_its_pcr_at_any_length(padded: bool) -> None:
    entries = ima.parse(LIST)
    assert [each.path for each in entries] == [b"boot_aggregate", b"/bin/sh", b"/tmp/x"]
    assert entries[1].label == f"sha256:{hashlib.sha256(b'shell').hexdigest()}"
    value = bytes(32)
    for count, entry in enumerate(entries, 1):
        own, sha1 = hashlib.sha256(entry.template).digest(), hashlib.sha1(entry.template).digest().ljust(32, b"\0")
        by = b"\xff" * 32 if entry.violation else sha1 if padded else own
        value = hashlib.sha256(value + by).digest()
        assert ima.covered(entries, "sha256", value) == entries[:count]
    assert ima.covered(entries, "sha256", bytes(32)) == ()
    assert ima.covered(entries, "sha256", b"?" * 32) is None


@pytest.mark.parametrize(
    "data",
    [
        LIST[:-1],
        LIST + b"\0",
        LIST.replace(b"/bin/sh", b"/bin/zh"),
        LIST.replace(b"ima-ng", b"ima-xx"),
        struct.pack("<I20sI", 10, bytes(20), 1 << 31),
    ],
    ids=["short", "long", "another path", "template", "huge"],
)
def test_no_list(data: bytes) -> None:
    with pytest.raises(EvidenceMalformed):
        ima.parse(data)


@pytest.mark.parametrize(("parse", "seed"), [(eventlog.parse, LOG), (ima.parse, LIST)], ids=["eventlog", "ima"])
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 8), st.binary(max_size=8)), max_size=5))
def test_nothing_but_the_documented_error(
    parse: Callable[[bytes], object], seed: bytes, changes: list[tuple[int, int, bytes]]
) -> None:
    changed = bytearray(seed)
    for at, gone, put in changes:
        changed[at : at + gone] = put
    try:
        parse(bytes(changed))
    except EvidenceMalformed:
        return

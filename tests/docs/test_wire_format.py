"""docs/wire-format.md says what the code does: layouts, messages, numbers, labels, limits, states.

Where one of these tests fails the code has changed: put the row that the message shows into the page.
"""

import inspect
import itertools
import re
import struct
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from crypto import keys, records, tls
from proxy import control, limits, session, wire

PATH = Path(__file__).parents[2] / "docs" / "wire-format.md"
PAGE = PATH.read_text(encoding="utf-8")

Row = tuple[str, ...]


def tables() -> list[list[Row]]:
    """All tables of the page: rows of cells, the header first."""
    found: list[list[Row]] = []
    before = ""
    for line in PAGE.splitlines():
        if line.startswith("| "):
            if not before.startswith("|"):
                found.append([])
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            if set("".join(cells)) != {"-"}:
                found[-1].append(cells)
        before = line
    return [table for table in found if table]


def table(*header: str) -> list[Row]:
    """The rows of the one table whose header begins with these cells."""
    (match,) = [rows for rows in tables() if rows[0][: len(header)] == header]
    return match[1:]


def section(title: str) -> str:
    """The text under a heading, up to the next heading of the same depth or less deep."""
    start = re.search(rf"^(#+) {re.escape(title)}$", PAGE, re.MULTILINE)
    assert start, title
    end = re.search(rf"^#{{1,{len(start[1])}}} ", PAGE[start.end() :], re.MULTILINE)
    return PAGE[start.end() :][: end.start() if end else None]


# ---- layouts

FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "16 bytes": "16s", "pad": "x"}


@pytest.mark.parametrize(
    ("title", "layout", "size"),
    [
        ("Records", records._HEADER, records.HEADER_BYTES),
        ("Frames", wire.FRAME_HEADER, wire.FRAME_HEADER_BYTES),
        ("Acknowledgements", wire.ACK_ENTRY, 20),
    ],
)
def test_layouts(title: str, layout: struct.Struct, size: int) -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| ([^|]+) \|", section(title), re.MULTILINE)
    form = ">"
    for offset, name, kind in rows:
        assert struct.calcsize(form) == int(offset), name
        form += FORMATS[kind.strip()]
    assert form == layout.format
    assert struct.calcsize(form) == size


def test_the_frame_header_has_the_fields_of_the_code_in_order() -> None:
    names = re.findall(r"^\| \d+ \| `(\w+)` \|", section("Frames"), re.MULTILINE)
    documented = [name for name in names if name not in {"flags", "reserved"}]
    assert documented == list(inspect.signature(wire.FrameHeader).parameters)


@pytest.mark.parametrize(
    ("title", "bytes_drawn"),
    [("Lanes", 20), ("Records", 20), ("Frames", 64), ("Acknowledgements", 20)],
)
def test_boxes_have_the_height_of_what_they_draw(title: str, bytes_drawn: int) -> None:
    box = re.search(r"^ {5}0 +1 +2 +3\n((?:    [+|].*\n)+)", section(title), re.MULTILINE)
    assert box
    lines = box[1].splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [line for line in lines if line.startswith("    |")]
    fixed = list(itertools.takewhile(lambda cell: not re.search("ciphertext, |body, |record HELLO", cell), cells))
    assert len(fixed) * 4 == bytes_drawn


def test_the_sizes_of_a_hello() -> None:
    text = section("Lanes")
    assert f"{wire.LANE_PREFIX_BYTES + records.OVERHEAD_BYTES} bytes in all" in text
    assert f"LANE_OK, {records.OVERHEAD_BYTES} bytes" in text
    assert bytes(int(digits, 16) for digits in re.findall(r"0x([0-9a-f]{2})  '", text)) == wire.LANE_MAGIC


def test_first_bytes() -> None:
    rows = dict(table("first byte", "what follows"))
    assert {f"`0x{wire.TLS_FIRST_BYTE:02x}`", f"`0x{wire.LANE_FIRST_BYTE:02x}` (`K`)"} < rows.keys()
    prefixes = rows[f"`0x{wire.LANE_FIRST_BYTE:02x}` (`K`)"]
    assert prefixes.startswith(f"{wire.LANE_PREFIX_BYTES} bytes ")
    assert f"`{wire.LANE_MAGIC.decode()}` and a token" in prefixes
    assert f"`{wire.RESUME_MAGIC.decode()}` and a route" in prefixes
    assert f"The preface.** {wire.LANE_PREFIX_BYTES} bytes before TLS" in section("Resume")


# ---- numbers


@pytest.mark.parametrize(
    ("header", "numbers"),
    [
        ("record type", records.RecordType),
        ("frame kind", wire.FrameKind),
        ("codec", wire.Codec),
        ("suite", keys.Suite),
        ("direction", keys.Direction),
    ],
)
def test_numbers(header: str, numbers: type[IntEnum]) -> None:
    documented = {int(value): re.split(r"[ ,]", name)[0] for value, name in table(header, "name")}
    assert documented == {member.value: member.name for member in numbers}


def test_frame_flags() -> None:
    documented = {row[0]: row[1] for row in table("flags of the FRAME record")}
    assert set(documented) == {"0", str(int(wire.FrameFlags.FIRST)), str(int(wire.FrameFlags.LAST)), "3"}
    assert documented[str(int(wire.WHOLE_FRAME))].startswith("a whole frame")
    assert documented[str(int(wire.FrameFlags.FIRST))] == "the first part"
    assert documented[str(int(wire.FrameFlags.LAST))] == "the last part"


def test_tls() -> None:
    values = dict(row[:2] for row in table("parameter", "value"))
    assert re.findall(r"`(TLS_\w+)`", values["cipher suites"]) == tls.CIPHERSUITES.decode().split(":")
    assert re.findall(r"`([\w-]+)`", values["key exchange"])[0] == tls.GROUP_REQUIRED
    offered = [word for word in re.findall(r"`([\w-]+)`", values["key exchange"]) if not word.startswith("--")]
    assert offered == tls.GROUPS_CLASSICAL.split(":")
    assert f"`{keys.EXPORTER_LABEL.decode()}`" in values["exporter"]


# ---- control messages


PARTS = {
    control.Bank: "bank",
    control.Wanted: "wanted",
    control.StoredSegment: "stored segment",
    control.LaneGrant: "lane grant",
    control.LaneProgress: "lane progress",
    control.ChannelState: "channel state",
    control.Evidence: "evidence",
    control.HostFacts: "host",
    control.Finding: "finding",
    control.LogHead: "log head",
}


def _bounds(kind: Any) -> str:
    """A field's type in the page's words."""
    match kind:
        case msgspec.inspect.IntType():
            least = kind.ge if kind.ge is not None else "?"
            most = kind.le if kind.le is not None else (kind.lt - 1 if kind.lt is not None else "?")
            return f"int {least}..{most}"
        case msgspec.inspect.BytesType() if kind.min_length == kind.max_length:
            return f"bytes, {kind.min_length}"
        case msgspec.inspect.BytesType():
            return f"bytes, at most {kind.max_length}"
        case msgspec.inspect.StrType() if kind.pattern:
            return f"string `{kind.pattern}`"
        case msgspec.inspect.StrType():
            return f"string, at most {kind.max_length} characters"
        case msgspec.inspect.VarTupleType():
            return f"list of {kind.min_length or 0}..{kind.max_length}: {_bounds(kind.item_type)}"
        case msgspec.inspect.BoolType():
            return "bool"
        case msgspec.inspect.LiteralType():
            return "one of " + ", ".join(f"`{value}`" for value in kind.values)
        case msgspec.inspect.StructType():
            return PARTS[kind.cls]
        case msgspec.inspect.UnionType(types=(of, msgspec.inspect.NoneType())):
            return f"{_bounds(of)} or nil"
    raise AssertionError(kind)


def _fields(kind: type[msgspec.Struct]) -> list[tuple[str, str]]:
    described = msgspec.inspect.type_info(kind)
    assert isinstance(described, msgspec.inspect.StructType)
    assert described.forbid_unknown_fields
    return [
        (f"`{field.encode_name}`", _bounds(field.type) + ("" if field.required else ", may be absent"))
        for field in described.fields
    ]


def _grouped(rows: list[Row], name: int, field: int, kind: int) -> dict[str, list[tuple[str, str]]]:
    """Rows under the name that the first row of each group carries."""
    groups: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for row in rows:
        current = row[name] or current
        fields = groups.setdefault(current, [])
        if row[field]:
            fields.append((row[field], row[kind]))
    return groups


def test_messages_and_their_fields() -> None:
    documented = _grouped(table("type", "way", "field"), 0, 2, 3)
    coded = {f"`{kind.__struct_config__.tag}`": _fields(kind) for kind in control.Message.__args__}
    assert documented == coded


def test_parts_of_messages() -> None:
    documented = _grouped(table("part", "field"), 0, 1, 2)
    assert documented == {name: _fields(kind) for kind, name in PARTS.items()}


def test_the_example_of_a_message() -> None:
    block = section("Messages").partition("An example:")[2]
    drawn = "".join(re.match(r" *((?:[0-9a-f]{2}(?: |$))*)", line)[1] for line in block.splitlines())  # type: ignore[index]
    message = control.Heartbeat(7, (control.LaneProgress(0, 4242),))
    assert bytes.fromhex(drawn) == control.encode(message), control.encode(message).hex(" ")
    assert f"{len(control.encode(message)) - 4} bytes" in block


def test_the_framing_of_messages() -> None:
    assert f"u32 (≤ {limits.CONTROL_MESSAGE_BYTES_MAX})" in section("Control")


# ---- states


def _tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def test_the_state_diagram_is_the_code_s_table() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+): (\w+)$", section("State"), re.MULTILINE))
    assert drawn == {(state.value, to.value, _tag(kind)) for (state, kind), to in session.MOVES.items()}


def test_what_each_side_takes_in_each_state() -> None:
    columns = {session.Role.SOURCE: 1, session.Role.DESTINATION: 2}
    rows = {row[0]: row for row in table("state", "the source takes")}
    documented = {
        (role, state): set(rows[state.value][column].split(", "))
        for role, column in columns.items()
        for state in session.State
    }
    assert documented == {at: {_tag(kind) for kind in kinds} for at, kinds in session.ACCEPTED.items()}


# ---- keys


def test_the_key_schedule_as_the_page_has_it_gives_the_code_s_keys() -> None:
    text = section("Key schedule")
    labels = dict(
        re.findall(
            r'^    (key|iv|secret)\[n(?: \+ 1)?\] += HKDF-Expand-SHA256\(secret\[n\], "([^"]+)"', text, re.MULTILINE
        )
    )
    prefix = re.search(r'info +=\s"([^"]+)" ‖ suite u8 ‖ direction u8 ‖ lane u16', text)
    assert prefix
    exporter, session_id = bytes(range(32)), keys.SessionId(bytes(range(100, 116)))
    source, destination = b"s" * 32, b"d" * 32
    suite, direction, lane = keys.Suite.CHACHA20_POLY1305, keys.Direction.BACKWARD, keys.LaneId(513)

    info = prefix[1].encode() + struct.pack(">BBH", suite, direction, lane) + source + destination
    assert f"`info` has {len(info)} bytes" in text
    secret = HKDF(SHA256(), 32, session_id, info).derive(exporter)
    coded = keys.EpochKeys(
        suite,
        keys.lane_secret(
            exporter,
            session_id,
            keys.lane_info(
                suite=suite,
                direction=direction,
                lane=lane,
                source_leaf_sha256=source,
                destination_leaf_sha256=destination,
            ),
        ),
    )
    for _ in range(3):
        assert coded.key == HKDFExpand(SHA256(), 32, labels["key"].encode()).derive(secret)
        assert coded.iv == HKDFExpand(SHA256(), 12, labels["iv"].encode()).derive(secret)
        secret = HKDFExpand(SHA256(), 32, labels["secret"].encode()).derive(secret)
        coded = coded.following()
    assert f'TLS-Exporter("{keys.EXPORTER_LABEL.decode()}", session id, {keys.SECRET_BYTES})' in text


def test_the_proof_of_a_resumption_as_the_page_has_it_is_the_code_s() -> None:
    text = section("Key schedule")
    secret_label = re.search(r'resume +=.*salt = session id, "([^"]+)", 32\)', text)
    proof_label = re.search(r'proof +=\sHMAC-SHA256\(resume, "([^"]+)" ‖ direction u8 ‖ exporter', text)
    assert secret_label
    assert proof_label
    first, new, session_id = bytes(range(32)), bytes(range(50, 82)), keys.SessionId(bytes(range(100, 116)))
    secret = HKDF(SHA256(), 32, session_id, secret_label[1].encode()).derive(first)
    for direction in keys.Direction:
        mac = HMAC(secret, SHA256())
        mac.update(proof_label[1].encode() + struct.pack(">B", direction) + new)
        assert keys.ResumeSecret(first, session_id).proof(direction, new) == mac.finalize()


def test_names_and_aliases_of_segments_as_the_page_has_them_are_the_code_s() -> None:
    text = section("Key schedule")
    name_label = re.search(r'name +=.*exporter of the first, salt = session id, "([^"]+)", 32\)\[:16\]', text)
    alias_label = re.search(
        r'alias +=\sHMAC-SHA256\(name, "([^"]+)" ‖ direction u8 ‖ exporter of this one\)\[:16\]', text
    )
    assert name_label
    assert alias_label
    first, new, session_id = bytes(range(32)), bytes(range(50, 82)), keys.SessionId(bytes(range(100, 116)))
    name = HKDF(SHA256(), 32, session_id, name_label[1].encode()).derive(first)[:16]
    assert keys.segment_name(first, session_id) == name
    for direction in keys.Direction:
        mac = HMAC(name, SHA256())
        mac.update(alias_label[1].encode() + struct.pack(">B", direction) + new)
        assert keys.segment_alias(name, direction, new) == mac.finalize()[:16]
    assert f"Both have {keys.SEGMENT_NAME_BYTES} bytes" in text


# ---- limits


def _value(name: str, value: float) -> str:
    """A limit as the page writes it."""
    if "SECONDS" in name:
        return f"{value:g} s" if value < 86_400 else f"{value / 86_400:g} days"
    if "BYTES" not in name:
        return f"{value}"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size} {unit}"
    return f"{value} bytes"


RELAY = {name: value for name, value in vars(limits).items() if name.isupper() and name not in {"KIB", "MIB"}}
SEALED = {
    name: getattr(module, name)
    for module, names in (
        (records, ("HEADER_BYTES", "TAG_BYTES", "PAYLOAD_BYTES_MAX", "EPOCH_BYTES_SOFT", "EPOCH_BYTES_HARD")),
        (keys, ("EPOCH_MAX", "LANE_ID_MAX")),
        (tls, ("PRE_AUTHENTICATION_BYTES_MAX",)),
    )
    for name in names
}


@pytest.mark.parametrize(("which", "coded"), [(0, RELAY), (1, SEALED)], ids=["proxy", "crypto"])
def test_every_limit(which: int, coded: dict[str, float]) -> None:
    found = [rows for rows in tables() if rows[0] == ("limit", "value")]
    rows = [(f"`{name}`", _value(name, value)) for name, value in coded.items()]
    assert found[which][1:] == rows, "run this file as a program: it writes the tables anew"


def test_every_limit_that_the_text_names_exists() -> None:
    known = {name for module in (limits, records, keys, tls) for name in vars(module)}
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PAGE)) - set(re.findall(r"`(TLS_\w+)`", PAGE))
    assert named <= known


def test_the_links_within_the_page() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors


def write_limits() -> None:
    """Write the tables of limits anew."""
    page = PAGE
    for coded in (RELAY, SEALED):
        rows = "".join(f"| `{name}` | {_value(name, value)} |\n" for name, value in coded.items())
        first = re.escape(next(iter(coded)))
        page = re.sub(rf"(\| limit \| value \|\n.*\n)\| `{first}`(?:.*\n)(?:\| .*\n)*", rf"\g<1>{rows}", page)
    PATH.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write_limits()

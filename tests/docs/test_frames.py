"""docs/frames.md says what chunking/frame.py does: header, flags, kinds, limits."""

import re
import struct
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

import pytest

from chunking import limits
from chunking.frame import HEADER, LARGE, LAYOUT, Flags, Header, PageKind, runs_max

PAGE = (Path(__file__).parents[2] / "docs" / "frames.md").read_text(encoding="utf-8")
FORMATS = {"u8": "B", "u16": "H", "u32": "I", "pad": "x"}


def test_the_header() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (\w+) \|", PAGE, re.MULTILINE)
    form = ">"
    for offset, name, kind in rows:
        assert struct.calcsize(form) == int(offset), name
        form += FORMATS[kind]
    assert form == HEADER.format
    assert f"header, {HEADER.size} bytes" in PAGE
    assert [name for _, name, _ in rows] == ["layout", *Header._fields[:2], "reserved", *Header._fields[2:]]


@pytest.mark.parametrize(("column", "numbers"), [("kind", PageKind), ("flag", Flags)])
def test_numbers(column: str, numbers: type[IntEnum] | type[IntFlag]) -> None:
    start = PAGE.index(f"| {column} | name |")
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", PAGE[start : PAGE.index("\n\n", start)], re.MULTILINE)
    members: Any = numbers
    assert [(int(number), name) for number, name in rows] == [
        (member.value, member.name) for member in members if member.name != "ALL"
    ]


def test_what_the_text_says() -> None:
    assert f"layout {LAYOUT}." in PAGE
    assert LARGE == 255
    assert (limits.CHAINS_MAX, limits.ZSTD_WINDOW_LOG_MAX) == (16, 25)
    assert limits.FRAME_BODY_SLACK_BYTES == 64 * limits.KIB
    assert limits.ALONE_BYTES_MIN == limits.MIB
    assert runs_max(800) == 101

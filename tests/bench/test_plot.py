"""The picture: a valid PNG of whatever a run has."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from bench.plot import DOTS_PER_INCH, SIZE_INCHES, main, write_plot
from bench.processes import BenchError
from bench.report import to_json
from tests.bench.canned import canned_run

PICTURE_BYTES_MAX = 200 * 1024


def run_of() -> dict[str, Any]:
    """A run as its file has it."""
    document: dict[str, Any] = json.loads(json.dumps(to_json(canned_run())))
    return document


def check_png(path: Path) -> bytes:
    """Walk the chunks, check each one's CRC and the size in the header (PNG specification, section 5); its pixels."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, pixels = 8, [], b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        [crc] = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        if kind == b"IHDR":
            assert struct.unpack(">II", body[:8]) == tuple(int(inches * DOTS_PER_INCH) for inches in SIZE_INCHES)
        if kind == b"IDAT":
            pixels += body
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    return zlib.decompress(pixels)


def test_a_run_becomes_a_png(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    write_plot(run_of(), path)
    assert check_png(path)
    assert path.stat().st_size < PICTURE_BYTES_MAX


@pytest.mark.parametrize("section", ["ladder", "peers", "lanes", "sessions", "qemu"])
def test_a_section_that_was_not_measured_leaves_its_panel_empty(section: str, tmp_path: Path) -> None:
    whole, lacking = tmp_path / "whole.png", tmp_path / "lacking.png"
    run = run_of()
    write_plot(run, whole)
    del run["sections"][section]
    write_plot(run, lacking)
    assert check_png(lacking) != check_png(whole)


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="No such file or directory; name another file"):
        write_plot(run_of(), tmp_path / "absent" / "run.png")


def test_a_kept_run_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, picture = tmp_path / "run.json", tmp_path / "run.png"
    kept.write_text(json.dumps(run_of()))
    assert main([str(kept), str(picture)]) == 0
    assert check_png(picture)
    assert main([str(kept)]) == 2
    assert main([str(picture), str(kept)]) == 2
    assert "usage:" in capsys.readouterr().err

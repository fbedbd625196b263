"""`korora inspect`, on real streams: small ones from tests/vectors, whole ones from the corpus where it is."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from korora.inspect import plot
from korora.inspect.inspection import Inspection, inspect, text
from korora.inspect.limits import MIB
from korora.inspect.show import render
from korora.inspect.source import opened
from proxy.errors import ConfigurationError

CHECKOUT = Path(__file__).parents[3]
VECTORS = CHECKOUT / "tests" / "vectors" / "streams"
CORPUS = Path(os.environ.get("KORORA_SHARED", CHECKOUT.parent / "shared")) / "corpus"

needs_corpus = pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus of whole streams here (KORORA_SHARED)")


def look(path: Path, *, best: bool = False) -> Inspection:
    with opened(path) as source:
        return inspect(source, cache_bytes=256 * MIB, best=best)


def korora(*arguments: str, data: bytes | None = None, program: str = "") -> "subprocess.CompletedProcess[bytes]":
    command = [sys.executable, "-c", f"{program}\nfrom korora.__main__ import main\nmain()", "inspect", *arguments]
    return subprocess.run(command, input=data, capture_output=True, timeout=50, check=False)


@pytest.fixture
def stream() -> bytes:
    packed = (VECTORS / "xen417-pv.xlmig-up.zst").read_bytes()
    return zstandard.ZstdDecompressor().stream_reader(packed).read()


# ------------------------------------------------------------------ what is said


@pytest.mark.parametrize("name", sorted(path.name for path in VECTORS.glob("*.zst")))
def test_small_real_streams(name: str) -> None:
    found = look(VECTORS / name)
    said = found.as_json()
    assert said["stream_bytes"] == said["techniques"][0]["wire_bytes"] > 0
    assert sum(said["kinds"].values()) == said["pages"]["with_data"]
    assert (
        said["format"]
        == {"xlmig-up": "xl", "xlsave": "xl", "qemu": "qemu", "multifd": "qemu-multifd"}[name.split(".")[1]]
    )
    assert {each["name"] for each in said["techniques"]} >= {"raw", "zero", "dedup", "delta", "fast", "zstd-1"}
    assert json.loads(json.dumps(said)) == said


def test_tables(stream: bytes) -> None:
    done = korora("-", data=stream)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode()
    for words in ("Xen 4.17, x86 PV", "PAGE_DATA", "all zero", "Rounds", "On the wire", "zstd-1", "best"):
        assert words in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_json_and_quick(stream: bytes) -> None:
    done = korora("-", "--json", "--quick", data=stream)
    assert (done.returncode, done.stderr) == (0, b"")
    said = json.loads(done.stdout)
    assert said["complete"]
    assert "best" not in {each["name"] for each in said["techniques"]}


def test_a_stream_cut_short_is_described_as_far_as_it_goes(stream: bytes) -> None:
    for size in (1, 30, 60, 1000, len(stream) // 2, len(stream) - 1):
        said = _said(stream[:size])
        assert said["stream_bytes"] == size
        assert not said["complete"]
        assert any("cut short" in note or "unknown format" in note for note in said["notes"])


def test_what_is_unknown_is_said_to_be(stream: bytes) -> None:
    for data, words in ((b"", "empty"), (b"no stream" * 1000, "unknown format")):
        said = _said(data)
        assert words in " ".join(said["notes"])
        assert not said["complete"]


def test_a_file_that_cannot_be_read() -> None:
    done = korora("/nowhere/at/all")
    assert done.returncode == 2
    assert done.stderr.decode().startswith("korora: error: /nowhere/at/all: No such file")
    assert done.stderr.count(b"\n") == 1


def test_a_name_that_would_steer_a_terminal() -> None:
    assert (
        text("vm\x1b[2J\u202e\n") == "vm\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    )
    assert len(text("x" * 10_000) or "") <= 201


def test_markup_in_a_name_is_no_markup(tmp_path: Path, stream: bytes) -> None:
    from rich.console import Console

    path = tmp_path / "[red]stream"
    path.write_bytes(stream)
    found = look(path)
    found.facts.vm_name = "[bold]vm[/]"
    console = Console(file=io.StringIO(), width=200)
    console.print(render(found))
    assert isinstance(console.file, io.StringIO)
    assert "[bold]vm[/]" in console.file.getvalue()
    assert "[red]stream" in console.file.getvalue()


def _said(data: bytes) -> dict[str, Any]:
    done = korora("-", "--json", "--quick", data=data)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


# ------------------------------------------------------------------ the picture


def test_a_picture(tmp_path: Path) -> None:
    for name in ("xen417-pv.xlmig-up.zst", "q10-plain.qemu.zst", "q10-multifd-new-1.multifd.zst"):
        found = look(VECTORS / name)
        plot.draw(found, tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_pages_sent_again(tmp_path: Path, stream: bytes) -> None:
    import numpy as np

    path = tmp_path / "stream"
    path.write_bytes(stream)
    found = look(path)
    for again in ([5, 6, 1 << 41, 1 << 52], [1, 2, 3]):
        found.timeline.add(1, np.ones(4, np.int64), np.array(again, np.uint64))
        plot.draw(found, tmp_path / "out.svg")
        assert b"<svg" in (tmp_path / "out.svg").read_bytes()


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    found = look(VECTORS / "xen417-pv.xlsave.zst")
    for path in (tmp_path / "none" / "out.png", tmp_path / "out.xyz"):
        with pytest.raises(ConfigurationError) as error:
            plot.draw(found, path)
        assert error.value.remedy


def test_without_matplotlib_the_remedy_is_named_before_anything_is_read(tmp_path: Path) -> None:
    done = korora(
        "-", "--plot", str(tmp_path / "out.png"), data=b"", program="import sys; sys.modules['matplotlib'] = None"
    )
    assert done.returncode == 2
    assert done.stdout == b""
    assert "pip install 'korora[plot]'" in done.stderr.decode()


# ------------------------------------------------------------------ whole streams


@needs_corpus
@pytest.mark.parametrize(
    ("name", "zeros", "distinct", "again", "unchanged"),
    [
        ("xen417-live-idle-a.xlmig-up", 9976, 24576, 356, 101),
        ("xen417-live-busy.xlmig-up", 8177, 32768, 13320, 5908),
        ("q10_idle_a.qemu", 19881, 32898, 64, 40),
        # One less than there is: a zero page within the 4 MiB of an XBZRLE page.
        ("q10_touch_xbzrle.qemu", 15176, 32898, 4390, 2007),
    ],
)
def test_whole_streams(name: str, zeros: int, distinct: int, again: int, unchanged: int) -> None:
    found = look(CORPUS / f"{name}.zst")
    said = found.as_json()
    pages = said["pages"]
    assert said["complete"], said["notes"]
    assert said["kinds"]["zero"] + pages["zero_marked"] == zeros
    assert (pages["distinct"], pages["sent_again"], pages["sent_again_unchanged"]) == (distinct, again, unchanged)
    assert said["rounds"][0]["sent_again"] == 0
    wire = {each["name"]: each["wire_bytes"] for each in said["techniques"]}
    assert wire["raw"] > wire["dedup"] > wire["delta"] > wire["fast"] > wire["light"] > wire["firm"]

"""Whole real streams: every count equals that of an independent parser, however the stream is cut.

The streams are large and not part of the repository: KORORA_SHARED names the directory above their corpus/, whose
facts.txt holds the counts. Without it these tests skip.
"""

import ast
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.streams.formats import StreamFormat
from proxy.streams.xen import LIBXC_RECORDS
from tests.proxy.streams.describing import cut, describe, pieces_of

CHECKOUT = Path(__file__).parents[3]
CORPUS = Path(os.environ.get("KORORA_SHARED", CHECKOUT.parent / "shared")) / "corpus"
ZSTD = shutil.which("zstd")
PIECE_BYTES = 4 << 20
NAMES = [
    "q10_files.qemu",
    "q10_idle_a.qemu",
    "q10_idle_b.qemu",
    "q10_touch_xbzrle.qemu",
    "xen417-live-busy.xlmig-up",
    "xen417-live-idle-a.xlmig-up",
    "xen417-live-idle-b.xlmig-up",
    "xen417-live-pvh.xlmig-up",
    "xen417-save.xlsave",
]
NOUGHT = bytes(4096)

pytestmark = pytest.mark.skipif(
    not (CORPUS / "facts.txt").is_file() or ZSTD is None,
    reason="no corpus of whole streams here (KORORA_SHARED), or no zstd",
)


def told(name: str) -> dict[str, Any]:
    """What facts.txt says of a stream."""
    for line in (CORPUS / "facts.txt").read_text().splitlines():
        if line.startswith(name + " "):
            found: dict[str, Any] = ast.literal_eval(line[line.index("{") :])
            return found
    raise AssertionError(name)


def whole(name: str) -> bytes:
    assert ZSTD is not None
    source = CORPUS / f"{name}.zst"
    if not source.exists():
        pytest.skip(f"no {source.name} in the corpus")
    return subprocess.run([ZSTD, "-dcq", "--long=27", source], capture_output=True, check=True).stdout


def reads(stream: bytes, seed: int) -> Iterator[memoryview]:
    """Seeded reads of a socket: large ones, and here and there a few bytes."""
    dice = random.Random(seed)
    places, at = [], 0
    while at < len(stream):
        at += dice.randrange(1, 40) if dice.random() < 0.3 else dice.randrange(1, PIECE_BYTES)
        places.append(at)
    return cut(stream, places)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_an_independent_parser(name: str) -> None:
    stream, facts = whole(name), told(name)
    said = describe(pieces_of(stream, PIECE_BYTES))
    assert said.size == len(stream) == facts["total"]
    assert said.facts.opaque_reason is None
    assert said.facts.opaque_bytes == 0
    last: dict[int, bytes] = {}
    zeros = resent = same = 0
    for at, pfn in said.pages:
        page = stream[at : at + 4096]
        zeros += page == NOUGHT
        if pfn in last:
            resent += 1
            same += last[pfn] == page
        last[pfn] = page
    if said.facts.format is StreamFormat.XL:
        _xen(said.facts, facts, stream)
        assert said.facts.pages_data == facts["pagedata_pages"]
        assert (len(last), zeros) == (facts["distinct_pfns"], facts["zero_pages"])
        assert (resent, same) == (facts["resent"], facts["resent_unchanged"])
    else:
        _qemu(said.facts, facts)
        assert len(said.pages) + len(said.marked) == facts["page_records"]
        assert len(set(said.marked) | set(last)) == facts["distinct"]
    assert describe(reads(stream, seed=len(stream))).same(said)


def _xen(facts: Any, expected: dict[str, Any], stream: bytes) -> None:
    names = {LIBXC_RECORDS[int(key, 16)]: count for key, count in expected["records"].items()}
    libxl = {"LIBXL_LIBXC_CONTEXT": 1, "LIBXL_END": 1}
    go = {"XL_GO": 1} if expected["trailer"] else {}
    assert facts.records == names | libxl | go
    assert facts.hypervisor == f"Xen {expected['domhdr']['xen']}"
    assert facts.machine == {1: "x86 PV", 2: "x86 HVM"}[expected["domhdr"]["type"]]
    types = expected["pfn_types"]
    assert facts.entries_xtab == types.get("0xf", 0)
    assert facts.entries_xalloc == types.get("0xe", 0)
    assert facts.entries_broken == types.get("0xd", 0)
    config = stream[52 : 48 + expected["xlhdr"][3]].decode()
    named = re.search(r'"c_info": \{.*?"name": "([^"]+)",\s+"uuid": "([^"]+)"', config, re.DOTALL)
    assert named is not None
    assert (facts.vm_name, facts.vm_uuid) == named.groups()


def _qemu(facts: Any, expected: dict[str, Any]) -> None:
    assert facts.machine == expected["machine"]
    assert {block.name: block.size_bytes for block in facts.blocks.values()} == expected["ramblocks"]
    assert facts.pages_zero_marked == expected["zero"]
    assert facts.pages_xbzrle == expected["xbzrle"]
    assert facts.pages_data == expected["page_records"] - expected["zero"] - expected["xbzrle"]
    assert facts.records["RAM_EOS"] == expected["ram_sections"]
    assert facts.records["EOF"] == facts.records["VMDESCRIPTION"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_reads_of_one_size_throughout_say_the_same(name: str) -> None:
    """Page by page and less, over the stream's first part."""
    stream = whole(name)[: 2 << 20]
    seen = describe(cut(stream))
    for size in (1000, 4096, 4104, 65536):
        assert describe(pieces_of(stream, size)).same(seen)

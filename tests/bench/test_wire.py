"""Streams through real pairs: what is counted, what a store at each end brings, what is refused. And shaped links."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench import links
from bench.corpus import IDLE_A, Stream, make_random, unpack
from bench.links import link, missing
from bench.processes import BenchError
from bench.wire import Pair, carry
from tests.bench.small import small_corpus

SMALL_FRAMES_PAGES = 3 * 16  # in so many frames that are too small to be encoded; an idle machine makes none


@pytest.fixture
def xen(tmp_path: Path) -> Stream:
    found, _ = unpack(small_corpus(tmp_path / "shared"), tmp_path, (IDLE_A,))
    return found[IDLE_A]


def pair_of(tmp_path: Path, name: str) -> Pair:
    (tmp_path / name).mkdir()
    return Pair.fresh(tmp_path, tmp_path / name)


def test_a_stream_that_was_there_before_costs_little(tmp_path: Path) -> None:
    stream = make_random(tmp_path / "stream", 4)
    pair = pair_of(tmp_path, "first")
    first = carry("random, pages", stream, "pages", pair, 1)
    assert first.stream_bytes == stream.bytes
    assert first.forward_bytes > stream.guest_bytes  # the rest of a Xen stream's bytes are PFN lists
    assert first.backward_bytes > 0
    assert first.ratio == (first.forward_bytes + first.backward_bytes) / stream.bytes
    # A frame below PAGED_FRAME_BYTES_MIN, three pages at most, goes as it is and uncounted: where `cat` had to wait.
    assert stream.pages - SMALL_FRAMES_PAGES <= first.pages["literal"] == sum(first.pages.values()) <= stream.pages
    assert first.seconds > 0
    assert min(first.sender_kib, first.receiver_kib) > 20 * 1024
    (tmp_path / "copy").mkdir()
    again = carry("again", stream, "pages", pair.copy_of(tmp_path / "copy"), 1)
    assert again.ratio < 0.05
    back = carry("back", stream, "pages", pair.turned(), 1)
    assert back.ratio < 0.05
    assert back.pages["copy"] >= stream.pages - 2 * SMALL_FRAMES_PAGES  # those that went so are in no store


def test_opaque_is_all_of_it(tmp_path: Path, xen: Stream) -> None:
    sample = carry("opaque", xen, "opaque", pair_of(tmp_path, "pair"), 1)
    assert 1 < sample.ratio < 1.1
    assert not any(sample.pages.values())


def test_a_session_that_carries_something_else_is_no_sample(tmp_path: Path, xen: Stream) -> None:
    with pytest.raises(BenchError, match="not what was sent"):
        carry("x", replace(xen, bytes=xen.bytes + 1), "pages", pair_of(tmp_path, "pair"), 1)


def test_a_relay_that_fails_is_no_sample(tmp_path: Path, xen: Stream) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(xen.read()[: xen.bytes // 2])
    with pytest.raises(BenchError, match="ended with"):
        carry("x", Stream("cut", cut, xen.bytes // 2, 1), "pages", pair_of(tmp_path, "pair"), 1)


def test_links_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in missing()


def test_a_link_holds_a_stream_to_its_rate_and_is_gone_afterwards(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    stream = make_random(tmp_path / "stream", 2)
    mbit = 40
    with link(mbit * links.MBIT) as ends:
        sample = carry("opaque", stream, "opaque", pair_of(tmp_path, "pair"), 1, ends=ends)
    # The bucket lets a first burst pass at once.
    assert sample.seconds > 0.7 * stream.bytes * 8 / (mbit * links.MBIT)
    assert not list(links.NAMESPACES.glob(f"{links.NAME}-{os.getpid()}-*"))

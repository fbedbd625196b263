"""The streams that are measured: unpacked, counted, cut as the relay cuts them."""

from pathlib import Path

import pytest

from bench.corpus import FILES, IDLE_A, QEMU_A, corpus_directory, make_random, pieces, unpack
from bench.processes import REPOSITORY
from chunking.pages import PAGE_BYTES
from proxy.limits import FRAME_BYTES_MAX
from proxy.streams.formats import StreamFormat
from proxy.streams.parser import StreamParser
from tests.bench.small import SMALL, small_corpus


def test_the_corpus_is_where_the_environment_says() -> None:
    assert corpus_directory({"KORORA_SHARED": "/somewhere"}) == Path("/somewhere/corpus")
    assert corpus_directory({}) == REPOSITORY.parent / "shared" / "corpus"


def test_what_is_there_is_unpacked_and_what_is_not_has_a_reason(tmp_path: Path) -> None:
    streams, absent = unpack(small_corpus(tmp_path / "shared"), tmp_path)
    assert list(streams) == [name for name in FILES if name in SMALL]
    assert set(absent) == set(FILES) - set(SMALL)
    assert all("KORORA_SHARED" in reason for reason in absent.values())
    for stream in streams.values():
        assert stream.path.stat().st_size == stream.bytes == len(stream.read())
    # QEMU's markers of zero pages stand for memory that the stream does not carry.
    assert streams[QEMU_A].guest_bytes > streams[QEMU_A].bytes
    assert 0 < streams[IDLE_A].guest_bytes < streams[IDLE_A].bytes


def test_a_spoilt_stream_is_left_out(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path / "shared")
    (corpus / (FILES[IDLE_A] + ".zst")).write_bytes(b"no zstd")
    streams, absent = unpack(corpus, tmp_path, [IDLE_A, QEMU_A])
    assert list(streams) == [QEMU_A]
    assert FILES[IDLE_A] in absent[IDLE_A]


@pytest.mark.parametrize("mib", [1, 9])
def test_the_made_stream_is_one_of_xen_with_each_page_once(tmp_path: Path, mib: int) -> None:
    stream = make_random(tmp_path / "random", mib)
    assert stream.pages == mib * 1024**2 // PAGE_BYTES
    parser = StreamParser()
    cut = list(pieces(stream.read(), parser))
    assert sum(len(raw) for raw, _ in cut) == stream.bytes
    assert all(len(raw) == spans.used <= FRAME_BYTES_MAX for raw, spans in cut)
    pfns = [pfn for _, spans in cut for pfn in spans.pfns.tolist()]
    assert pfns == list(range(stream.pages))
    assert parser.facts.format is StreamFormat.LIBXC
    assert parser.facts.opaque_bytes == 0
    assert make_random(tmp_path / "again", mib).read() == stream.read()

"""Files of any kind are read in bounded pieces, or refused in one line with a remedy."""

from pathlib import Path

import pytest
import zstandard

from korora.inspect.source import opened
from proxy.errors import EXIT_CONFIGURATION, ConfigurationError, exit_code_of

DATA = bytes(range(256)) * 4096


def all_of(path: Path, size: int = 10_000) -> tuple[bytes, str]:
    parts = []
    with opened(path) as source:
        while part := source.read(size):
            assert len(part) <= size
            parts.append(part)
        assert source.read_bytes <= path.stat().st_size
        return b"".join(parts), source.broken


def test_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(DATA)
    assert all_of(path) == (DATA, "")


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_a_file_of_next_to_nothing(tmp_path: Path, size: int) -> None:
    path = tmp_path / "stream"
    path.write_bytes(DATA[:size])
    assert all_of(path) == (DATA[:size], "")


def test_a_compressed_file_of_several_frames(tmp_path: Path) -> None:
    path = tmp_path / "stream.zst"
    half = len(DATA) // 2
    path.write_bytes(zstandard.compress(DATA[:half]) + zstandard.compress(DATA[half:]))
    assert all_of(path) == (DATA, "")


def test_a_long_window_is_read_and_a_longer_one_refused(tmp_path: Path) -> None:
    for log, good in ((27, True), (29, False)):
        path = tmp_path / f"{log}.zst"
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log, write_content_size=0)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        path.write_bytes(stream.compress(DATA) + stream.flush())
        data, broken = all_of(path)
        assert (data == DATA) == good
        assert bool(broken) != good


def test_a_broken_file_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "stream.zst"
    noise = zstandard.compress(DATA[:1000]) + b"no zstd at all"
    path.write_bytes(noise)
    data, broken = all_of(path)
    assert DATA[:1000].startswith(data)
    assert "stream.zst" in broken


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigurationError) as error, opened(path):
            pass
        assert exit_code_of(error.value) == EXIT_CONFIGURATION
        assert error.value.remedy

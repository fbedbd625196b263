"""A folder that sockets' names fit into."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """pytest's own, but short: a unix socket's path has at most 107 bytes, and an emulator's has a UUID in it."""
    with tempfile.TemporaryDirectory(prefix="korora-") as name:
        yield Path(name)

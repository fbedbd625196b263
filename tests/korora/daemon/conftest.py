"""Two hosts for the daemon's tests, ended with the test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.korora.daemon.support import Site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A CA without hosts yet."""
    made = Site(tmp_path)
    yield made
    made.close()

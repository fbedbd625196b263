"""The daemon's own sockets."""

from pathlib import Path

import pytest

from korora.daemon.listeners import Listeners
from proxy.errors import ConfigurationError


async def test_the_socket_for_approvals_is_tried_again_at_each_reload(tmp_path: Path) -> None:
    """The first time its directory is not there; a reload after it was made needs no restart."""
    path = tmp_path / "run" / "approve.sock"
    listeners = Listeners({})
    try:
        for _ in range(2):
            with pytest.raises(ConfigurationError):
                await listeners.open_approvals(str(path), tmp_path / "approvals")
            assert not path.exists()
        path.parent.mkdir()
        await listeners.open_approvals(str(path), tmp_path / "approvals")
        assert path.is_socket()
        await listeners.open_approvals(str(path), tmp_path / "approvals")  # it is open: nothing is done again
    finally:
        await listeners.close()
    assert not path.exists()

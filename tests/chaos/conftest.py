"""Identities of two hosts for the scenarios."""

from pathlib import Path

import pytest

from tests.attacks.processes import Hosts


@pytest.fixture(scope="session")
def hosts(identity_alpha: Path, identity_beta: Path) -> Hosts:
    """alpha sends, beta receives."""
    return Hosts(identity_alpha, identity_beta)

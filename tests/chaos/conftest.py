"""Identities of two hosts for the scenarios."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from tests.attacks.processes import Hosts


@pytest.fixture(scope="session")
def hosts(identity_alpha: Path, identity_beta: Path) -> Hosts:
    """alpha sends, beta receives."""
    return Hosts(identity_alpha, identity_beta)


@pytest.fixture(scope="session")
def client_tls(identity_alpha: Path) -> TlsConfig:
    """The source: alpha."""
    return TlsConfig(Identity.load(identity_alpha, now=datetime.now(UTC)), TlsRole.CLIENT, PeerRules())


@pytest.fixture(scope="session")
def server_tls(identity_beta: Path) -> TlsConfig:
    """The destination: beta."""
    return TlsConfig(Identity.load(identity_beta, now=datetime.now(UTC)), TlsRole.SERVER, PeerRules())

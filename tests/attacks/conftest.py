"""Identities for the attacks' pairs."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from tests.attacks.relays import Identities


@pytest.fixture(scope="session")
def identities(identity_alpha: Path, identity_beta: Path) -> Identities:
    """alpha sends, beta receives, each expecting the other by name."""
    now = datetime.now(UTC)
    alpha, beta = Identity.load(identity_alpha, now=now), Identity.load(identity_beta, now=now)
    return Identities(
        TlsConfig(alpha, TlsRole.CLIENT, PeerRules(names=frozenset({"beta"}))),
        TlsConfig(beta, TlsRole.SERVER, PeerRules(names=frozenset({"alpha"}))),
    )

"""Fixtures that more than one room uses.

`identity_alpha` and `identity_beta` are complete identities of one CA, made once per run. They are shared: a test that
changes a file, revokes or renews works on a CA or a copy of its own.

hypothesis runs under the profile "ci" unless HYPOTHESIS_PROFILE names another: the same examples in every run, so that
a failure is the change's and not the dice's. HYPOTHESIS_PROFILE=explore draws new and more ones.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from crypto.identity import Identity
from crypto.pki import Authority
from crypto.tls import PeerRules, TlsConfig, TlsRole

settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _logging_of_its_own() -> Iterator[None]:
    """A command run within a test sets up logging for the process: the next test finds it as it was."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def ca_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a CA."""
    directory = tmp_path_factory.mktemp("pki") / "ca"
    Authority.create(directory, now=datetime.now(UTC))
    return directory


@pytest.fixture(scope="session")
def identity_alpha(ca_dir: Path) -> Path:
    """The identity of a host called alpha."""
    return Authority.open(ca_dir).issue("alpha", now=datetime.now(UTC)).directory


@pytest.fixture(scope="session")
def identity_beta(ca_dir: Path) -> Path:
    """The identity of a host called beta, under the same CA."""
    return Authority.open(ca_dir).issue("beta", now=datetime.now(UTC)).directory


@pytest.fixture(scope="session")
def client_tls(identity_alpha: Path) -> TlsConfig:
    """The source: alpha."""
    return TlsConfig(Identity.load(identity_alpha, now=datetime.now(UTC)), TlsRole.CLIENT, PeerRules())


@pytest.fixture(scope="session")
def server_tls(identity_beta: Path) -> TlsConfig:
    """The destination: beta."""
    return TlsConfig(Identity.load(identity_beta, now=datetime.now(UTC)), TlsRole.SERVER, PeerRules())

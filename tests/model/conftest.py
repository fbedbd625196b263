"""The model's binaries, made once a run. Without spin or a compiler the tests are skipped; under CI they fail."""

from pathlib import Path

import pytest

from tests.e2e.rig import absent_is_failure
from tests.model.generate import promela
from tests.model.mutants import chatter, named, of_entries
from tests.model.spin import build, missing_tools


def _folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    missing = missing_tools()
    if missing:
        told = f"the hand-over's model needs {missing}: `make system` installs them"
        if absent_is_failure():
            pytest.fail(told)
        pytest.skip(told)
    return tmp_path_factory.mktemp(name)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks for assertions that do not hold; mutants by their place in ``named()``."""
    return build(_folder(tmp_path_factory, "model"), promela(named()))


@pytest.fixture(scope="session")
def livelocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks for runs that never end; its one mutant is ``chatter()``."""
    return build(_folder(tmp_path_factory, "livelocks"), promela([chatter()]), livelocks=True)


@pytest.fixture(scope="session")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``model``, with the mutants of ``of_entries()``."""
    return build(_folder(tmp_path_factory, "entries"), promela(of_entries()))

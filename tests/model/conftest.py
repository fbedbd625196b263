"""The model's binaries, made once a run. Without spin or a compiler the tests are skipped; under CI they fail."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.rig import absent_is_failure
from tests.model.generate import promela
from tests.model.mutants import all_mutants, chatter
from tests.model.spin import build, missing_tools
from tests.model.whims import KINDS, Kind


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
    """Looks for assertions that do not hold; mutants by their place in ``all_mutants()``."""
    return build(_folder(tmp_path_factory, "model"), promela(all_mutants()))


@pytest.fixture(scope="session")
def livelocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks for runs that never end; its one mutant is ``chatter()``."""
    return build(_folder(tmp_path_factory, "livelocks"), promela([chatter()]), livelocks=True)


@pytest.fixture(scope="session")
def equivalent(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Kind, Path]:
    """As ``model``, with all that is called equivalent, to be had at once."""
    return {kind: kind.build(_folder(tmp_path_factory, "equivalent")) for kind in KINDS}

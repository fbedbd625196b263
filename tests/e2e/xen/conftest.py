"""The Xen rig, once per run. Without an image of a host these tests are skipped with the reason; under CI they fail."""

from pathlib import Path

import pytest

from tests.e2e.rig import absent_is_failure
from tests.e2e.xen.rig import RigAbsent, XenRig, build_rig


@pytest.fixture(scope="session")
def xen(tmp_path_factory: pytest.TempPathFactory) -> XenRig:
    """Image, code and identities."""
    folder: Path = tmp_path_factory.mktemp("xen")
    try:
        made = build_rig(folder)
    except RigAbsent as error:
        if absent_is_failure():
            raise
        pytest.skip(str(error))
    return made

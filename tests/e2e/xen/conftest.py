"""The Xen rig, once per run. Without an image of a host these tests are skipped with the reason; under CI they fail."""

import os
from pathlib import Path

import pytest

from tests.e2e.rig import absent_is_failure
from tests.e2e.xen.rig import RigAbsent, XenRig, build_rig


@pytest.fixture(scope="session")
def xen(tmp_path_factory: pytest.TempPathFactory) -> XenRig:
    """Image, code and identities: one for all of a run's processes, as a host takes long to save."""
    base = tmp_path_factory.getbasetemp()
    folder: Path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xen"
    folder.mkdir(exist_ok=True)
    try:
        made = build_rig(folder)
    except RigAbsent as error:
        if absent_is_failure():
            raise
        pytest.skip(str(error))
    return made

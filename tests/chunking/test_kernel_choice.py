"""Which kernels run: compiled ones wherever they can be built, numpy where they cannot or where that is asked for."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CAN_COMPILE = shutil.which("cc") is not None and (Path(sysconfig.get_path("include")) / "Python.h").exists()


def test_compiled_wherever_that_is_possible() -> None:
    """Without this the tests of compiled kernels would be skipped, and nobody would know."""
    assert not CAN_COMPILE or importlib.util.find_spec("chunking._kernels") is not None


@pytest.mark.parametrize("wanted", ["python", ""])
def test_the_choice_of_kernels(wanted: str) -> None:
    told = "from chunking import kernels; print(kernels.COMPILED)"
    environment = {**os.environ, "KORORA_KERNELS": wanted, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    available = importlib.util.find_spec("chunking._kernels") is not None
    assert run.stdout.strip() == str(available and not wanted)

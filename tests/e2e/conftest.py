"""The rig, once per run. Without QEMU or kernel these tests are skipped with the reason; under CI they fail."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from korora.demo.errors import EXIT_SETUP, DemoError
from tests.e2e.rig import Rig, absent_is_failure, build_rig, private_folder


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def rig() -> AsyncIterator[Rig]:
    """A booted guest in a file, and identities for two hosts."""
    async with private_folder() as folder:
        try:
            made = await build_rig(folder)
        except DemoError as error:
            if error.exit_code != EXIT_SETUP or absent_is_failure():
                raise
            pytest.skip(f"{error}; {error.remedy}")
        yield made

"""A real guest changes hosts under guard, whoever is killed, frozen or cut off, and at whichever step.

Never do two copies run; after recovery exactly one does, and it counts on where it was.
"""

import pytest

from tests.e2e.guarded import guarded
from tests.e2e.rig import Rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


async def test_a_machine_moves_under_guard(rig: Rig) -> None:
    async with guarded(rig) as made:
        await made.migrate()
        assert await made.one_runs() == "destination"

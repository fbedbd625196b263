"""Who of two QEMUs runs, asked of both all along: there must be no moment in which both do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from korora.demo.qemu import QemuVm
from proxy.hypervisors.monitor import QmpError

LOOK_SECONDS = 0.02


@asynccontextmanager
async def never_two(vms: Callable[[], Sequence[QemuVm]]) -> AsyncIterator[None]:
    """Watch until the end of the block; then there was never a moment with two.

    Args:
        vms: those to ask, by monitors of the test's own; one may take another's place meanwhile.
    """
    looks, doubles = 0, list[str]()

    async def watch() -> None:
        nonlocal looks
        while True:
            running = []
            for vm in vms():
                if vm.running and not vm.qmp.gone:
                    with contextlib.suppress(QmpError):  # it ended between the question and the answer, or is frozen
                        running += [vm.name] if (await vm.qmp.execute("query-status"))["running"] else []
            looks += 1
            if len(running) > 1:
                doubles.append(" and ".join(running))
            await asyncio.sleep(LOOK_SECONDS)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        ended = (await asyncio.gather(watching, return_exceptions=True))[0]
    assert isinstance(ended, asyncio.CancelledError), f"nobody watched to the end: {ended!r}"
    assert looks > 0
    assert doubles == []

"""A machine's name comes from a stream: one that would break a list of machines never reaches a hypervisor."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.errors import HypervisorFailed
from proxy.handover.record import Entry, Head
from proxy.shell.journal import Journal, now
from proxy.shell.xl_guard import XlDestinationGuard
from tests.proxy.support import run
from tests.standins.xen_host import guest_stream


def seen(tmp_path: Path, name: str) -> bool:
    """Let a destination's guard see the stream of a machine with that name: whether it was named."""
    named: list[str] = []

    def serve(work: Any, what: str) -> None:
        work.close()
        named.append(what)

    async def story() -> None:
        file = Journal(tmp_path).begin(Head("0" * 32, "destination", "xl", "peer", now()), Entry("open", now()))
        try:
            session: Any = SimpleNamespace(serve=serve, say_word=None)
            hypervisor: Any = SimpleNamespace(kind="xl")
            XlDestinationGuard(file, hypervisor, session).arrived(memoryview(guest_stream(name)))
        finally:
            file.close()

    run(story())
    return bool(named)


@pytest.mark.parametrize("name", ["vm\nDomain-0", "vm\x1b[2J", "vm\r", "vm\x00x", "", "x" * 256])
def test_a_name_that_is_none_ends_the_session(tmp_path: Path, name: str) -> None:
    with pytest.raises(HypervisorFailed, match="rename it"):
        seen(tmp_path, name)


@pytest.mark.parametrize("name", ["vm1", "a name with spaces", "Kororā"])
def test_any_other_is_taken(tmp_path: Path, name: str) -> None:
    assert seen(tmp_path, name)

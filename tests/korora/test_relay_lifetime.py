"""A relay that carries one migration after another keeps nothing of those that are over."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from crypto.tls import TlsConfig
from korora import relay
from proxy.endpoints.sockets import listen_tcp
from proxy.shell.destination import Destination, DestinationRunner, Terms
from proxy.shell.runner import Runner
from proxy.shell.source import Peer, Source
from tests.proxy.support import over_tcp, run, until

SESSIONS = 5


@pytest.fixture
def little_to_collect() -> Iterator[None]:
    """Only who asks collects, and only what the test has made."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("little_to_collect")
def test_sessions_leave_nothing_behind(
    client_tls: TlsConfig, server_tls: TlsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: weakref.WeakSet[Runner] = weakref.WeakSet()
    real = Runner.__init__

    def init(self: Runner, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)  # type: ignore[arg-type]
        live.add(self)

    async def story() -> None:
        ended: asyncio.Queue[int] = asyncio.Queue()
        hypervisors = over_tcp()

        async def begin(runner: DestinationRunner) -> None:
            ended.put_nowait(await relay.account(runner.run(), runner.report, None))

        def refused(error: Exception) -> None:
            raise error

        listener = listen_tcp("127.0.0.1", 0, "127.0.0.1:0")
        egresses = {"default": hypervisors.egress}
        destination = Destination(server_tls, egresses, listener, terms=Terms(), begin=begin, failed=refused)
        serving = asyncio.create_task(destination.serve())
        await hypervisors.ingress.open()
        source = Source(client_tls, Peer("127.0.0.1", listener.getsockname()[1]), hypervisors.ingress)

        async def migration() -> None:
            near = await hypervisors.connect()
            report = source.new_report()
            session = source.session(await hypervisors.ingress.accept(), report)
            departing = asyncio.create_task(relay.account(session, report, None))
            far = await hypervisors.accept()
            for wire in (near, far):
                await wire.send(b"!")
                wire.shut()
            assert await far.to_end() == await near.to_end() == b"!"
            assert await departing == await ended.get() == 0

        try:
            for _ in range(SESSIONS):
                await migration()
                await until(lambda: not live)  # not only when the next one ends: these hold some 10 MiB each
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await hypervisors.ingress.close()
            hypervisors.close()
            listener.close()

    monkeypatch.setattr(Runner, "__init__", init)
    run(story())

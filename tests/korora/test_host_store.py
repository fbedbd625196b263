"""Pages of earlier sessions serve later ones: the same image again, the VM that comes back, and what goes wrong."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chunking.errors import PagesMissing
from crypto.tls import TlsConfig
from korora.host_store import HostStore
from proxy.errors import EXIT_INTEGRITY, exit_code_of
from proxy.paging import Encode, PagingTerms
from proxy.report import SessionReport
from tests.proxy.guest import Guest
from tests.proxy.support import over_tcp, relays, run

PAGES = 1500
TERMS = PagingTerms(encode=Encode.PAGES, tenant="acme")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[HostStore]:
    host_store = HostStore(tmp_path / "here")
    yield host_store
    host_store.close()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[HostStore]:
    host_store = HostStore(tmp_path / "there")
    yield host_store
    host_store.close()


class Hosts:
    """Two hosts with a store each, between which guests move."""

    def __init__(self, client: TlsConfig, server: TlsConfig, here: HostStore, there: HostStore) -> None:
        self.client, self.server, self.here, self.there = client, server, here, there

    def migrate(
        self, stream: bytes, *, back: bool = False, tenants: tuple[str, str] = ("acme", "acme"), cache_pages: int = 4000
    ) -> tuple[SessionReport, SessionReport]:
        """One whole session; what it leaves is on the disk when this returns."""
        stores = (self.there, self.here) if back else (self.here, self.there)
        terms = tuple(
            replace(TERMS, store=host_store, tenant=tenant, cache_bytes=cache_pages * 4096)
            for host_store, tenant in zip(stores, tenants, strict=True)
        )

        async def work() -> tuple[SessionReport, SessionReport]:
            hypervisors = over_tcp()
            try:
                async with relays(
                    self.client, self.server, hypervisors.ingress, hypervisors.egress, paging=(terms[0], terms[1])
                ) as pair:
                    near, far = await pair.channel(hypervisors)

                    async def out() -> None:
                        await near.send(stream)
                        near.shut()

                    _, heard = await asyncio.gather(out(), far.to_end())
                    far.shut()
                    assert heard == stream
                    return await pair.ended_well()
            finally:
                hypervisors.close()

        reports = run(work(), 60.0)
        for host_store in stores:
            assert host_store.wait(30.0)
        return reports


@pytest.fixture
def hosts(client_tls: TlsConfig, server_tls: TlsConfig, here: HostStore, there: HostStore) -> Hosts:
    return Hosts(client_tls, server_tls, here, there)


def test_the_same_guest_again_costs_next_to_nothing(hosts: Hosts) -> None:
    stream = Guest(1, PAGES).stream(rounds=1)
    first, _ = hosts.migrate(stream)
    second, other = hosts.migrate(stream)
    assert not first.pages["copy"]
    assert second.pages["copy"] == first.pages["literal"]
    assert not second.pages["literal"]
    assert second.pages == other.pages
    assert second.bytes_wire["forward"] < 0.05 * first.bytes_wire["forward"]


def test_a_guest_that_comes_back_changed_costs_what_changed(hosts: Hosts) -> None:
    guest = Guest(2, PAGES)
    out, _ = hosts.migrate(guest.stream(rounds=2))
    guest.touch(0.1)
    back, _ = hosts.migrate(guest.stream(rounds=1), back=True)
    assert back.pages["copy"]
    assert back.pages["delta"], "pages changed a little are told from what lay there before"
    assert back.bytes_wire["forward"] < 0.3 * out.bytes_wire["forward"]


def test_a_disk_of_unknown_make_leaves_its_chunks_too(hosts: Hosts) -> None:
    disk = b"disk" + Guest(8, PAGES).stream(rounds=1)
    first, _ = hosts.migrate(disk)
    again, _ = hosts.migrate(disk)
    assert again.pages["copy"] == first.pages["literal"] + first.pages["delta"]
    assert again.bytes_wire["forward"] < 0.2 * first.bytes_wire["forward"]


def test_a_copy_is_found_behind_a_cache_that_has_forgotten_everything(hosts: Hosts) -> None:
    stream = Guest(3, PAGES).stream()
    hosts.migrate(stream, cache_pages=16)
    again, _ = hosts.migrate(stream, cache_pages=16)
    assert again.pages["copy"] > again.pages["literal"]


@pytest.mark.parametrize("tenants", [("acme", "other"), ("acme", ""), ("", "acme"), ("other", "other")])
def test_nobody_uses_another_tenant_s_pages(tenants: tuple[str, str], hosts: Hosts) -> None:
    stream = Guest(4, PAGES).stream(rounds=1)
    hosts.migrate(stream)
    again, _ = hosts.migrate(stream, tenants=tenants)
    assert not again.pages["copy"]


def test_pages_that_cannot_be_read_at_the_destination_are_asked_for(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Guest(5, PAGES).stream(rounds=1)
    first, _ = hosts.migrate(stream)
    asked: list[int] = []
    opened = hosts.there.open

    def forgetful(*arguments: object) -> object:
        stored = opened(*arguments)  # type: ignore[arg-type]
        read = stored.pages.read

        def half(ordinals: object) -> object:
            lost = [int(ordinal) for ordinal in ordinals if ordinal % 2]  # type: ignore[attr-defined]
            if lost:
                asked.extend(lost)
                raise PagesMissing(lost)
            return read(ordinals)  # type: ignore[arg-type]

        monkeypatch.setattr(stored.pages, "read", half)
        return stored

    monkeypatch.setattr(hosts.there, "open", forgetful)
    second, other = hosts.migrate(stream)
    assert second.pages["copy"] == first.pages["literal"]
    assert len(asked) > PAGES / 20
    assert (second.pages_missing, other.pages_missing) == (0, len(asked))


def test_a_peer_that_gives_another_page_ends_the_session(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is caught by the page's id before anything of its frame is written; without the id its digest would tell."""
    stream = Guest(6, PAGES).stream(rounds=1)
    hosts.migrate(stream)
    opened = hosts.there.open

    def forgetful(*arguments: object) -> object:
        stored = opened(*arguments)  # type: ignore[arg-type]

        def nothing(ordinals: object) -> object:
            raise PagesMissing([int(ordinal) for ordinal in ordinals])  # type: ignore[attr-defined]

        monkeypatch.setattr(stored.pages, "read", nothing)
        return stored

    monkeypatch.setattr(hosts.there, "open", forgetful)
    terms = [replace(TERMS, store=host_store) for host_store in (hosts.here, hosts.there)]

    async def work() -> bytes:
        hypervisors = over_tcp()
        try:
            async with relays(
                hosts.client, hosts.server, hypervisors.ingress, hypervisors.egress, paging=(terms[0], terms[1])
            ) as pair:
                near, far = await pair.channel(hypervisors)
                line = pair.departing.encoding
                assert line is not None
                real = line.borrowed
                monkeypatch.setattr(line, "borrowed", lambda order: dict.fromkeys(real(order), b"\xee" * 4096))
                sending = asyncio.create_task(near.send(stream))
                got = bytearray()
                try:
                    while piece := await far.receive():
                        got += piece
                except ConnectionResetError:
                    pass
                sending.cancel()
                source, destination = await pair.ended()
                for ended in (source, destination):
                    assert ended.error is not None
                    assert exit_code_of(ended.error) == EXIT_INTEGRITY
                assert "is another page" in str(destination.error)
                return bytes(got)
        finally:
            hypervisors.close()

    got = run(work(), 60.0)
    assert stream.startswith(got), "what was wrong never reached the hypervisor"


def test_a_session_that_was_cut_off_leaves_its_pages_for_the_next_attempt(hosts: Hosts) -> None:
    stream = Guest(7, PAGES).stream(rounds=1)
    terms = [replace(TERMS, store=host_store) for host_store in (hosts.here, hosts.there)]

    async def cut() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(
                hosts.client, hosts.server, hypervisors.ingress, hypervisors.egress, paging=(terms[0], terms[1])
            ) as pair:
                near, far = await pair.channel(hypervisors)
                half = len(stream) // 2
                await near.send(stream[:half])
                await far.exactly(half - 4096 * 64)
                near.reset()
                await pair.ended()
        finally:
            hypervisors.close()

    run(cut(), 60.0)
    assert hosts.here.wait(30.0)
    assert hosts.there.wait(30.0)
    report, _ = hosts.migrate(stream)
    assert report.pages["copy"] > PAGES / 10

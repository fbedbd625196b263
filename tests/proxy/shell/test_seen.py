"""What a session shows of the guest and of what became of its pages, while it runs and in its reports."""

import asyncio
import json
import struct

from crypto.tls import TlsConfig
from proxy.paging import Encode, PagingTerms
from proxy.report import SessionReport
from proxy.status import SessionStatus
from tests.proxy.guest import Guest
from tests.proxy.support import over_tcp, relays, run, until

SECONDS_MAX = 60.0
PAGES = 2000
DIRTY = 300
CUT_MAX = 30  # pages that a read may end in the midst of, and that go on their way as no pages


def xl_stream(name: str) -> bytes:
    """What xl sends: its header, the domain's configuration, libxl's stream and libxc's in it."""
    text = json.dumps({"c_info": {"name": name}}).encode() + b"\0"
    config = struct.pack("<I", len(text)) + text
    magic = b"Xen saved domain, xl format\n \0 \r".ljust(32, b"\0")
    head = magic + struct.pack("<4I", 0x01020304, 3, 0, len(config)) + config
    libxl = struct.pack(">QII", 0x4C6962786C466D74, 2, 0) + struct.pack("<II", 1, 0)
    return head + libxl + Guest(11, PAGES).stream(rounds=3, share=DIRTY / PAGES) + struct.pack("<II", 0, 0)


def carried(
    client_tls: TlsConfig, server_tls: TlsConfig, stream: bytes, terms: PagingTerms
) -> tuple[tuple[SessionReport, SessionReport], tuple[SessionStatus, SessionStatus]]:
    """The reports of a session that carried ``stream``, and how each end stood when all of it had arrived."""

    async def work() -> tuple[tuple[SessionReport, SessionReport], tuple[SessionStatus, SessionStatus]]:
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls, server_tls, hypervisors.ingress, hypervisors.egress, paging=(terms, PagingTerms())
            ) as pair:
                near, far = await pair.channel(hypervisors)
                heard = asyncio.create_task(far.exactly(len(stream)))
                await near.send(stream)
                assert await heard == stream
                await until(lambda: not pair.departing.session.flight.in_flight_bytes)
                statuses = pair.departing.status(), pair.arriving[0].status()
                near.shut()
                far.shut()
                return await pair.ended_well(), statuses
        finally:
            hypervisors.close()

    return run(work(), SECONDS_MAX)


def test_both_ends_tell_vm_rounds_and_dirty_pages(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    reports, statuses = carried(client_tls, server_tls, xl_stream("web-1"), PagingTerms(encode=Encode.PAGES))
    for report, status in zip(reports, statuses, strict=True):
        assert (status.vm, report.vm) == ("web-1", "web-1")
        assert (status.rounds, report.rounds) == (3, 3)
        first, second = status.rounds_ended
        assert PAGES - CUT_MAX <= first <= PAGES
        assert status.guest_pages == first + second + status.round_pages
        assert 0 <= second + status.round_pages - status.dirty_pages <= CUT_MAX
        assert status.dirty_pages == report.dirty_pages
        assert DIRTY < status.dirty_pages < 3 * DIRTY


def test_both_ends_tell_what_became_of_the_pages(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    (source, destination), statuses = carried(
        client_tls, server_tls, xl_stream("web-1"), PagingTerms(encode=Encode.PAGES)
    )
    for report, status in zip((source, destination), statuses, strict=True):
        assert report.pages == {kind: getattr(status, f"pages_{kind}") for kind in report.pages}
        assert report.bytes_saved == status.paged_bytes - status.body_bytes > 0
        assert report.codec_seconds > 0
        assert report.pages_missing == status.pages_missing == 0
    departing, arriving = statuses
    assert (departing.paged_bytes, departing.body_bytes) == (arriving.paged_bytes, arriving.body_bytes)
    assert 0 < departing.delta_bytes < 4096 * departing.pages_delta
    assert departing.regime in {"fast", "light", "firm", "best"}
    assert (source.encode, destination.encode) == ("pages", "pages")


def test_bytes_that_go_as_they_are_tell_nothing(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    (source, destination), (departing, arriving) = carried(
        client_tls, server_tls, xl_stream("web-1"), PagingTerms(encode=Encode.OPAQUE)
    )
    for report, status in ((source, departing), (destination, arriving)):
        assert (report.encode, report.vm, report.rounds, report.bytes_saved) == ("opaque", None, 0, 0)
        assert (status.regime, status.vm, status.rounds, status.paged_bytes) == (None, None, 0, 0)

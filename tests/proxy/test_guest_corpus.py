"""Rounds, names and pages sent again of whole real streams are those that an independent parser counts."""

import pytest

from proxy.guest import GuestView
from proxy.streams.parser import StreamParser
from tests.proxy.streams import test_corpus
from tests.proxy.streams.test_corpus import NAMES, reads, told, whole

pytestmark = test_corpus.pytestmark
# What xl calls the guests of the streams that it made; QEMU's do not tell.
GUESTS = {"busy": "busy2", "idle-a": "ida", "idle-b": "idb", "pvh": "pvh2", "save": "sv"}


@pytest.mark.parametrize("name", NAMES)
def test_a_real_migration(name: str) -> None:
    view, parser, left = GuestView(), StreamParser(), b""
    for piece in reads(whole(name), 1):
        both = memoryview(left + bytes(piece))
        spans = parser.feed(both, final=False, urgent=False)
        view.saw(spans, parser.facts.vm_name)
        left = bytes(both[spans.used :])
    facts = told(name)
    assert view.dirty_pages == facts["resent"]
    assert view.guest_pages == facts.get("page_records", facts.get("pagedata_pages"))
    assert view.name == next((guest for part, guest in GUESTS.items() if part in name), None)
    # Xen makes one round of a saved domain and at most six of a live one; the last one is short.
    live = "save" not in name
    assert (2 <= view.rounds <= 6) if live else view.rounds == 1
    assert not live or view.round_pages < facts.get("distinct", facts.get("distinct_pfns")) / 2

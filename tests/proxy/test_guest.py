"""What a session's streams tell of the guest, and that no stream makes it a burden."""

import numpy as np
import pytest
from numpy.typing import NDArray

from chunking.pages import Spans
from proxy.guest import ROUNDS_TOLD, GuestView
from proxy.limits import VM_NAME_CHARACTERS_MAX

NOTHING = np.empty(0, np.uint64)


def pages(*numbers: int) -> NDArray[np.uint64]:
    return np.array(numbers, np.uint64)


def saw(
    view: GuestView, pfns: NDArray[np.uint64], marked: NDArray[np.uint64] = NOTHING, name: str | None = None
) -> None:
    view.saw(Spans(0, np.empty((0, 3), np.uint32), pfns, marked, big_endian=False), name)


def test_before_any_page_nothing_is_known() -> None:
    view = GuestView()
    saw(view, NOTHING)
    assert (view.name, view.rounds, view.rounds_ended, view.round_pages) == (None, 0, (), 0)
    assert (view.guest_pages, view.dirty_pages) == (0, 0)


def test_rounds_of_all_channels_together() -> None:
    view = GuestView()
    saw(view, pages(1, 2), pages(3, 4, 5))
    saw(view, pages(6, 7, 8))
    assert (view.rounds, view.round_pages, view.dirty_pages) == (1, 8, 0)
    saw(view, pages(2, 7, 9), pages(3))
    assert (view.rounds, view.rounds_ended, view.round_pages, view.dirty_pages) == (2, (8,), 4, 3)
    for _ in range(ROUNDS_TOLD):
        saw(view, pages(7))
    assert (view.rounds, view.rounds_ended, view.round_pages) == (4, (4, 1), 1)
    assert view.guest_pages == 14


def test_a_piece_of_many_rounds() -> None:
    view = GuestView()
    saw(view, np.tile(np.arange(1000, dtype=np.uint64), 5))
    assert (view.rounds, view.rounds_ended, view.round_pages, view.dirty_pages) == (5, (1000, 1000), 1000, 4000)


def test_a_page_that_is_sent_a_million_times_holds_nobody_up() -> None:
    """Each time is a round, and all of them are counted on the event loop: in one go, or this would take hours."""
    view = GuestView()
    for _ in range(2):
        saw(view, np.zeros(500_000, np.uint64))
    assert (view.rounds, view.rounds_ended, view.round_pages) == (1_000_000, (1, 1), 1)


def test_the_name_is_the_first_that_is_told() -> None:
    heard: list[str] = []
    view = GuestView(heard.append)
    for told in (None, "", "web-1", "other", None):
        saw(view, NOTHING, name=told)
    assert (view.name, heard) == ("web-1", ["web-1"])


@pytest.mark.parametrize(("told", "shown"), [("a\x1b[31mb", "a?[31mb"), ("a\nb", "a?b"), ("x" * 9999, "x" * 255)])
def test_a_name_is_safe_to_show_and_bounded(told: str, shown: str) -> None:
    view = GuestView()
    saw(view, NOTHING, name=told)
    assert view.name == shown
    assert len(view.name) <= VM_NAME_CHARACTERS_MAX

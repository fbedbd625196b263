"""Whatever docs/model/handover.pml excuses, it has to: without the excuse spin finds a run that needs it.

Each is a clause of the model's text, taken away alone. docs/handover.md has the reasons.
"""

from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.model.generate import promela
from tests.model.spin import MODEL, Budget, build, search

SECONDS_MAX: Final = 900.0
LADDER: Final = (Budget(1), Budget(1, where="localhost"), Budget(2), Budget(2, late=1))


class Excuse(NamedTuple):
    """A clause, and what stands there without it."""

    clause: str
    instead: str


EXCUSES: Final = (
    # the source's copy is lost
    Excuse("excused || s_journal == ABORTED ||", "excused ||"),
    Excuse("|| s_copy == RUNS || !PROMISED(d_journal)", "|| !PROMISED(d_journal)"),
    Excuse("|| !PROMISED(d_journal) || !PROMISED(D_STANDS)", "|| !PROMISED(D_STANDS)"),
    Excuse("|| !PROMISED(D_STANDS) || d_copy == GONE", "|| d_copy == GONE"),
    Excuse("|| d_copy == GONE || d_copy == PART || useless);", "|| d_copy == PART || useless);"),
    Excuse("|| d_copy == PART || useless);", "|| useless);"),
    Excuse("|| d_copy == PART || useless);", "|| d_copy == PART);"),
    Excuse("excused = (excused || s_state == ABORTED); source_is_gone()", "source_is_gone()"),
    # the destination's
    Excuse("excused || d_copy == RUNS ||", "excused ||"),
    Excuse("|| s_copy == GONE || s_state == DONE ||", "|| s_state == DONE ||"),
    Excuse("|| s_state == DONE || s_journal == DONE);", "|| s_journal == DONE);"),
    Excuse("|| s_state == DONE || s_journal == DONE);", "|| s_state == DONE);"),
    Excuse("d_copy = GONE; excused = (excused || s_copy == GONE) }", "d_copy = GONE }"),
    Excuse("useless = 1; excused = (excused || s_copy == GONE)\n", "useless = 1\n"),
    # a journal's disk
    Excuse("s_journal = NO_RECORD; excused = 1 }", "s_journal = NO_RECORD }"),
    Excuse("d_journal = NO_RECORD; excused = 1 }", "d_journal = NO_RECORD }"),
    Excuse("s_unwritten = 1; unkept = 1 }", "s_unwritten = 1 }"),
    # ends at which an operator is asked
    Excuse("            s_journal == DOUBT && s_copy == GONE && !s_voted && PROMISED(d_journal) ||\n", ""),
    Excuse("            s_journal == DOUBT && d_journal == DOUBT && s_copy != GONE ||\n", ""),
    Excuse("!alive && (s_journal == COMMITTED || s_journal == DOUBT ||", "!alive && (s_journal == DOUBT ||"),
    Excuse("!alive && (s_journal == COMMITTED || s_journal == DOUBT ||", "!alive && (s_journal == COMMITTED ||"),
    Excuse("s_journal == DOUBT || s_copy == GONE && PROMISED(d_journal)));", "s_journal == DOUBT));"),
    Excuse("(!alive || useless && s_copy == GONE) && s_state == COMMITTED", "!alive && s_state == COMMITTED"),
    Excuse("s_state == NO_RECORD || s_state == DOUBT) &&", "s_state == NO_RECORD) &&"),
    Excuse("s_state == NO_RECORD || s_state == DOUBT) &&", "s_state == DOUBT) &&"),
    Excuse("assert(s_state != DOUBT || s_copy == GONE || d_state", "assert(s_state != DOUBT || d_state"),
    Excuse("d_state == DOUBT || d_state == NO_RECORD || !alive)", "d_state == NO_RECORD || !alive)"),
    Excuse("d_state == DOUBT || d_state == NO_RECORD || !alive)", "d_state == DOUBT || !alive)"),
    Excuse("d_state == DOUBT || d_state == NO_RECORD || !alive)", "d_state == DOUBT || d_state == NO_RECORD)"),
)


@pytest.mark.slow
@pytest.mark.timeout(4 * SECONDS_MAX + 650)
@pytest.mark.parametrize("excuse", EXCUSES, ids=lambda excuse: f"{excuse.clause.strip()} → {excuse.instead.strip()}")
def test_an_excuse_is_needed(excuse: Excuse, tmp_path: Path, model: Path) -> None:
    """``model`` is asked for because it skips where there is no spin."""
    text = (MODEL / "handover.pml").read_text(encoding="utf-8")
    binary = build(tmp_path, promela(), model=text.replace(excuse.clause, excuse.instead))
    assert any(search(binary, budget, seconds=SECONDS_MAX).error for budget in LADDER)


def test_every_excuse_is_there_once() -> None:
    text = (MODEL / "handover.pml").read_text(encoding="utf-8")
    for excuse in EXCUSES:
        assert text.count(excuse.clause) == 1, excuse.clause

"""What docs/model/handover.pml excuses, clause by clause, each of which can be taken away.

docs/handover.md has the reasons. Whatever is excused has to be: without the clause spin finds a run that needs it.
"""

import re
from collections.abc import Mapping
from typing import Final

FIRST: Final = 101  # the number of the first, where the assumptions have theirs

# A clause is between « and », in as much of the model's text as makes it the only one.
EXCUSES: Final = (
    # the source's copy is lost
    "excused || «s_journal == ABORTED» || s_unwritten",
    "|| «s_unwritten && s_state == ABORTED» || !PROMISED(d_journal)",
    "|| «!PROMISED(d_journal)» || !PROMISED(D_STANDS)",
    "|| «!PROMISED(D_STANDS)» || d_copy == GONE);",
    "!PROMISED(D_STANDS) || «d_copy == GONE»);",
    "excused = (excused || «s_state == ABORTED»); source_is_gone()",
    "unkept = (unkept || «s_anew && s_journal != ABORTED»);",
    # the destination's
    "excused || «d_copy == RUNS» ||",
    "|| «s_copy == GONE» || s_state == DONE ||",
    "|| «s_state == DONE» || s_journal == DONE);",
    "s_state == DONE || «s_journal == DONE»);",
    "d_copy = GONE; excused = (excused || «s_copy == GONE») }",
    "useless = 1; excused = (excused || «s_copy == GONE»)\n",
    # a journal's disk
    "s_journal = NO_RECORD; «excused = 1» }",
    "d_journal = NO_RECORD; «excused = 1» }",
    "s_unwritten = 1; «unkept = 1» }",
    "assert(!s_ran_on || «unkept»)",
    # ends at which an operator is asked
    "«s_journal == DOUBT && s_copy == GONE && !s_voted && PROMISED(d_journal)» ||",
    "«s_journal == DOUBT && d_journal == DOUBT && s_copy != GONE» ||",
    "!alive && («s_journal == COMMITTED» || s_journal == DOUBT ||",
    "!alive && (s_journal == COMMITTED || «s_journal == DOUBT» ||",
    "s_journal == DOUBT || «s_copy == GONE && PROMISED(d_journal)»));",
    "(!alive || «useless && s_copy == GONE») && s_state == COMMITTED",
    "(«!alive» || useless && s_copy == GONE) && s_state == COMMITTED",
    "(«!alive» || useless && s_copy == GONE || s_state == NO_RECORD",
    "!alive || «useless && s_copy == GONE» || s_state == NO_RECORD",
    "|| «s_state == NO_RECORD» || s_state == DOUBT) &&",
    "|| s_state == NO_RECORD || «s_state == DOUBT») &&",
    "assert(s_state != DOUBT || «s_copy == GONE» || d_state",
    "«d_state == DOUBT» || d_state == NO_RECORD || !alive)",
    "d_state == DOUBT || «d_state == NO_RECORD» || !alive)",
    "d_state == DOUBT || d_state == NO_RECORD || «!alive»)",
    # somebody who has a say, and an operator
    "!smooth || «refused» ||",
    "d_state == DONE) || «operated»)",
    "d_state == ABORTED) || «operated && excused»)",
    # a record that could not be written
    "(s_state == s_journal || «s_unwritten»)",
    "(d_state == d_journal || «d_unwritten»)",
)


def numbers() -> Mapping[str, int]:
    """The excuses by their numbers, as `without` of handover.pml has them."""
    return {excuse: number for number, excuse in enumerate(EXCUSES, FIRST)}


def optional(model: str) -> str:
    """The model with each excuse made one that can be taken away.

    Raises:
        ValueError: a clause is not there, or there more than once.
    """
    places = []
    for excuse, number in numbers().items():
        before, clause, after = re.split("[«»]", excuse)
        if model.count(before + clause + after) != 1:
            raise ValueError(f"there {model.count(before + clause + after)} times: {excuse}")
        start = model.index(before + clause + after) + len(before)
        told = (
            f"if :: HOLDS({number}) -> {clause} :: else fi" if " = " in clause else f"(HOLDS({number}) && ({clause}))"
        )
        places.append((start, start + len(clause), told))
    for start, end, told in sorted(places, reverse=True):
        model = model[:start] + told + model[end:]
    return model

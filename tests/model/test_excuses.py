"""The excuses of docs/model/handover.pml can be taken away one by one; that each is needed is in test_mutants.py."""

import pytest

from tests.model.excuses import EXCUSES, FIRST, numbers, optional
from tests.model.spin import MODEL, environment_names


def test_every_excuse_is_there_once() -> None:
    model = (MODEL / "handover.pml").read_text(encoding="utf-8")
    assert optional(model).count(" HOLDS(1") + optional(model).count("(HOLDS(1") == len(EXCUSES)


def test_what_is_excused_without_a_reason_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times"):
        optional("")


def test_no_excuse_has_the_number_of_an_assumption() -> None:
    assert max(environment_names().values()) < FIRST == min(numbers().values())
    assert len(numbers()) == len(EXCUSES)

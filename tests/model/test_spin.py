"""What a search says, as tests.model.spin reads it: one that was cut short never counts as one that found nothing."""

import pytest

from tests.model.spin import Budget, Found, SpinFailed, environment_names, read

ENDED = "State-vector 52 byte, depth reached 62, errors: {errors}\n   202848 states, stored\n"


def test_a_search_that_found_nothing() -> None:
    assert read(ENDED.format(errors=0)) == Found(202_848, "")


def test_many_states_are_told_in_another_way() -> None:
    assert read("depth reached 62, errors: 0\n1.1889648e+07 states, stored\n").states == 11_889_648


def test_a_search_that_found_something() -> None:
    told = "pan:1: assertion violated  !((s_copy==1)) (at depth 28)\n" + ENDED.format(errors=1)
    assert read(told) == Found(202_848, "assertion violated  !((s_copy==1))", 28)


@pytest.mark.parametrize(
    "told",
    [
        "",
        ENDED.format(errors=1),  # and says nothing of what
        "error: max search depth too small\n" + ENDED.format(errors=0),
        "pan: out of memory\n" + ENDED.format(errors=0),
        "pan: reached -DMEMLIM bound\n" + ENDED.format(errors=0),
        "Warning: Search not completed\n" + ENDED.format(errors=0),
    ],
)
def test_a_search_that_was_cut_short(told: str) -> None:
    with pytest.raises(SpinFailed):
        read(told)


def test_a_budget_is_told_by_the_environment() -> None:
    assert Budget(2, late=1, where="qemu", outcomes=True).environment() == {
        "FAULTS": "2",
        "LATE": "1",
        "QEMU": "1",
        "OUTCOMES": "1",
    }


def test_the_models_assumptions_are_numbered_one_by_one() -> None:
    assert sorted(environment_names().values()) == list(range(1, 17))

"""docs/model/table.pml is proxy/handover/table.py, as `python -m tests.model.generate` writes it."""

import pytest

from proxy.handover.table import TABLES, Action, Event, Side, State, Step
from tests.model.generate import ACTIONS_MAX, OUTPUT, Mutant, packed, promela
from tests.model.mutants import all_mutants


def test_the_models_table_is_the_codes() -> None:
    assert OUTPUT.read_text(encoding="utf-8") == promela(), "python -m tests.model.generate writes it anew"


def test_every_entry_is_written_once() -> None:
    written = promela()
    for side, table in TABLES.items():
        part = written.partition(f"inline {side.value}_step(event)")[2].partition("\n}\n")[0]
        assert part.count(":: event == ") == len(table)


def test_actions_keep_their_order() -> None:
    assert packed((Action.WRITE, Action.REVIVE, Action.SAY)) == "WRITE | (REVIVE << 4) | (SAY << 8)"


def test_more_actions_than_the_model_has_room_for_are_an_error() -> None:
    with pytest.raises(ValueError, match="room for 4"):
        packed((Action.SAY,) * (ACTIONS_MAX + 1))


def test_a_mutant_takes_the_place_of_its_entry() -> None:
    key = (State.DOUBT, Event.RUN_HERE)
    changed = promela([Mutant("dropped", Side.SOURCE, {key: None}), Mutant("", Side.SOURCE, {key: Step(State.DONE)})])
    assert "event == RUN_HERE && (mutant < 1 || mutant > 2) -> s_state = ABORTED" in changed
    assert "event == RUN_HERE && mutant == 2 -> s_state = DONE" in changed
    assert "(event) == RUN_HERE && s_state == DOUBT && mutant != 1" in changed


def test_every_mutant_differs_from_the_table_and_from_every_other() -> None:
    mutants = all_mutants()
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        for key, step in mutant.entries.items():
            assert step != TABLES[mutant.side].get(key), mutant.name

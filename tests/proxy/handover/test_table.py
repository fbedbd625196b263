"""What the table must have whatever else is in it. docs/model/ looks at both sides together; this at each row."""

from collections.abc import Iterable
from itertools import product

import pytest

from proxy.handover.machine import Handover
from proxy.handover.table import DESTINATION, HEARD, SOURCE, TABLES, WRITTEN, Action, Event, Side, State, Step, Table

DECIDED = {State.DONE, State.ABORTED}
OPERATOR = {Event.RUN_HERE, Event.GIVE_UP}
ON_THE_COPY = {Action.START, Action.DESTROY, Action.REVIVE, Action.REMOVE, Action.TAKE}
ROWS = [(side, state, event, step) for side, table in TABLES.items() for (state, event), step in table.items()]
each_row = pytest.mark.parametrize(
    ("side", "state", "event", "step"), ROWS, ids=[f"{side.value}-{at.value}-{on.value}" for side, at, on, _ in ROWS]
)
each_side = pytest.mark.parametrize("side", Side, ids=lambda side: side.value)


def edges(table: Table) -> set[tuple[State, Event, State]]:
    return {(state, event, step.state) for (state, event), step in table.items()}


def reached(table: Table, start: Iterable[State], *, without: Iterable[State] = ()) -> set[State]:
    """The states that some events lead to, never passing through ``without``."""
    barred, found = set(without), set(start)
    while True:
        more = {step.state for (state, _), step in table.items() if state in found and step.state not in barred}
        if more <= found:
            return found
        found |= more


# ------------------------------------------------------------------ every row


@each_row
def test_nothing_is_done_before_it_is_written(side: Side, state: State, event: Event, step: Step) -> None:
    if Action.WRITE in step.actions:
        assert step.actions[0] is Action.WRITE
    promised = state not in (State.OPEN, State.ASKED)
    if step.state is not state and (promised or step.state not in (State.ASKED, State.UNDOING)):
        assert Action.WRITE in step.actions, "a new state that a restart would forget"
    assert len(set(step.actions)) == len(step.actions)
    assert step.actions.count(Action.WRITE) <= 1


@each_row
def test_a_state_on_the_way_lets_nothing_out(side: Side, state: State, event: Event, step: Step) -> None:
    """What is not written may be forgotten: nobody is told of it, no copy runs or is given away by it."""
    if Action.WRITE not in step.actions and step.state is not state:
        assert set(step.actions) <= {Action.APPROVE, Action.DESTROY}


@each_row
def test_what_is_decided_stays_so(side: Side, state: State, event: Event, step: Step) -> None:
    if state in DECIDED:
        assert step.state is state
        assert Action.WRITE not in step.actions


@each_row
def test_actions_are_the_side_s_own(side: Side, state: State, event: Event, step: Step) -> None:
    others = {
        Side.SOURCE: {Action.TAKE, Action.START, Action.DESTROY},
        Side.DESTINATION: {Action.REVIVE, Action.REMOVE},
    }
    assert not others[side] & set(step.actions)


@each_row
def test_events_are_the_side_s_own(side: Side, state: State, event: Event, step: Step) -> None:
    others = {
        Side.SOURCE: {Event.WHOLE, Event.TOOK, Event.STARTED, Event.DESTROYED},
        Side.DESTINATION: {Event.GAVE_UP, Event.PEER_PREPARED, Event.PEER_UNKNOWN},
    }
    assert event not in others[side]


@each_row
def test_what_has_to_follow_has_a_row(side: Side, state: State, event: Event, step: Step) -> None:
    """An action is answered by an event; where that has no row, the hand-over would stand still for good."""
    table = TABLES[side]
    follow = {
        Action.APPROVE: {Event.APPROVED, Event.FAILED},
        Action.START: {Event.STARTED, Event.MISSING},
        Action.DESTROY: {Event.DESTROYED},
        Action.TAKE: {Event.TOOK},
    }
    for action in step.actions:
        for event_after in follow.get(action, ()):
            assert (step.state, event_after) in table, (action, event_after)


@each_row
def test_who_is_told_has_something_to_hear(side: Side, state: State, event: Event, step: Step) -> None:
    if Action.SAY in step.actions:
        assert step.state in HEARD
        assert step.actions.index(Action.SAY) > (
            step.actions.index(Action.WRITE) if Action.WRITE in step.actions else -1
        )


@each_row
def test_a_question_of_the_peer_is_answered_and_no_more(side: Side, state: State, event: Event, step: Step) -> None:
    """Words may be repeated: one that leaves the state as it is must not do anything twice that counts twice."""
    if event in HEARD.values() and step.state is state:
        assert set(step.actions) <= {Action.SAY, Action.TAKE}


@each_side
def test_a_word_heard_twice_is_a_word_heard_once(side: Side) -> None:
    for state, event in product(WRITTEN, HEARD.values()):
        if (state, event) not in TABLES[side]:
            continue
        once = Handover(side, state)
        once.step(event)
        again = TABLES[side].get((once.state, event), Step(once.state))
        assert again.state is once.state, (state, event)
        assert not ON_THE_COPY - {Action.TAKE} & set(again.actions)


@each_side
def test_what_has_no_row_changes_nothing(side: Side) -> None:
    for state, event in product(WRITTEN, Event):
        handover = Handover(side, state)
        actions = handover.step(event)
        if (state, event) not in TABLES[side]:
            assert (handover.state, actions) == (state, ())


@each_side
def test_every_state_is_reached_and_left(side: Side) -> None:
    table = TABLES[side]
    own = {state for state, _ in table} | {step.state for step in table.values()}
    assert reached(table, [State.OPEN]) == own
    assert own == set(State) - ({State.UNDOING} if side is Side.SOURCE else set())
    for state in own - DECIDED:
        assert reached(table, [state]) & DECIDED, f"{state} has no end"


@each_side
def test_a_restart_finds_its_place(side: Side) -> None:
    """What the journal may have is taken up, or waits for the peer or an operator, as is meant."""
    own = {state for state, _ in TABLES[side]} & set(WRITTEN)
    waiting = {state for state in own if (state, Event.RESTARTED) not in TABLES[side]}
    assert waiting == (
        {State.COMMITTED, State.DOUBT}
        if side is Side.SOURCE
        else {State.PREPARED, State.VOTED, State.DONE, State.ABORTED, State.DOUBT}
    )
    with pytest.raises(ValueError, match="asked"):
        Handover(side, State.ASKED)


# ------------------------------------------------------------------ never two


def test_a_destination_starts_only_what_it_has_committed() -> None:
    for (state, event), step in DESTINATION.items():
        if Action.START in step.actions:
            assert step.state is State.COMMITTED, (state, event)
            assert state is State.COMMITTED or step.actions[0] is Action.WRITE, (state, event)


def test_a_destination_commits_only_by_its_source_s_word_or_an_operator_s() -> None:
    into = {(state, event) for state, event, after in edges(DESTINATION) if after is State.COMMITTED is not state}
    assert {event for _, event in into} == {Event.PEER_COMMITTED, Event.PEER_DONE, Event.RUN_HERE}
    for state, event in into:
        if event is not Event.RUN_HERE:
            assert state is State.VOTED, "its copy has the machine's name, and its source has its vote"


def test_a_destination_is_done_only_once_its_copy_was_seen_to_run() -> None:
    into = {(state, event) for state, event, after in edges(DESTINATION) if after is State.DONE is not state}
    assert into == {(State.COMMITTED, Event.STARTED)}


def test_a_destination_that_may_have_run_its_copy_never_says_that_it_did_not() -> None:
    after = reached(DESTINATION, [State.COMMITTED, State.DONE], without=[State.DOUBT])
    assert after == {State.COMMITTED, State.DONE}
    for (state, event), step in DESTINATION.items():
        if state in (State.COMMITTED, State.DONE):
            assert Action.DESTROY not in step.actions, event
        if state is State.DOUBT and step.state is not State.DOUBT:
            assert event in (Event.GIVE_UP, Event.PEER_ABORTED), "whoever says so knows what became of the machine"


def test_a_destination_says_that_its_copy_never_ran_only_once_it_is_gone() -> None:
    into = {(state, event) for state, event, after in edges(DESTINATION) if after is State.ABORTED is not state}
    assert {event for _, event in into} == {Event.DESTROYED, Event.MISSING}
    assert all(event is Event.MISSING or state is State.UNDOING for state, event in into)


def test_a_destination_turns_back_by_itself_only_before_its_vote() -> None:
    """From then on its source may have committed: an end that nobody there decided would leave none."""
    by_itself = {Event.FAILED, Event.LOST, Event.RESTARTED}
    left = {state for state, event, after in edges(DESTINATION) if event in by_itself and after is State.UNDOING}
    assert {State.OPEN, State.ASKED} <= left <= {State.OPEN, State.ASKED, State.PREPARED, State.UNDOING}
    assert (State.PREPARED, Event.LOST) not in DESTINATION, "it may have the only copy there is"
    for event in by_itself:
        assert (State.VOTED, event) not in DESTINATION


def test_a_source_that_has_committed_revives_only_by_its_peer_s_word_or_an_operator_s() -> None:
    for (state, event), step in SOURCE.items():
        if state in (State.COMMITTED, State.DOUBT) and Action.REVIVE in step.actions:
            assert event in (Event.PEER_ABORTED, Event.RUN_HERE), (state, event)
    for event in (Event.LOST, Event.FAILED, Event.RESTARTED, Event.PEER_UNKNOWN, Event.PEER_DOUBT):
        step = SOURCE.get((State.COMMITTED, event))
        assert step is None or Action.REVIVE not in step.actions, event


def test_a_source_revives_only_what_it_has_aborted() -> None:
    for (state, event), step in SOURCE.items():
        if Action.REVIVE in step.actions:
            assert step.state is State.ABORTED, (state, event)
            assert state is State.ABORTED or step.actions[0] is Action.WRITE, (state, event)


def test_a_source_gives_its_copy_away_only_when_the_other_runs() -> None:
    for (state, event), step in SOURCE.items():
        if Action.REMOVE in step.actions:
            assert step.state is State.DONE, (state, event)
    into = {(state, event) for state, event, after in edges(SOURCE) if after is State.DONE is not state}
    assert {event for _, event in into} == {Event.PEER_DONE, Event.GIVE_UP}
    assert {state for state, _ in into} == {State.COMMITTED, State.DOUBT}


def test_a_source_commits_only_what_both_have_voted_for_or_what_it_has_lost() -> None:
    into = {(state, event) for state, event, after in edges(SOURCE) if after is State.COMMITTED is not state}
    assert into == {(State.VOTED, Event.PEER_VOTED), (State.DOUBT, Event.PEER_VOTED), (State.VOTED, Event.MISSING)}


def test_a_source_votes_only_once_its_hypervisor_gave_the_machine_up() -> None:
    into = {(state, event) for state, event, after in edges(SOURCE) if after is State.VOTED is not state}
    assert into == {(State.PREPARED, Event.GAVE_UP)}


def test_the_hypervisors_may_go_on_only_as_both_are_prepared() -> None:
    """A source lets READY pass once its peer is prepared and everybody here has agreed, and not before."""
    into = {(state, event) for state, event, after in edges(SOURCE) if after is State.PREPARED is not state}
    assert into == {(State.ASKED, Event.APPROVED)}
    into = {(state, event) for state, event, after in edges(SOURCE) if after is State.ASKED is not state}
    assert into == {(State.OPEN, Event.PEER_PREPARED)}
    into = {(state, event) for state, event, after in edges(DESTINATION) if after is State.PREPARED is not state}
    assert into == {(State.ASKED, Event.APPROVED)}
    for side, table in TABLES.items():
        allowed = {
            Side.SOURCE: {State.PREPARED, State.VOTED},
            Side.DESTINATION: {State.PREPARED, State.DONE},
        }[side]
        assert {step.state for step in table.values() if Action.RELEASE in step.actions} == allowed


def test_no_word_of_a_peer_s_comes_too_early() -> None:
    """A lying peer gets no further than a slow one: what it says before its time has no row."""
    for event in (Event.PEER_VOTED, Event.PEER_COMMITTED, Event.PEER_DONE):
        for state in (State.OPEN, State.ASKED, State.PREPARED):
            assert (state, event) not in SOURCE, (state, event)
        for state in (State.OPEN, State.ASKED):
            assert (state, event) not in DESTINATION, (state, event)
        step = DESTINATION.get((State.PREPARED, event))
        assert step is None or step == Step(State.PREPARED, (Action.TAKE,)), "it may have its name; it stays paused"
    assert (State.VOTED, Event.PEER_DONE) not in SOURCE
    for state in (State.OPEN, State.ASKED, State.PREPARED, State.VOTED):
        assert (state, Event.PEER_DOUBT) not in SOURCE


def test_an_operator_is_heard_only_where_nobody_else_can_say() -> None:
    heard = {side: {state for state, event in TABLES[side] if event in OPERATOR} for side in Side}
    assert heard[Side.SOURCE] == {State.COMMITTED, State.DOUBT}
    assert heard[Side.DESTINATION] == {State.PREPARED, State.VOTED, State.DOUBT}
    assert (State.DOUBT, Event.RUN_HERE) not in DESTINATION, "its copy is not there"


# ------------------------------------------------------------------ the machine


def test_what_a_side_says_of_itself() -> None:
    for side in Side:
        for state in WRITTEN:
            handover = Handover(side, state)
            assert handover.word is (state if state in HEARD else None)
            assert handover.decided is (state in DECIDED)


def test_who_may_turn_back() -> None:
    """Exactly from where FAILED leads back."""
    for side in Side:
        for state in State:
            handover = Handover(side)
            handover.state = state
            step = TABLES[side].get((state, Event.FAILED))
            back = step is not None and state not in (State.COMMITTED, State.UNDOING)
            if side is Side.DESTINATION and state is State.PREPARED:
                assert not handover.may_turn_back, "not whenever it likes: it may have the only copy"
            else:
                assert handover.may_turn_back is back, (side, state)


def script(side: Side, *story: tuple[Event, State, tuple[Action, ...]]) -> None:
    handover = Handover(side)
    for event, state, actions in story:
        assert (handover.step(event), handover.state) == (actions, state), event


def test_the_way_of_a_source() -> None:
    write, say = Action.WRITE, Action.SAY
    script(
        Side.SOURCE,
        (Event.PEER_PREPARED, State.ASKED, (Action.APPROVE,)),
        (Event.APPROVED, State.PREPARED, (write, Action.RELEASE)),
        (Event.GAVE_UP, State.VOTED, (write, Action.RELEASE, say)),
        (Event.PEER_VOTED, State.COMMITTED, (write, say)),
        (Event.PEER_DONE, State.DONE, (write, Action.REMOVE, say)),
        (Event.PEER_ABORTED, State.DONE, ()),
    )


def test_the_way_of_a_destination() -> None:
    write, say = Action.WRITE, Action.SAY
    script(
        Side.DESTINATION,
        (Event.WHOLE, State.ASKED, (Action.APPROVE,)),
        (Event.APPROVED, State.PREPARED, (write, Action.RELEASE, say)),
        (Event.TOOK, State.VOTED, (write, say)),
        (Event.PEER_COMMITTED, State.COMMITTED, (write, Action.START)),
        (Event.STARTED, State.DONE, (write, say, Action.RELEASE)),
        (Event.PEER_ABORTED, State.DONE, ()),
    )

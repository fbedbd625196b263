"""The monitor lets honest migrations through, and refuses each attack on their order, their duties and their data."""

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.agents.integrity import monitor as module
from korora.agents.integrity.certification import Certification, Triple, program
from korora.agents.integrity.items import CONSTRAINED, Item
from korora.agents.integrity.levels import Attribute
from korora.agents.integrity.monitor import Monitor, Performed, initial_state
from korora.agents.integrity.order import ORDER, Stage
from korora.agents.integrity.procedures import USES, Procedure
from korora.agents.integrity.properties import PROPERTIES, secure
from korora.agents.integrity.requests import Answer
from korora.agents.integrity.state import Access
from proxy.errors import PolicyRefused
from tests.korora.agents.integrity.support import (
    ACCEPT,
    APPROVE,
    ARRIVING,
    COMMIT,
    DEPARTING,
    IDENTIFY,
    OFFER,
    OPERATOR,
    PEER,
    RECORD,
    RECOVER,
    RELAY,
    RESOLVE,
    RESUME,
    SECOND,
    TRANSFER,
    VERIFY,
    Step,
    perform,
    step,
)

EVERYBODY = Certification(
    "nobody", tuple(Triple(who, frozenset(Procedure), frozenset(Item)) for who in ("host:*", "uid:*", "relay"))
)
"""A certifier who has certified everything: what is still refused is refused by order, duties or the formal machine."""


@pytest.fixture
def monitor() -> Monitor:
    return Monitor(Certification.default())


def begun(certification: Certification, *steps: Step, initiator: str = PEER) -> Monitor:
    monitor = Monitor(certification)
    monitor.begin("s", initiator)
    perform(monitor, "s", steps)
    return monitor


def refused(monitor: Monitor, attack: Step, words: str) -> None:
    """It is refused in those words, and nothing has changed."""
    before = monitor.state("s")
    with pytest.raises(PolicyRefused, match=f"^clark-wilson: .*{words}.*; ") as caught:
        perform(monitor, "s", [attack])
    assert caught.value.rule == "clark-wilson"
    assert monitor.state("s") == before


@pytest.mark.parametrize(
    ("initiator", "steps"), [(PEER, ARRIVING), (OPERATOR, DEPARTING)], ids=["arriving", "departing"]
)
@pytest.mark.parametrize("certification", [Certification.default(), EVERYBODY], ids=["default", "everybody"])
def test_an_honest_migration_is_performed_and_kept(
    certification: Certification, initiator: str, steps: tuple[Step, ...]
) -> None:
    monitor = begun(certification, *steps, initiator=initiator)
    assert monitor.end("s") == tuple(Performed("s", *performed) for performed in steps)


def test_people_approve_and_resolve(monitor: Monitor) -> None:
    monitor.begin("s", PEER)
    perform(monitor, "s", [OFFER, ACCEPT, IDENTIFY, TRANSFER, RESUME, TRANSFER, VERIFY, RESUME, APPROVE])
    perform(monitor, "s", [(SECOND, *APPROVE[1:]), COMMIT, RESOLVE, RECOVER, COMMIT, RECORD])


def test_a_crash_is_recovered_from(monitor: Monitor) -> None:
    monitor.begin("s", PEER)
    perform(monitor, "s", [RECOVER, COMMIT, RECORD])


# ---- certified triples


@pytest.mark.parametrize("gone", range(len(Certification.default().triples)))
def test_without_its_triple_a_procedure_is_not_performed(gone: int) -> None:
    """Each default triple is needed by some honest session, so there is none to spare."""
    default = Certification.default()
    rest = Certification("x", default.triples[:gone] + default.triples[gone + 1 :])
    honest = (
        (PEER, (*ARRIVING[:-2], APPROVE, COMMIT, RESOLVE, RECOVER, RECORD)),
        (OPERATOR, DEPARTING),
        (RELAY, (step(RELAY, Procedure.OFFER, Item.OFFER),)),
    )
    refusals = []
    for initiator, steps in honest:
        try:
            begun(rest, *steps, initiator=initiator)
        except PolicyRefused as refusal:
            refusals.append(str(refusal))
    assert refusals
    assert all("has no triple for" in refusal for refusal in refusals)


def test_no_triple_of_two_is_one_of_three() -> None:
    """All items have to be in one triple: two that each have one do not add up."""
    halves = tuple(
        Triple(RELAY, frozenset({Procedure.VERIFY}), frozenset({item})) for item in (Item.STREAM, Item.MEMORY)
    )
    rest = [triple for triple in Certification.default().triples if Procedure.VERIFY not in triple.procedures]
    others = Triple(RELAY, frozenset({Procedure.IDENTIFY}), frozenset({Item.CONFIGURATION}))
    monitor = begun(Certification("x", (*halves, *rest, others)), OFFER, ACCEPT, IDENTIFY, TRANSFER)
    refused(
        monitor,
        step(RELAY, Procedure.VERIFY, Item.STREAM, Item.MEMORY),
        "relay has no triple for verify on memory, stream",
    )


def test_a_name_is_matched_exactly() -> None:
    only = Triple("host:alpha", frozenset({Procedure.OFFER}), frozenset({Item.OFFER}))
    for other in ("host:alpha2", "host:Alpha", "host:alph"):
        monitor = begun(Certification("x", (only,)), initiator=other)
        refused(monitor, (other, *OFFER[1:]), "has no triple")
    perform(begun(Certification("x", (only,))), "s", [OFFER])


@pytest.mark.parametrize(
    "subject", ["", "host:", "alpha", "uid:-1", "uid:x", "relay:x", "host:a\n", "host:a b", "uid:٣", "root:0"]
)
def test_who_is_no_subject_is_refused(monitor: Monitor, subject: str) -> None:
    with pytest.raises(PolicyRefused, match="is no subject"):
        monitor.begin("s", subject)
    monitor.begin("s", PEER)
    refused(monitor, (subject, *OFFER[1:]), "is no subject")


def test_a_procedure_touches_its_own_items_only() -> None:
    monitor = begun(EVERYBODY, *ARRIVING[:5])
    refused(monitor, step(RELAY, Procedure.COMMIT, Item.JOURNAL, Item.REASON), "commit does not touch reason")
    refused(monitor, step(RELAY, Procedure.COMMIT), "commit does not touch nothing")


def test_a_reload_counts_for_what_is_performed_next() -> None:
    monitor = begun(Certification.default(), *ARRIVING[:5])
    without = tuple(triple for triple in Certification.default().triples if Procedure.COMMIT not in triple.procedures)
    monitor.reload(Certification("x", without))
    assert Access(RELAY, Item.JOURNAL, Attribute.WRITE) not in monitor.state("s").matrix
    refused(monitor, COMMIT, "relay has no triple for commit")
    monitor.reload(Certification.default())
    assert secure(monitor.state("s"))
    perform(monitor, "s", [COMMIT])


# ---- order


@pytest.mark.parametrize("steps", [ARRIVING, DEPARTING], ids=["arriving", "departing"])
def test_every_other_order_is_refused(steps: tuple[Step, ...]) -> None:
    """Of all orders of a session's procedures only one leads from its offer to its commit."""
    initiator = steps[0][0]
    for order in itertools.permutations(steps[:-1]):
        if order == steps[:-1]:
            continue
        with pytest.raises(PolicyRefused, match="out of order"):
            begun(EVERYBODY, *order, initiator=initiator)


@pytest.mark.parametrize("left_out", range(5))
def test_nothing_is_left_out_before_commit(left_out: int) -> None:
    steps = ARRIVING[:left_out] + ARRIVING[left_out + 1 : 6]
    with pytest.raises(PolicyRefused, match="out of order"):
        begun(EVERYBODY, *steps)


def test_a_session_that_never_began_performs_nothing(monitor: Monitor) -> None:
    with pytest.raises(PolicyRefused, match="session s has not begun"):
        perform(monitor, "s", [OFFER])
    assert monitor.end("s") == ()


def test_a_begin_is_not_repeated(monitor: Monitor) -> None:
    monitor.begin("s", PEER)
    perform(monitor, "s", [OFFER])
    with pytest.raises(PolicyRefused, match="session s has begun already"):
        monitor.begin("s", "host:beta")
    perform(monitor, "s", [ACCEPT])


def test_an_ended_session_is_recovered_and_never_offered_again(monitor: Monitor) -> None:
    monitor.begin("s", PEER)
    perform(monitor, "s", ARRIVING)
    monitor.end("s")
    monitor.begin("s", PEER)
    refused(monitor, OFFER, "out of order: the session is begun again")
    perform(monitor, "s", [RECOVER])


# ---- duties


def test_the_initiator_does_not_approve() -> None:
    monitor = begun(Certification.default(), *DEPARTING[:5], initiator=OPERATOR)
    refused(monitor, APPROVE, f"{OPERATOR} began the session, and may not approve it")
    perform(monitor, "s", [(SECOND, *APPROVE[1:]), COMMIT])


def test_two_approvals_are_of_two() -> None:
    default = Certification.default()
    monitor = begun(Certification("x", default.triples, approvals=2), *ARRIVING[:5])
    refused(monitor, COMMIT, "wants the approval of 2, and has that of 0")
    perform(monitor, "s", [APPROVE, APPROVE])
    refused(monitor, COMMIT, "wants the approval of 2, and has that of 1")
    perform(monitor, "s", [(SECOND, *APPROVE[1:]), COMMIT])


def test_a_recovery_in_mid_session_is_no_approval() -> None:
    monitor = begun(Certification("x", Certification.default().triples, approvals=1), *ARRIVING[:5], RECOVER)
    refused(monitor, COMMIT, "wants the approval of 1, and has that of 0")


@pytest.mark.parametrize("approver_commits", [False, True])
def test_who_approves_commits_only_where_that_is_wanted(approver_commits: bool) -> None:
    certification = Certification("x", EVERYBODY.triples, approver_commits=approver_commits)
    monitor = begun(certification, *ARRIVING[:5], (RELAY, *APPROVE[1:]))
    if approver_commits:
        perform(monitor, "s", [COMMIT])
    else:
        refused(monitor, COMMIT, "relay approved the session, and may not commit it")


# ---- data: although everything is certified


def test_memory_is_not_made_of_a_stream_that_is_not_verified() -> None:
    monitor = begun(EVERYBODY, *ARRIVING[:4])
    refused(
        monitor, step(RELAY, Procedure.VERIFY, Item.MEMORY), "may not do verify on memory: the answer to get stream"
    )


@pytest.mark.parametrize("subject", [PEER, OPERATOR])
@pytest.mark.parametrize(
    "attack", [ACCEPT, IDENTIFY, VERIFY, COMMIT, RECOVER, RECORD], ids=lambda attack: attack[1].value
)
def test_only_the_relay_takes_anything_for_true(subject: str, attack: Step) -> None:
    """Even with a triple, who stands lower than the relay does not write what stands as high as it does."""
    reached = next((number for number, honest in enumerate(ARRIVING) if honest == attack), 0)
    monitor = begun(EVERYBODY, *ARRIVING[:reached])
    refused(monitor, (subject, *attack[1:]), rf"may not do {attack[1]} on .*: the answer to get .* is no")


def test_what_was_verified_takes_no_more_bytes() -> None:
    """The order of procedures refuses it, too: this shows that the levels do by themselves."""
    monitor = begun(EVERYBODY, *ARRIVING[:5])
    monitor._sessions["s"].stage = Stage.TRANSFERRED
    refused(monitor, TRANSFER, "the answer to get stream .a. is no")


def test_a_name_that_is_only_claimed_is_not_committed() -> None:
    monitor = begun(EVERYBODY, *ARRIVING[:2])
    monitor._sessions["s"].stage = Stage.VERIFIED
    refused(monitor, step(RELAY, Procedure.COMMIT, Item.CONFIGURATION), "the answer to get configuration .r. is no")
    refused(monitor, step(RELAY, Procedure.COMMIT, Item.MEMORY), "the answer to get memory .r. is no")


def test_nobody_in_a_session_writes_a_vtpm() -> None:
    state = initial_state(arriving=False)
    assert all(state.of_object(Item.VTPM).level > state.of_object(item).level for item in CONSTRAINED - {Item.VTPM})
    assert not any(use[Item.VTPM].attributes - {Attribute.READ} for use in USES.values() if Item.VTPM in use)


SUBJECTS = st.sampled_from([PEER, "host:beta", RELAY, OPERATOR, SECOND])
STEPS = st.lists(
    st.tuples(
        SUBJECTS, st.sampled_from(list(Procedure)), st.frozensets(st.sampled_from(list(Item)), min_size=1, max_size=4)
    )
    | st.sampled_from([*ARRIVING, *DEPARTING, APPROVE, RECOVER, RESUME, RESOLVE]),
    max_size=30,
)


@given(certification=st.sampled_from([Certification.default(), EVERYBODY]), initiator=SUBJECTS, steps=STEPS)
def test_whatever_is_tried_the_state_stays_secure(
    certification: Certification, initiator: str, steps: list[Step]
) -> None:
    monitor = Monitor(certification)
    monitor.begin("s", initiator)
    assert secure(monitor.state("s"))
    performed = []
    for attempt in steps:
        try:
            performed += perform(monitor, "s", [attempt])
        except PolicyRefused:
            continue
        state = monitor.state("s")
        assert {name for name, holds in PROPERTIES.items() if not holds(state)} == set()
        assert not state.accesses
        if not initiator.startswith("host:"):
            continue
        done = {kept.procedure for kept in performed}
        assert Item.MEMORY not in state.objects or done & {Procedure.VERIFY, Procedure.RECOVER}
    assert monitor.end("s") == tuple(performed)


# ---- each defence is what refuses: without it, the attack is performed


def no_certification(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Certification, "permits", lambda *_: True)
    patch.setattr(Certification, "accesses", EVERYBODY.accesses.__func__.__get__(EVERYBODY))  # type: ignore[attr-defined]


def no_duties(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Monitor, "_separated", lambda *_: None)


def no_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "ORDER", {(stage, procedure): stage for stage in Stage for procedure in Procedure})


def no_machine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "respond", lambda rules, request, state: (Answer.YES, state))


def no_memory_of_ids(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "ENDED_MAX", 0)


Defence = Callable[[pytest.MonkeyPatch], None]
ATTACKS: dict[str, tuple[Defence, Certification, str, tuple[Step, ...], Step]] = {
    "no triple": (no_certification, Certification.default(), PEER, (), step(PEER, Procedure.RECORD, Item.JOURNAL)),
    "initiator approves": (no_duties, EVERYBODY, OPERATOR, DEPARTING[:5], APPROVE),
    "approver commits": (no_duties, EVERYBODY, PEER, (*ARRIVING[:5], (RELAY, *APPROVE[1:])), COMMIT),
    "too few approvals": (no_duties, Certification("x", EVERYBODY.triples, approvals=1), PEER, ARRIVING[:5], COMMIT),
    "out of order": (no_order, EVERYBODY, OPERATOR, DEPARTING[:1], COMMIT),
    "peer verifies": (no_machine, EVERYBODY, PEER, ARRIVING[:4], (PEER, *VERIFY[1:])),
    "memory of an unverified stream": (
        no_machine,
        EVERYBODY,
        PEER,
        ARRIVING[:4],
        step(RELAY, Procedure.VERIFY, Item.MEMORY),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_defence_is_what_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defence, certification, initiator, before, attack = ATTACKS[name]
    attacked = begun(certification, *before, initiator=initiator)
    if defence is no_certification:
        no_order(monkeypatch)
    with pytest.raises(PolicyRefused):
        perform(attacked, "s", [attack])
    defence(monkeypatch)
    perform(begun(certification, *before, initiator=initiator), "s", [attack])


def test_forgotten_ids_could_be_offered_again(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory_of_ids(monkeypatch)
    for _ in range(2):
        monitor.begin("s", PEER)
        perform(monitor, "s", [OFFER])
        monitor.end("s")


# ---- bounds


def test_sessions_are_bounded(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SESSIONS_MAX", 3)
    for number in range(3):
        monitor.begin(str(number), PEER)
    with pytest.raises(PolicyRefused, match="3 sessions are under way"):
        monitor.begin("3", PEER)
    monitor.end("0")
    monitor.begin("3", PEER)


def test_what_is_kept_of_a_session_is_bounded(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERFORMED_MAX", 5)
    monitor.begin("s", PEER)
    perform(monitor, "s", [OFFER, ACCEPT, RESUME, RESUME, RESUME])
    refused(monitor, RESUME, "has performed 5 procedures")


def test_ended_sessions_are_forgotten_at_last(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENDED_MAX", 2)
    for number in range(3):
        monitor.begin(str(number), PEER)
        monitor.end(str(number))
    assert list(monitor._ended) == ["1", "2"]


# ---- the tables


def test_every_procedure_has_its_uses_and_its_place() -> None:
    assert set(USES) == set(Procedure) == {procedure for _, procedure in ORDER}
    assert {item for uses in USES.values() for item in uses} == set(Item)


def test_every_stage_is_reached() -> None:
    assert {*ORDER.values(), Stage.AGAIN, Stage.BEGUN} == set(Stage)


def test_unconstrained_items_become_constrained_by_a_procedure_only() -> None:
    """C5: what is made is made of something that the same table takes for true, or that was trusted all along."""
    raised = {item for uses in USES.values() for item, use in uses.items() if use.raises}
    sources = {use.made_from for uses in USES.values() for use in uses.values() if use.made_from is not None}
    assert sources <= raised | CONSTRAINED
    assert raised == {Item.OFFER, Item.CONFIGURATION, Item.STREAM}


def test_what_it_is_named_says_what_it_is() -> None:
    assert all(re.fullmatch(r"procedure [a-z]+", program(procedure)) for procedure in Procedure)

"""What a host answers: its policy, people, and what is certified, in that order."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from korora.authority import APPROVALS, Office
from korora.policy.board import Board
from korora.policy.file import NO_POLICY, PolicyFile
from korora.watched import Unwatched
from proxy.authority import Act, Point, Question
from proxy.errors import PolicyRefused
from proxy.hypervisors.base import Vm
from proxy.session import Role

VM = Vm("web1", "11111111-2222-3333-4444-555555555555")
SESSION = "ab" * 16
OFFER = Question(Point.OFFER, Role.SOURCE, SESSION, peer="beta", pin="0" * 64, egress="default", tenant="", user=1000)
ARRIVES = replace(OFFER, role=Role.DESTINATION, peer="alpha", user=None)
NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def office(folder: Path, policy: str = "") -> Office:
    path = None
    if policy:
        path = folder / "policy.toml"
        path.write_text(policy)
        path.chmod(0o600)
    return Office("alpha", PolicyFile(path), folder, lambda: NOW)


def at(question: Question, point: Point, vm: Vm | None = VM) -> Question:
    return replace(question, point=point, vm=vm)


@pytest.mark.parametrize("question", [OFFER, ARRIVES, replace(OFFER, user=None)])
async def test_without_a_policy_an_honest_session_passes_and_tells_who_did_what(
    tmp_path: Path, question: Question
) -> None:
    here = office(tmp_path)
    rulings = [await here.ask(question)]
    rulings += [await here.ask(at(question, point)) for point in (Point.IDENTITY, Point.HANDOVER)]
    assert {ruling.rule for ruling in rulings} == {"no policy"}
    acts = [(act.subject, act.procedure) for ruling in rulings for act in ruling.acts]
    initiator = "host:alpha" if question is ARRIVES else "uid:1000" if question is OFFER else "relay"
    passes = "host:alpha" if question is ARRIVES else "relay"
    assert acts == [
        (initiator, "offer"),
        ("relay", "accept"),
        ("relay", "record"),
        ("relay", "identify"),
        (passes, "transfer"),
        ("relay", "verify"),
        ("relay", "record"),
        ("relay", "commit"),
    ]
    here.ended(question)


async def test_one_session_at_both_ends_of_one_host(tmp_path: Path) -> None:
    here = office(tmp_path)
    for point in (Point.OFFER, Point.IDENTITY, Point.HANDOVER):
        for question in (OFFER, ARRIVES):
            await here.ask(at(question, point, None if point is Point.OFFER else VM))
    for question in (OFFER, ARRIVES):
        here.ended(question)


class Told(Unwatched):
    """A watch that remembers."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str, bool]] = []
        self.waiting: list[tuple[str, int]] = []

    def decided(self, role: str, point: str, *, allowed: bool) -> None:
        self.answers.append((role, point, allowed))

    def approvals_waiting(self, role: str, count: int) -> None:
        self.waiting.append((role, count))


def watched(folder: Path, policy: str) -> tuple[Office, Told]:
    (folder / "policy.toml").write_text(policy)
    (folder / "policy.toml").chmod(0o600)
    told = Told()
    return Office("alpha", PolicyFile(folder / "policy.toml"), folder, lambda: NOW, watch=told), told


async def test_every_answer_is_told_by_whoever_gave_it(tmp_path: Path) -> None:
    """The policy's, and the certification's: a session that is refused at its offer is never one."""
    here, told = watched(
        tmp_path,
        '[[rule]]\nname = "no"\neffect = "deny"\npeer = ["mallory"]\n[[rule]]\nname = "all"\neffect = "allow"\n',
    )
    await here.ask(OFFER)
    with pytest.raises(PolicyRefused, match="no denies"):
        await here.ask(replace(ARRIVES, peer="mallory"))
    with pytest.raises(PolicyRefused, match="out of order"):
        await here.ask(at(OFFER, Point.HANDOVER))
    assert told.answers == [("source", "offer", True), ("destination", "offer", False), ("source", "handover", False)]
    assert told.waiting == []


async def test_who_waits_for_people_is_told_until_it_does_not_whatever_ends_that(tmp_path: Path) -> None:
    here, told = watched(tmp_path, TWO)
    other = replace(OFFER, session="cd" * 16)
    for question in (OFFER, other):
        await here.ask(question)
    asking = asyncio.create_task(here.ask(at(OFFER, Point.IDENTITY)))
    await approve(tmp_path, 1001, 1002)
    await asking
    assert told.waiting == [("source", 1), ("source", 0)]
    asking = asyncio.create_task(here.ask(at(other, Point.IDENTITY)))
    await approve(tmp_path)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert told.waiting[2:] == [("source", 1), ("source", 0)]
    assert told.answers == [("source", "offer", True)] * 2 + [("source", "identity", True)], "a wait cut short is none"


async def test_a_no_names_the_rule_and_the_host(tmp_path: Path) -> None:
    here = office(
        tmp_path,
        '[[rule]]\nname = "never-web"\neffect = "deny"\nvm = ["web*"]\n[[rule]]\nname = "all"\neffect = "allow"\n',
    )
    assert (await here.ask(OFFER)).rule == "all"
    with pytest.raises(PolicyRefused, match=r"policy of alpha.*never-web") as refused:
        await here.ask(at(OFFER, Point.IDENTITY))
    assert refused.value.rule == "never-web"


async def test_what_comes_out_of_turn_or_again_is_refused_by_the_certification(tmp_path: Path) -> None:
    here = office(tmp_path)
    await here.ask(OFFER)
    with pytest.raises(PolicyRefused, match="begun already") as refused:
        await here.ask(OFFER)
    assert refused.value.rule == "clark-wilson"
    with pytest.raises(PolicyRefused, match="out of order"):
        await here.ask(at(OFFER, Point.HANDOVER))
    here.ended(OFFER)
    with pytest.raises(PolicyRefused, match="not begun"):
        await here.ask(at(OFFER, Point.IDENTITY))


async def test_who_may_not_record_begins_nothing(tmp_path: Path) -> None:
    triples = (
        '[certification]\nby = "carol"\n'
        '[[triple]]\nsubject = "uid:*"\nprocedure = ["offer"]\nitems = ["offer"]\n'
        '[[triple]]\nsubject = "relay"\nprocedure = ["accept"]\nitems = ["offer"]\n'
    )
    here = office(tmp_path, triples + '[[rule]]\nname = "all"\neffect = "allow"\n')
    with pytest.raises(PolicyRefused, match="no triple for record on receipts") as refused:
        await here.ask(OFFER)
    assert refused.value.rule == "clark-wilson"


async def test_a_reload_counts_for_what_is_asked_next(tmp_path: Path) -> None:
    text = '[[rule]]\nname = "all"\neffect = "allow"\n'
    here = office(tmp_path, text)
    await here.ask(OFFER)
    await here.ask(at(OFFER, Point.IDENTITY))
    (tmp_path / "policy.toml").write_text(text.replace("allow", "deny"))
    here.reload(PolicyFile(tmp_path / "policy.toml"))
    with pytest.raises(PolicyRefused, match="all denies"):
        await here.ask(at(OFFER, Point.HANDOVER))


TWO = '[[rule]]\nname = "two"\neffect = "allow"\napprovals = 2\napprovers = [1000, 1001, 1002]\napproval_timeout = 5\n'


async def approve(folder: Path, *uids: int) -> None:
    board = Board(folder / APPROVALS)
    while not (waiting := await asyncio.to_thread(board.waiting)):  # noqa: ASYNC110 - files tell nobody
        await asyncio.sleep(0.01)
    for uid in uids:
        (listed,) = waiting
        board.answer(listed.request.session, listed.request.facts.side, listed.digest, uid, approved=True)


async def test_two_people_approve_before_the_machine_moves_and_not_again_at_the_handover(tmp_path: Path) -> None:
    here = office(tmp_path, TWO)
    assert not (await here.ask(OFFER)).approvers
    asking = asyncio.create_task(here.ask(at(OFFER, Point.IDENTITY)))
    await approve(tmp_path, 1001, 1002)
    assert (await asking).approvers == (1001, 1002)
    ruling = await here.ask(at(OFFER, Point.HANDOVER))
    assert ruling.approvers == (1001, 1002)
    machine = ("configuration", "journal", "memory")
    assert Act("uid:1001", "approve", machine) in ruling.acts
    assert Act("uid:1002", "approve", machine) in ruling.acts
    here.ended(OFFER)


async def test_what_was_approved_of_one_machine_counts_for_no_other(tmp_path: Path) -> None:
    """A stream that told another name than the machine has which it turned out to be."""
    here = office(tmp_path, TWO)
    await here.ask(OFFER)
    asking = asyncio.create_task(here.ask(at(OFFER, Point.IDENTITY)))
    await approve(tmp_path, 1001, 1002)
    await asking
    again = asyncio.create_task(here.ask(at(OFFER, Point.HANDOVER, Vm("fin-3", VM.uuid))))
    await approve(tmp_path, 1002)
    assert [listed.request.facts.vm for listed in Board(tmp_path / APPROVALS).waiting()] == ["fin-3"]
    assert not again.done()
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)


async def test_who_began_it_cannot_approve_of_it(tmp_path: Path) -> None:
    here = office(tmp_path, TWO)
    await here.ask(OFFER)
    asking = asyncio.create_task(here.ask(at(OFFER, Point.IDENTITY)))
    with pytest.raises(PolicyRefused, match="began it"):
        await approve(tmp_path, 1000)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert not Board(tmp_path / APPROVALS).waiting()


async def test_a_rule_that_comes_to_want_people_after_the_machine_was_known_waits_at_the_handover(
    tmp_path: Path,
) -> None:
    here = office(tmp_path)
    await here.ask(OFFER)
    await here.ask(at(OFFER, Point.IDENTITY))
    (tmp_path / "later.toml").write_text(TWO)
    (tmp_path / "later.toml").chmod(0o600)
    here.reload(PolicyFile(tmp_path / "later.toml"))
    asking = asyncio.create_task(here.ask(at(OFFER, Point.HANDOVER)))
    await approve(tmp_path, 1001, 1002)
    assert (await asking).approvers == (1001, 1002)


def test_there_is_no_digest_of_no_policy() -> None:
    assert not NO_POLICY.digest


async def test_all_processes_of_a_host_count_together(tmp_path: Path) -> None:
    """A daemon has an office in each of its workers: a limit is not each one's own."""
    one, two = (office(tmp_path, '[[rule]]\nname = "one"\neffect = "allow"\nmax_running = 1\n') for _ in range(2))
    other = replace(OFFER, session="cd" * 16)
    assert (await one.ask(OFFER)).rule == "one"
    with pytest.raises(PolicyRefused, match="no rule allows it"):
        await two.ask(other)
    two.ended(other)
    assert (await one.ask(at(OFFER, Point.IDENTITY))).rule == "one"
    one.ended(at(OFFER, Point.IDENTITY))
    assert (await two.ask(replace(OFFER, session="ef" * 16))).rule == "one"


async def test_where_nothing_can_be_counted_only_a_policy_refuses(tmp_path: Path) -> None:
    (tmp_path / "ledger").touch()
    with pytest.raises(PolicyRefused, match="a session that begins cannot be counted"):
        await office(tmp_path, '[[rule]]\nname = "one"\neffect = "allow"\n').ask(OFFER)
    here = office(tmp_path)
    assert (await here.ask(OFFER)).rule == "no policy"
    here.ended(OFFER)

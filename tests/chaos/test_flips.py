"""Single bits arrive wrong on the way between the relays, anywhere, at any time.

Why: TCP's checksum has 16 bits and finds no words that changed places; boxes that rewrite packets compute it anew over
what they broke. A wrong bit in a page of a guest's memory is noticed, if ever, weeks later. Here it must end
the session with code 5 at both ends (4 in the handshake), be final whatever the patience, and no wrong byte may reach
a hypervisor: every byte is compared.
"""

import random
from pathlib import Path

import pytest

from tests.attacks.processes import Hosts
from tests.attacks.relays import on_uvloop
from tests.attacks.wire import Kind
from tests.chaos.faults import Faults, Link, Plan
from tests.chaos.load import KIB, MIB, Talk
from tests.chaos.relays import Standing, standing

EXIT_AUTHENTICATION, EXIT_INTEGRITY = 4, 5
SEED = 1
FLIPS = 10
LANE_HEAD_BYTES = 20 + 36  # prefix and sealed HELLO: a flip there costs that connection only, see below
HELLO_OFFSETS = (3, 19, 20, 40, 55)  # magic, token, header, ciphertext, tag


@pytest.mark.parametrize("patience", [0, 30], ids=lambda seconds: f"resume-timeout {seconds}")
@on_uvloop
async def test_a_flipped_bit_on_a_lane(hosts: Hosts, tmp_path: Path, patience: int) -> None:
    """At random offsets, in data and in acknowledgements, one session after another of the same pair."""
    seed = SEED + patience
    dice = random.Random(seed)
    pending: list[Plan] = []

    def plan(link: Link) -> Plan:
        return pending.pop() if pending and link.kind is Kind.LANE else Plan()

    async with standing(hosts, tmp_path, plan=plan, seed=seed, resume_seconds=patience) as pair:
        for number in range(FLIPS):
            at = LANE_HEAD_BYTES + dice.randrange(3 * MIB)
            pending[:] = [Plan(Faults(flip_at=at)) if dice.random() < 0.5 else Plan(backward=Faults(flip_at=at))]
            told = f"seed {seed}, session {number}, offset {at}"
            ends, codes = await pair.session(Talk(number, 4 * MIB, 4 * MIB))
            assert pair.proxy.did.flips == number + 1, told
            assert codes == (EXIT_INTEGRITY, EXIT_INTEGRITY), told
            assert ends[0].cut, f"{told}: {ends[0]}"
        ends, codes = await pair.session(Talk(99, MIB, MIB))
        assert codes == (0, 0)
        assert ends[0].whole


@on_uvloop
async def test_a_flipped_bit_on_control(hosts: Hosts, tmp_path: Path) -> None:
    """Each of the first kilobytes of the handshake and of what follows, either way."""
    dice = random.Random(4)
    pending: list[Plan] = []

    def plan(link: Link) -> Plan:
        return pending.pop() if pending and link.kind is Kind.CONTROL else Plan()

    async with standing(hosts, tmp_path, plan=plan, seed=4) as pair:
        sent, source_sessions = 0, 0
        for number in range(16):
            at = dice.randrange(4 * KIB)
            pending[:] = [Plan(Faults(flip_at=at)) if number % 2 else Plan(backward=Faults(flip_at=at))]
            told = f"session {number}, {'forward' if number % 2 else 'backward'} {at}"
            before, talk = pair.proxy.did.flips, Talk(number, 256 * KIB, KIB)
            ends = await pair.talk(talk)
            source_sessions += 1
            code = (await pair.send.judged(source_sessions))[-1]
            if pair.proxy.did.flips == before:
                assert (code, ends.whole) == (0, True), f"{told}: no bit was flipped, {code}, {ends}"
                continue
            sent += 1
            assert code in {EXIT_AUTHENTICATION, EXIT_INTEGRITY} or (code == 0 and ends.whole), (
                f"{told}: {code}, {ends}"
            )
        assert sent >= 8
        await healthy(pair, source_sessions)


async def healthy(pair: Standing, source_sessions: int) -> None:
    ends = await pair.talk(Talk(1000, MIB, MIB))
    assert ends.whole
    assert (await pair.send.judged(source_sessions + 1))[-1] == 0


@on_uvloop
async def test_a_flipped_bit_in_a_lanes_hello(hosts: Hosts, tmp_path: Path) -> None:
    """It costs that connection, never the session: another lane is opened, and all arrives."""
    pending: list[Plan] = []

    def plan(link: Link) -> Plan:
        return pending.pop() if pending and link.kind is Kind.LANE else Plan()

    async with standing(hosts, tmp_path, plan=plan, seed=5) as pair:
        for number, offset in enumerate(HELLO_OFFSETS):
            pending[:] = [Plan(Faults(flip_at=offset))]
            ends, codes = await pair.session(Talk(number, MIB, MIB))
            assert pair.proxy.did.flips == number + 1, f"offset {offset}"
            assert codes == (0, 0), f"offset {offset}: {pair.send.lines}"
            assert ends[0].whole, f"offset {offset}"

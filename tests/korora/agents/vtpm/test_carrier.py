"""A vTPM between two real swtpm: exactly one that can be used, wherever either side is killed."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from crypto.errors import WrapBroken
from korora.agents.vtpm import parcel
from korora.agents.vtpm.carrier import Beat
from korora.agents.vtpm.commands import NOT_STARTED
from korora.agents.vtpm.handover import Holding
from korora.agents.vtpm.ledger import flush
from korora.agents.vtpm.parcel import Parcel, Passage, Proof
from proxy.errors import VtpmFailed, VtpmRefused
from tests.korora.agents.vtpm.emulators import emulators, key, known_by, lived_in
from tests.korora.agents.vtpm.hosts import SESSION, UUID, Host

__all__ = ["key"]

Pair = tuple[Host, Host]
SEALED: list[tuple[bytes, bytes]] = []
"""On the disk of the machine that a test is about."""


@pytest.fixture
def pair(tmp_path: Path, key: Path) -> Iterator[Pair]:
    """A source whose vTPM has been lived in, and a destination."""
    with emulators() as held:
        source, destination = Host.make("alpha", tmp_path / "a", key), Host.make("beta", tmp_path / "b", key)
        lived_in(source.emulator)
        SEALED[:] = [source.emulator.sealed]
        yield source, destination
        held += [source.emulator, destination.emulator]


def look(host: Host) -> object:
    """What a guest knows its TPM by, which has lived at ``alpha``."""
    return known_by(host.emulator, SEALED[0])


def test_it_moves_exactly_once(pair: Pair) -> None:
    source, destination = pair
    before = look(source)
    leaving, arriving = source.carrier(), destination.carrier()
    assert leaving.has(UUID)
    wrapped = leaving.depart(UUID, arriving.recipient())
    proof = arriving.arrive(UUID, wrapped)
    leaving.check(UUID, proof)
    assert (source.usable, destination.usable) == (True, False)  # its machine is suspended, and may still stay
    leaving.part(UUID)
    assert (source.usable, destination.usable) == (False, False)
    arriving.release(UUID)
    assert (source.usable, destination.usable) == (False, True)
    leaving.given(UUID)
    assert look(destination) == before
    assert source.traces() == []
    assert not source.emulator.swtpm.listens
    assert destination.traces() == ["tpm2-00.permall"]
    assert (source.ledger.holding, destination.ledger.holding) == (Holding.GONE, Holding.HERE)
    assert source.ledger.epoch == destination.ledger.epoch == 1
    assert source.ledger.entries[-1].digest == destination.ledger.entries[-1].digest
    for _ in range(2):  # all of the end may be asked for again
        arriving.release(UUID)
        leaving.given(UUID)
    assert look(destination) == before


def test_it_comes_back(pair: Pair) -> None:
    here, there = pair
    before = look(here)
    for number in range(4):
        there.restart()
        session = f"{number:032x}"
        leaving, arriving = here.carrier(session), there.carrier(session)
        leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
        leaving.part(UUID)
        arriving.release(UUID)
        leaving.given(UUID)
        assert there.ledger.epoch == number + 1
        here, there = there, here
    assert look(here) == before


def test_a_machine_without_one(tmp_path: Path, key: Path) -> None:
    with emulators() as held:
        host = Host.make("alpha", tmp_path / "a", key)
        held.append(host.emulator)
        carrier = host.carrier()
        other = UUID.replace("0f9c", "1111")
        assert not carrier.has(other)
        assert not carrier.has("")
        assert carrier.depart(other, b"") == b""
        for end in (carrier.part, carrier.stay, carrier.given, carrier.release, carrier.wipe):
            end(other)
            end("")


def test_it_stays_when_the_machine_does(pair: Pair) -> None:
    source, destination = pair
    before = look(source)
    leaving, arriving = source.carrier(), destination.carrier()
    arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    leaving.part(UUID)
    leaving.stay(UUID)
    arriving.wipe(UUID)
    assert look(source) == before
    assert (source.usable, destination.usable) == (True, False)
    assert destination.traces() == []
    assert "tpm2-00.volatilestate" not in source.traces()  # a restart must not go back to it
    assert destination.ledger.holding is Holding.WIPED
    # The next attempt is another epoch, so that what this one has given can never be used again.
    destination.restart()
    second, again = source.carrier("cd" * 16), destination.carrier("cd" * 16)
    again.arrive(UUID, second.depart(UUID, again.recipient()))
    assert destination.ledger.epoch == 2


def test_a_vtpm_that_no_guest_has_started(tmp_path: Path, key: Path) -> None:
    with emulators() as held:
        source, destination = Host.make("alpha", tmp_path / "a", key), Host.make("beta", tmp_path / "b", key)
        held += [source.emulator, destination.emulator]
        source.emulator.swtpm.start()
        leaving, arriving = source.carrier(), destination.carrier()
        leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
        leaving.part(UUID)
        arriving.release(UUID)
        leaving.given(UUID)
        with destination.emulator.guest() as guest:
            assert guest.code() == NOT_STARTED  # as it was
            guest.startup()
            assert parcel.identity_of_key(guest.names()[0]) == destination.ledger.identity


# ---- attacks


@pytest.fixture
def parted(pair: Pair) -> tuple[Host, Host, bytes]:
    """A hand-over whose parcel an attacker has kept, with the destination's key (or its whole memory)."""
    source, destination = pair
    leaving, arriving = source.carrier(), destination.carrier()
    wrapped = leaving.depart(UUID, arriving.recipient())
    arriving.arrive(UUID, wrapped)
    leaving.part(UUID)
    arriving.release(UUID)
    leaving.given(UUID)
    assert arriving._recipient is not None
    _, held = parcel.unwrap(SESSION, UUID, wrapped, arriving._recipient)
    return source, destination, msgspec.msgpack.encode(held)


def offer(host: Host, content: bytes, epoch: int, session: str = "ef" * 16) -> None:
    """Somebody gives that state to ``host`` under that epoch."""
    carrier = host.carrier(session)
    held = msgspec.msgpack.decode(content, type=Parcel)
    carrier.arrive(UUID, Passage(session, UUID, epoch).wrap(held, carrier.recipient()))


def test_a_second_use_is_refused(parted: tuple[Host, Host, bytes]) -> None:
    _, destination, held = parted
    with pytest.raises(VtpmRefused, match=r"epoch 1 of the vTPM was seen here already \(here\): a second use"):
        offer(destination, held, 1)


def test_a_second_copy_is_refused(parted: tuple[Host, Host, bytes]) -> None:
    _, destination, held = parted
    with pytest.raises(VtpmRefused, match=r"the vTPM is here .* and there can be only one"):
        offer(destination, held, 2)


def test_a_rollback_is_refused(parted: tuple[Host, Host, bytes]) -> None:
    source, destination, held = parted
    source.restart()
    leaving, arriving = destination.carrier("01" * 16), source.carrier("01" * 16)
    arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    leaving.part(UUID)
    arriving.release(UUID)
    leaving.given(UUID)
    destination.restart()
    with pytest.raises(VtpmRefused, match="epoch 1 of the vTPM was seen here already"):
        offer(destination, held, 1)
    newer = source.ledger.epoch
    assert newer == 2
    offer(destination, held, 5)  # an epoch nobody has given yet: the source's ledger knows that it has not
    assert destination.ledger.holding is Holding.ARRIVING  # and what is not released never answers
    assert not destination.usable


def test_a_fork_is_refused(parted: tuple[Host, Host, bytes]) -> None:
    source, destination, held = parted
    other = msgspec.structs.replace(msgspec.msgpack.decode(held, type=Parcel), volatile_flags=1)
    with pytest.raises(VtpmRefused, match="a fork of it"):
        offer(destination, msgspec.msgpack.encode(other), 1)
    source.restart()
    with pytest.raises(VtpmRefused, match="epoch 1 of the vTPM was seen here already"):
        offer(source, held, 1)


def test_what_has_gone_cannot_be_given_again(parted: tuple[Host, Host, bytes]) -> None:
    source, _, _ = parted
    source.restart()
    lived_in(source.emulator)  # somebody has put another one in its place
    with pytest.raises(VtpmRefused, match=r"not here to be given: it is gone \(epoch 1, with beta\)"):
        source.carrier("02" * 16).depart(UUID, source.carrier("02" * 16).recipient())


def test_another_vtpm_in_its_place_is_told(pair: Pair, tmp_path: Path, key: Path) -> None:
    source, destination = pair
    leaving, arriving = source.carrier(), destination.carrier()
    leaving.depart(UUID, arriving.recipient())
    leaving.stay(UUID)
    source.emulator.swtpm.end()
    for path in source.emulator.state.iterdir():
        path.unlink()
    source.emulator.process.wait(5)
    source.restart()
    lived_in(source.emulator)
    with pytest.raises(VtpmRefused, match="another vTPM than the one known here"):
        source.carrier("02" * 16).depart(UUID, arriving.recipient())


def test_what_is_stored_for_a_machine_that_is_off_is_left_alone(pair: Pair) -> None:
    """A peer sends a machine of that UUID and turns back: what the ledger lets be erased then must be its own."""
    source, destination = pair
    lived_in(destination.emulator)
    with destination.emulator.guest() as guest:
        identity = guest.names()[0]
    destination.emulator.swtpm.end()
    destination.restart()  # its machine is off, its emulator waits for it
    leaving, arriving = source.carrier(), destination.carrier()
    with pytest.raises(VtpmFailed, match="there is a vTPM's state already at"):
        arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    arriving.wipe(UUID)
    destination.restart()
    destination.emulator.swtpm.start()
    with destination.emulator.guest() as guest:
        guest.startup()
        assert guest.names()[0] == identity


def test_one_that_was_made_in_its_place_is_not_released_for_it(pair: Pair) -> None:
    """Its emulator was started anew by somebody between the vote and the start: the copy stays until that is mended."""
    source, destination = pair
    before = look(source)
    leaving, arriving = source.carrier(), destination.carrier()
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    destination.emulator.swtpm.end()
    destination.restart()
    lived_in(destination.emulator)
    with pytest.raises(VtpmFailed, match="there is another vTPM at"):
        arriving.release(UUID)
    assert destination.ledger.holding is Holding.ARRIVING
    destination.emulator.swtpm.end()
    for path in destination.emulator.state.iterdir():
        path.unlink()
    destination.restart()
    arriving.release(UUID)
    assert look(destination) == before


def test_a_parcel_is_for_one_session_machine_and_key(pair: Pair) -> None:
    source, destination = pair
    leaving, arriving = source.carrier(), destination.carrier()
    wrapped = leaving.depart(UUID, arriving.recipient())
    other = destination.carrier("03" * 16)
    other.recipient()
    with pytest.raises(WrapBroken):  # another key
        other.arrive(UUID, wrapped)
    other._recipient = arriving._recipient
    with pytest.raises(WrapBroken):  # another session
        other.arrive(UUID, wrapped)
    with pytest.raises(WrapBroken):  # another machine
        arriving.arrive(UUID.replace("0f9c", "1111"), wrapped)
    with pytest.raises(WrapBroken):  # another epoch
        arriving.arrive(UUID, (2).to_bytes(8, "big") + wrapped[8:])
    assert leaving.depart(UUID, arriving.recipient()) == wrapped  # asked again on another connection
    with pytest.raises(VtpmRefused, match="another key than before"):
        leaving.depart(UUID, destination.carrier().recipient())
    assert destination.ledger.holding is Holding.UNKNOWN


def test_a_proof_is_of_that_vtpm_and_fresh(pair: Pair) -> None:
    source, destination = pair
    leaving, arriving = source.carrier(), destination.carrier()
    good = arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    leaving.check(UUID, good)
    proof = msgspec.msgpack.decode(good, type=Proof)
    changed = bytearray(proof.pcrs)
    changed[16 * 32] ^= 1
    one = proof.quotes[:1]
    for bad, what in (
        (msgspec.structs.replace(proof, pcrs=bytes(changed)), "not good"),
        (msgspec.structs.replace(proof, quotes=one), "another vTPM"),
        (msgspec.structs.replace(proof, quotes=(one[0], one[0])), "another vTPM"),
    ):
        with pytest.raises(VtpmRefused, match=what):
            leaving.check(UUID, msgspec.msgpack.encode(bad))
    # The same vTPM's proof in another session: good there, and nothing here.
    leaving.stay(UUID)
    arriving.wipe(UUID)
    destination.restart()
    second, again = source.carrier("04" * 16), destination.carrier("04" * 16)
    fresh = again.arrive(UUID, second.depart(UUID, again.recipient()))
    with pytest.raises(VtpmRefused, match="another session"):
        second.check(UUID, good)
    second.check(UUID, fresh)
    for rubbish in (b"", b"\xc1", bytes(20_000), good[:-1]):
        with pytest.raises(VtpmRefused):
            second.check(UUID, rubbish)


def test_a_destination_without_the_migration_key_says_so_before_anything_is_promised(
    pair: Pair, tmp_path: Path
) -> None:
    source, destination = pair
    wrong = tmp_path / "wrong.key"
    wrong.write_bytes(bytes(32))
    destination.key = wrong
    leaving, arriving = source.carrier(), destination.carrier()
    with pytest.raises(VtpmFailed, match="under another key"):
        arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    assert destination.ledger.holding is Holding.UNKNOWN
    leaving.stay(UUID)
    assert source.usable


# ---- killed at each step

SOURCE_STEPS = ("exported", "leaving", "part stop", "given write", "given erase")
DESTINATION_STEPS = ("rehearsed", "arriving", "kept", "loaded", "release start", "release write", "release forget")


class Killed(BaseException):
    """The relay is gone, in the middle of something."""


def kill_at(wanted: str) -> Beat:
    def beat(step: str) -> None:
        if step == wanted:
            raise Killed(step)

    return beat


@pytest.mark.parametrize("step", [*SOURCE_STEPS, *DESTINATION_STEPS])
def test_killed_at_each_step_leaves_exactly_one(pair: Pair, step: str) -> None:
    """Whoever is killed, the machine's hand-over ends by its journal: committed, the destination's, or the source's."""
    source, destination = pair
    before = look(source)
    leaving = source.carrier(beat=kill_at(step))
    arriving = destination.carrier(beat=kill_at(step))
    committed = []

    def course() -> None:
        leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
        leaving.part(UUID)
        committed.append(True)  # the machine's hand-over: in the source's journal
        arriving.release(UUID)
        leaving.given(UUID)

    with pytest.raises(Killed):
        course()
    assert not (source.usable and destination.usable)  # nobody recovers anything: still never two
    leaving, arriving = source.carrier(), destination.carrier()  # new processes, which know the disk alone
    for _ in range(2):  # and recovery itself may be cut short, and begun again
        if committed:
            arriving.release(UUID)
            leaving.given(UUID)
        else:
            arriving.wipe(UUID)
            leaving.stay(UUID)
    keeper, other = (destination, source) if committed else (source, destination)
    assert (keeper.usable, other.usable) == (True, False)
    assert look(keeper) == before
    assert other.traces() == []
    assert "tpm2-00.volatilestate" not in keeper.traces()


@pytest.mark.parametrize("step", ["", "release start"])
def test_the_copy_goes_when_the_emulators_is_on_the_disk(
    pair: Pair, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the relay is killed once the emulator runs, and another one removes the copy."""
    source, destination = pair
    flushed: list[bool] = []

    def seen(*paths: Path) -> None:
        flush(*paths)
        kept = destination.agent().ledgers.kept(UUID)
        flushed.append(kept.exists() and any(path.name == "tpm2-00.permall" and path.exists() for path in paths))

    monkeypatch.setattr("korora.agents.vtpm.carrier.flush", seen)
    leaving, arriving = source.carrier(), destination.carrier(beat=kill_at(step))
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    if step:
        with pytest.raises(Killed):
            arriving.release(UUID)
        flushed.clear()
        arriving = destination.carrier()
    arriving.release(UUID)
    assert flushed == [True]
    assert destination.traces() == ["tpm2-00.permall"]


@pytest.mark.parametrize("step", ["stay resume", "stay write", "wipe erase", "wipe forget", "wipe write"])
def test_killed_while_it_turns_back(pair: Pair, step: str) -> None:
    source, destination = pair
    before = look(source)
    leaving = source.carrier(beat=kill_at(step))
    arriving = destination.carrier(beat=kill_at(step))
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)

    def course() -> None:
        arriving.wipe(UUID)
        leaving.stay(UUID)

    with pytest.raises(Killed):
        course()
    assert not (source.usable and destination.usable)
    destination.carrier().wipe(UUID)
    source.carrier().stay(UUID)
    assert (source.usable, destination.usable) == (True, False)
    assert look(source) == before
    assert destination.traces() == []


def test_the_steps_are_all_of_them(pair: Pair) -> None:
    source, destination = pair
    seen: list[str] = []
    leaving, arriving = source.carrier(beat=seen.append), destination.carrier(beat=seen.append)
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    arriving.release(UUID)
    leaving.given(UUID)
    assert set(seen) == {*SOURCE_STEPS, *DESTINATION_STEPS}


def test_the_destinations_emulator_may_restart_in_between(pair: Pair) -> None:
    source, destination = pair
    before = look(source)
    leaving, arriving = source.carrier(), destination.carrier()
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    destination.emulator.close()
    destination.restart()
    destination.carrier().release(UUID)
    assert look(destination) == before


def test_a_lost_volatile_state_is_told_and_not_passed_over(pair: Pair) -> None:
    source, destination = pair
    leaving, arriving = source.carrier(), destination.carrier()
    leaving.depart(UUID, arriving.recipient())
    leaving.part(UUID)
    (source.emulator.state / "tpm2-00.volatilestate").unlink()
    with pytest.raises(VtpmFailed, match="would come up as after a reset"):
        leaving.stay(UUID)
    assert not source.usable


def test_a_machine_that_was_lost_before_it_ran_takes_its_vtpm_along(pair: Pair) -> None:
    """It was released, its machine could not be started, an operator runs the source's: the other must not stay."""
    source, destination = pair
    before = look(source)
    leaving, arriving = source.carrier(), destination.carrier()
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    arriving.release(UUID)
    arriving.wipe(UUID)
    leaving.stay(UUID)
    assert (source.usable, destination.usable) == (True, False)
    assert destination.traces() == []
    assert look(source) == before


def test_an_older_session_has_no_say_any_more(pair: Pair) -> None:
    source, destination = pair
    leaving, arriving = source.carrier(), destination.carrier()
    arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    leaving.part(UUID)
    arriving.release(UUID)
    leaving.given(UUID)
    source.restart()
    back, home = destination.carrier("05" * 16), source.carrier("05" * 16)
    home.arrive(UUID, back.depart(UUID, home.recipient()))
    back.part(UUID)
    home.release(UUID)
    back.given(UUID)
    leaving.given(UUID)  # of the first one, late
    assert source.usable
    assert source.emulator.files()

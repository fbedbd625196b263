"""A vTPM that a QEMU's stream has carried shows at the other end that it is the same, with a real swtpm; or is not."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from crypto.errors import WrapBroken
from korora.agents.vtpm import parcel
from korora.agents.vtpm.carried import Verifier
from korora.agents.vtpm.follower import Beat, prove
from korora.agents.vtpm.handover import Holding
from korora.agents.vtpm.parcel import Passage, Proof, Voucher
from korora.agents.vtpm.rehearsal import Keys
from proxy.errors import VtpmFailed, VtpmRefused
from proxy.streams.vtpm import CarriedPart, CarriedVtpm
from tests.korora.agents.vtpm.carrying import NONE, CarryingHost, stream_of
from tests.korora.agents.vtpm.emulators import Emulator, emulators, key, keys, known_by, lived_in
from tests.korora.agents.vtpm.hosts import SESSION, UUID

__all__ = ["key"]

Pair = tuple[CarryingHost, CarryingHost]


@pytest.fixture
def pair(tmp_path: Path, key: Path) -> Pair:
    return CarryingHost("alpha", tmp_path / "a", key), CarryingHost("beta", tmp_path / "b", key)


@pytest.fixture
def source(tmp_path: Path, key: Path) -> Iterator[Emulator]:
    """The source's emulator, lived in."""
    with emulators() as held:
        held.append(Emulator(tmp_path / "emulator", key))
        lived_in(held[0])
        yield held[0]


@pytest.fixture
def carried(source: Emulator) -> CarriedVtpm:
    """What the stream has of that."""
    return stream_of(source)


def met(pair: Pair, carried: CarriedVtpm, session: str = SESSION) -> tuple[Verifier, Verifier]:
    """Both sides of a session in which both have seen that."""
    both = pair[0].verifier(session), pair[1].verifier(session)
    for one in both:
        one.saw(carried)
    return both


def verified(pair: Pair, carried: CarriedVtpm, session: str = SESSION) -> tuple[Verifier, Verifier]:
    """The same, and it is."""
    leaving, arriving = met(pair, carried, session)
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    return leaving, arriving


def test_it_is_the_same_at_both_ends(pair: Pair, source: Emulator, carried: CarriedVtpm) -> None:
    before = known_by(source, source.sealed)
    leaving, arriving = verified(pair, carried)
    assert [host.ledger.holding for host in pair] == [Holding.LEAVING, Holding.ARRIVING]
    leaving.part(UUID)
    arriving.release(UUID)
    leaving.given(UUID)
    assert [host.ledger.holding for host in pair] == [Holding.GONE, Holding.HERE]
    assert pair[0].ledger.epoch == pair[1].ledger.epoch == 1
    assert pair[0].ledger.identity == pair[1].ledger.identity != ""
    assert pair[0].ledger.entries[-1].digest == pair[1].ledger.entries[-1].digest
    assert leaving.moving == arriving.moving == (1, pair[1].ledger.entries[-1].digest)
    assert known_by(source, source.sealed) == before  # its own emulator was asked nothing: it is its QEMU's
    for _ in range(2):  # all of the end may be asked for again
        arriving.release(UUID)
        leaving.given(UUID)


def test_it_comes_back(pair: Pair, carried: CarriedVtpm) -> None:
    here, there = pair
    for number in range(3):
        leaving, arriving = verified((here, there), carried, f"{number:032x}")
        arriving.release(UUID)
        leaving.given(UUID)
        assert there.ledger.epoch == number + 1
        here, there = there, here


def test_it_stays_when_the_machine_does(pair: Pair, carried: CarriedVtpm) -> None:
    leaving, arriving = verified(pair, carried)
    arriving.wipe(UUID)
    leaving.stay(UUID)
    assert [host.ledger.holding for host in pair] == [Holding.HERE, Holding.WIPED]
    verified(pair, carried, "cd" * 16)
    assert pair[1].ledger.epoch == 2


def test_one_that_nobody_encrypts(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Within the channel it is; a relay without a key can bring it up, and so can one that has a key for others."""
    with emulators() as held:
        held.append(Emulator(tmp_path / "clear", None))
        lived_in(held[0])
        carried = stream_of(held[0])
    pair[0].key = None
    verified(pair, carried)
    assert capsys.readouterr().out.count("in clear within its machine's stream") == 1


# ---- attacks, and what cannot be told


def forged(state: CarriedVtpm, key: Path, leaving: Verifier) -> bytes:
    """What a destination would say that has another state, and knows all that the source has given."""
    verifier = CarryingHost("rogue", key.parent / "rogue", key).verifier()
    verifier.saw(state)
    proof = prove(verifier._state, keys(key), leaving._expected, sealed=False)
    return msgspec.msgpack.encode(proof)


def test_another_vtpm_is_refused(pair: Pair, carried: CarriedVtpm, tmp_path: Path, key: Path) -> None:
    with emulators() as held:
        held.append(Emulator(tmp_path / "other", key))
        lived_in(held[0])
        other = stream_of(held[0])
    leaving, arriving = met(pair, carried)
    given = leaving.depart(UUID, arriving.recipient())
    arriving.saw(other)
    with pytest.raises(VtpmRefused, match="what has arrived of the vTPM is not what has left"):
        arriving.arrive(UUID, given)
    assert pair[1].ledger.holding is Holding.UNKNOWN
    with pytest.raises(VtpmRefused, match="another vTPM, or another run of it"):
        leaving.check(UUID, forged(other, key, leaving))


def test_a_source_that_calls_it_by_another_name_is_refused(pair: Pair, carried: CarriedVtpm) -> None:
    """Else the destination's ledger would know the machine by an identity that nobody has shown."""
    _, arriving = met(pair, carried)
    voucher = Voucher(1, bytes(32), "000b" + "cd" * 32, parcel.digest_of(arriving._state))
    given = Passage(SESSION, UUID, 1).wrap(voucher, arriving.recipient())
    with pytest.raises(VtpmRefused, match="another vTPM than the one that left"):
        arriving.arrive(UUID, given)
    assert pair[1].ledger.holding is Holding.UNKNOWN


def test_the_same_with_another_measurement_is_refused(
    pair: Pair, source: Emulator, carried: CarriedVtpm, key: Path
) -> None:
    leaving, arriving = met(pair, carried)
    leaving.depart(UUID, arriving.recipient())
    with source.guest() as guest:
        guest.extend(16, b"\x33" * 32)
    with pytest.raises(VtpmRefused, match="PCR 16 of the vTPM is not what it was"):
        leaving.check(UUID, forged(stream_of(source), key, leaving))


def test_a_proof_of_before_is_refused(pair: Pair, carried: CarriedVtpm) -> None:
    leaving, arriving = met(pair, carried)
    old = arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient()))
    leaving.check(UUID, old)
    leaving.stay(UUID)
    arriving.wipe(UUID)
    second, again = met(pair, carried, "04" * 16)
    fresh = again.arrive(UUID, second.depart(UUID, again.recipient()))
    with pytest.raises(VtpmRefused, match="another session"):
        second.check(UUID, old)
    second.check(UUID, fresh)
    for rubbish in (b"", b"\xc1", fresh[:-1], msgspec.msgpack.encode(Proof((), bytes(768)))):
        with pytest.raises(VtpmRefused):
            second.check(UUID, rubbish)


def test_a_proof_that_nobody_asked_for(pair: Pair, carried: CarriedVtpm) -> None:
    leaving, _ = met(pair, carried)
    with pytest.raises(VtpmRefused, match="was not given"):
        leaving.check(UUID, b"")


def test_a_voucher_is_for_one_session_machine_epoch_and_key(pair: Pair, carried: CarriedVtpm) -> None:
    leaving, arriving = met(pair, carried)
    given = leaving.depart(UUID, arriving.recipient())
    other = pair[1].verifier("03" * 16)
    other.saw(carried)
    other.recipient()
    with pytest.raises(WrapBroken):  # another key
        other.arrive(UUID, given)
    other._recipient = arriving._recipient
    with pytest.raises(WrapBroken):  # another session
        other.arrive(UUID, given)
    with pytest.raises(WrapBroken):  # another machine
        arriving.arrive(UUID.replace("0f9c", "1111"), given)
    with pytest.raises(WrapBroken):  # another epoch
        arriving.arrive(UUID, (2).to_bytes(8, "big") + given[8:])
    assert arriving._recipient is not None
    with pytest.raises(WrapBroken):  # and it is no vTPM that could be moved
        parcel.unwrap(SESSION, UUID, given, arriving._recipient)
    assert leaving.depart(UUID, arriving.recipient()) == given  # asked again on another connection
    with pytest.raises(VtpmRefused, match="another key than before"):
        leaving.depart(UUID, pair[1].verifier().recipient())
    unasked = pair[1].verifier()
    unasked.saw(carried)
    with pytest.raises(VtpmRefused, match="not asked for"):
        unasked.arrive(UUID, given)


def test_a_machine_whose_vtpm_was_made_anew_is_told_until_an_operator_says_so(
    pair: Pair, carried: CarriedVtpm, tmp_path: Path, key: Path
) -> None:
    leaving, arriving = verified(pair, carried)
    leaving.stay(UUID)
    arriving.wipe(UUID)
    with emulators() as held:
        held.append(Emulator(tmp_path / "other", key))
        lived_in(held[0])
        other = stream_of(held[0])
    second, again = met(pair, other, "05" * 16)
    with pytest.raises(VtpmRefused, match=r"another vTPM than the one known here: .*korora vtpm forget"):
        second.depart(UUID, again.recipient())
    for host in pair:
        kept = host.agent.ledgers.forget(UUID)
        assert kept is not None
        assert kept.exists()
    verified(pair, other, "06" * 16)


def test_one_that_has_gone_and_one_that_is_here_are_told(pair: Pair, carried: CarriedVtpm) -> None:
    """A machine that was started from an older copy at its old host, or arrives where it is already."""
    leaving, arriving = verified(pair, carried)
    arriving.release(UUID)
    leaving.given(UUID)
    copy, again = met(pair, carried, "07" * 16)
    with pytest.raises(VtpmRefused, match=r"not here to be given: it is gone \(epoch 1, with beta\); .*vtpm forget"):
        copy.depart(UUID, again.recipient())
    pair[0].agent.ledgers.forget(UUID)
    with pytest.raises(VtpmRefused, match=r"epoch 1 of the vTPM was seen here already .*vtpm forget"):
        again.arrive(UUID, copy.depart(UUID, again.recipient()))


def test_a_ledger_in_a_handover_is_not_forgotten(pair: Pair, carried: CarriedVtpm) -> None:
    verified(pair, carried)
    for host in pair:
        with pytest.raises(VtpmRefused, match=r"see korora handover list; .* --certain"):
            host.agent.ledgers.forget(UUID)
        assert host.agent.ledgers.forget(UUID, certain=True) is not None
        assert host.ledger.holding is Holding.UNKNOWN
    assert pair[0].agent.ledgers.forget(UUID.replace("0f9c", "1111")) is None


def test_without_the_migration_key_it_cannot_be_told(pair: Pair, carried: CarriedVtpm, tmp_path: Path) -> None:
    leaving, arriving = met(pair, carried)
    given = leaving.depart(UUID, arriving.recipient())
    pair[1].key = None
    with pytest.raises(VtpmFailed, match="a migration key that this host's relay does not have") as told:
        pair[1].verifier().saw(carried)
    assert told.value.remedy == "name it as migration_key in vtpm.toml"
    arriving._keys = Keys(f"file={tmp_path / 'wrong'},mode=aes-256-cbc,format=binary")
    (tmp_path / "wrong").write_bytes(bytes(32))
    with pytest.raises(VtpmFailed, match="under another key"):
        arriving.arrive(UUID, given)
    assert pair[1].ledger.holding is Holding.UNKNOWN


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda one: CarriedVtpm(one.permanent, one.volatile, CarriedPart(0, b"x")), "TPM 1.2"),
        (lambda one: CarriedVtpm(one.permanent, NONE, NONE), "the volatile state of the vTPM is no blob"),
        (lambda one: CarriedVtpm(CarriedPart(2, b"x" * 99), one.volatile, NONE), "the permanent state .* is no blob"),
        (lambda one: CarriedVtpm(NONE, NONE, NONE), "no blob"),
    ],
)
def test_what_is_no_state_of_a_tpm_2(pair: Pair, carried: CarriedVtpm, change: object, what: str) -> None:
    with pytest.raises(VtpmFailed, match=what):
        pair[0].verifier().saw(change(carried))  # type: ignore[operator]


def test_a_machine_without_a_uuid_has_no_ledger(pair: Pair, carried: CarriedVtpm) -> None:
    leaving, arriving = met(pair, carried)
    with pytest.raises(VtpmFailed, match="has no UUID"):
        leaving.depart("", arriving.recipient())
    with pytest.raises(VtpmFailed, match="nobody knows"):
        pair[0].verifier().depart(UUID, arriving.recipient())
    for end in (leaving.part, leaving.stay, leaving.given, arriving.release, arriving.wipe):
        end("")


# ---- killed at each step


class Killed(BaseException):
    """The relay is gone, in the middle of something."""


def kill_at(wanted: str) -> Beat:
    def beat(step: str) -> None:
        if step == wanted:
            raise Killed(step)

    return beat


@pytest.mark.parametrize("step", ["leaving", "rehearsed", "arriving", "release write", "given write"])
def test_killed_at_each_step_the_ledgers_follow_the_machine(pair: Pair, carried: CarriedVtpm, step: str) -> None:
    leaving, arriving = pair[0].verifier(beat=kill_at(step)), pair[1].verifier(beat=kill_at(step))
    committed = False
    with pytest.raises(Killed):  # noqa: PT012 - whichever of them it is
        for one in (leaving, arriving):
            one.saw(carried)
        leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
        leaving.part(UUID)
        committed = True
        arriving.release(UUID)
        leaving.given(UUID)
    leaving, arriving = pair[0].verifier(), pair[1].verifier()  # new processes, which have seen no stream
    for _ in range(2):
        if committed:
            arriving.release(UUID)
            leaving.given(UUID)
        else:
            arriving.wipe(UUID)
            leaving.stay(UUID)
    expected = (Holding.GONE, Holding.HERE) if committed else (Holding.HERE, Holding.WIPED)
    before = Holding.UNKNOWN  # killed before it was written down that anything had arrived
    assert pair[0].ledger.holding is expected[0]
    assert pair[1].ledger.holding in ((expected[1],) if committed else (expected[1], before))

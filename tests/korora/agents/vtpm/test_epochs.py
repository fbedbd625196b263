"""The ledger: an epoch names one holder, however a history goes; and its file, whatever a crash leaves of it."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from korora.agents.vtpm import epochs
from korora.agents.vtpm.epochs import Entry, Ledger
from korora.agents.vtpm.handover import TABLE, Action, Event, Holding
from korora.agents.vtpm.ledger import Ledgers, flush
from proxy.errors import VtpmFailed, VtpmRefused

AT = "2026-11-26T08:00:00.000+00:00"
UUID = "0f9c2f1e-0000-4000-8000-00000000abcd"
IDENTITY = "000b" + "11" * 32
LINES = [
    Entry("leaving", 1, AT, "ab" * 16, "beta", IDENTITY, "22" * 32),
    Entry("gone", 1, AT, "ab" * 16, "beta", IDENTITY, "22" * 32),
]


def test_what_is_usable_is_written_before_or_after_as_it_must_be() -> None:
    """Given away, it is written down before it is erased; received, before it is kept, and here once it answers."""
    for (_, event), step in TABLE.items():
        order = step.actions
        if Action.ERASE in order and event is Event.GIVEN and Action.WRITE in order:
            assert order.index(Action.WRITE) < order.index(Action.ERASE)
        if Action.LOAD in order:
            assert order.index(Action.WRITE) < order.index(Action.KEEP) < order.index(Action.LOAD)
        if Action.START in order:
            assert order.index(Action.START) < order.index(Action.WRITE) < order.index(Action.FORGET)
        if event is Event.WIPE and Action.ERASE in order:
            assert order.index(Action.ERASE) < order.index(Action.FORGET) < order.index(Action.WRITE)


def test_nothing_that_answers_comes_of_what_is_gone() -> None:
    for (holding, _), step in TABLE.items():
        if holding in (Holding.GONE, Holding.WIPED, Holding.UNKNOWN):
            assert step.holding is not Holding.HERE
            assert not {Action.START, Action.RESUME} & set(step.actions)


def test_a_source_that_makes_epochs_up_spoils_no_ledger(tmp_path: Path) -> None:
    """The last one that there is: it cannot leave under another, and an operator may forget it."""
    ledgers = Ledgers(tmp_path)
    with ledgers.locked(UUID) as file:
        file.write(file.ledger.arrive(2**63 - 1, "ab" * 16, "mallory", identity=IDENTITY, digest="", at=AT))
        entry, _ = file.ledger.follow(Event.RELEASE, AT)
        assert entry is not None
        file.write(entry)
        with pytest.raises(VtpmRefused, match="korora vtpm forget"):
            file.write(file.ledger.depart("cd" * 16, "gamma", identity=IDENTITY, digest="", at=AT))
    assert ledgers.read(UUID).holding is Holding.HERE
    assert ledgers.forget(UUID) is not None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans()), max_size=30))
def test_an_epoch_has_one_holder(moves: list[tuple[int, int, bool, bool]]) -> None:
    """Three hosts hand one vTPM about, or not, and try what they must not."""
    hosts = [Ledger() for _ in range(3)]
    at_home = 0
    holders: dict[int, int] = {}
    for number, (source, destination, commits, replays) in enumerate(moves):
        session = f"{number:032x}"
        if source == destination:
            continue
        giver, taker = hosts[source], hosts[destination]
        if source != at_home and not (giver.holding is Holding.UNKNOWN and at_home is None):
            if giver.holding is not Holding.UNKNOWN:
                with pytest.raises(VtpmRefused):
                    giver.depart(session, "peer", identity=IDENTITY, digest="", at=AT)
            continue
        offer = giver.depart(session, "peer", identity=IDENTITY, digest=f"{number:064x}", at=AT)
        giver.entries.append(offer)
        taker.entries.append(taker.arrive(offer.epoch, session, "peer", identity=IDENTITY, digest=offer.digest, at=AT))
        ends = ((taker, Event.RELEASE), (giver, Event.GIVEN)) if commits else ((taker, Event.WIPE), (giver, Event.STAY))
        for ledger, event in ends:
            entry, _ = ledger.follow(event, AT)
            assert entry is not None
            ledger.entries.append(entry)
        holder = destination if commits else source
        assert offer.epoch not in holders
        holders[offer.epoch] = at_home = holder
        assert [host.holding for host in hosts].count(Holding.HERE) == 1
        if replays:
            for other in hosts:
                if other.epoch >= offer.epoch:
                    with pytest.raises(VtpmRefused):
                        other.arrive(offer.epoch, "f" * 32, "peer", identity=IDENTITY, digest=offer.digest, at=AT)


@given(st.binary(max_size=400))
def test_a_file_that_is_none(content: bytes) -> None:
    try:
        ledger, good = epochs.read(content)
    except VtpmFailed:
        return
    assert b"".join(epochs.line(entry) for entry in ledger.entries) == content[:good]


def test_a_torn_line_was_never_acted_upon() -> None:
    first, second = (epochs.line(entry) for entry in LINES)
    for cut in range(1, len(second)):
        ledger, good = epochs.read(first + second[:-cut])
        assert ledger.entries == LINES[:1]
        assert good == len(first)


def test_a_changed_line_is_damage() -> None:
    content = epochs.line(LINES[0]) + epochs.line(LINES[1])
    for at in (5, len(content) - 12):
        changed = bytearray(content)
        changed[at] ^= 1
        with pytest.raises(VtpmFailed, match="of a vTPM's ledger"):
            epochs.read(bytes(changed))


def test_it_is_on_the_disk_and_locked(tmp_path: Path) -> None:
    ledgers = Ledgers(tmp_path)
    with ledgers.locked(UUID) as file:
        for entry in LINES:
            file.write(entry)
        with pytest.raises(VtpmFailed, match="another process is at work"), ledgers.locked(UUID):
            pytest.fail("two at once")
        program = (
            "import sys; from pathlib import Path; from korora.agents.vtpm.ledger import Ledgers\n"
            f"with Ledgers(Path({str(tmp_path)!r})).locked({UUID!r}): pass"
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
        assert b"another process is at work" in ran.stderr
    assert ledgers.read(UUID).entries == LINES
    assert ledgers.names() == [UUID]
    assert os.stat(ledgers.folder).st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in ledgers.folder.iterdir())


def test_one_that_is_put_aside_meanwhile_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the lock: what is written then would be in nobody's ledger."""
    ledgers = Ledgers(tmp_path)
    with ledgers.locked(UUID) as file:
        file.write(LINES[0])
    real = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        assert Ledgers(tmp_path).forget(UUID, certain=True)
        real(descriptor, how)

    monkeypatch.setattr("korora.agents.vtpm.ledger.fcntl.flock", late)
    with pytest.raises(VtpmFailed, match="another process is at work"), ledgers.locked(UUID):
        pytest.fail("it is nobody's any more")
    assert ledgers.read(UUID) == Ledger()


def test_what_is_flushed_is_synced_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, absent = tmp_path / "there", tmp_path / "absent"
    there.write_bytes(b"state")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    flush(there, absent)
    assert synced == [there.stat().st_ino, tmp_path.stat().st_ino]


def test_a_full_ledger_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("korora.agents.vtpm.ledger.LEDGER_BYTES_MAX", 300)
    ledgers = Ledgers(tmp_path)
    with ledgers.locked(UUID) as file:
        file.write(LINES[0])
        with pytest.raises(VtpmFailed, match="is full"):
            file.write(LINES[1])
    assert ledgers.read(UUID).entries == LINES[:1]

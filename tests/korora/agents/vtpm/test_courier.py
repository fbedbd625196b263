"""A vTPM that moves in a file between two real swtpm: once, by whom it was asked of, whoever is killed and whenever."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from bench.tpms import SoftTpm, soft_tpm
from crypto.at_rest import HostKeys
from crypto.attestation import evidence as messages
from crypto.attestation.evidence import NoAttester
from crypto.attestation.reference import Reference, render
from crypto.attestation.structures import Clock, Public, Quote
from crypto.errors import (
    AttestationError,
    AttestationMissing,
    PlatformChanged,
    PlatformUnknown,
    QuoteInvalid,
    ReceiptError,
    SignatureInvalid,
    SignerUntrusted,
)
from crypto.identity import Identity
from crypto.pki import Authority
from korora.agents.vtpm import letters
from korora.agents.vtpm.carrier import Beat
from korora.agents.vtpm.courier import Courier
from korora.agents.vtpm.handover import Holding
from korora.agents.vtpm.ledger import flush
from korora.agents.vtpm.letters import Answer, Letter, Luggage, Request, Sent
from korora.agents.vtpm.parcel import Passage
from korora.agents.vtpm.tcti import Tpm
from korora.clocks import Clocks
from korora.platform import HostPlatform
from proxy.control import Bank, Wanted
from proxy.errors import VtpmFailed, VtpmRefused
from tests.korora.agents.vtpm.emulators import SECRET, Emulator, emulators, key, known_by, lived_in
from tests.korora.agents.vtpm.hosts import SESSION, UUID, Host

__all__ = ["key"]
NOW = datetime.now(UTC)
PCR_4 = Wanted((Bank("sha256", (4,)),))
FILES = ("asked", "left", "came")


def absent() -> None:
    """The machine is not here."""


@dataclass
class End:
    """A host, and who it is."""

    host: Host
    identity: Identity
    pins: frozenset[bytes] = frozenset()
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    platform: HostPlatform | None = None

    def courier(self, beat: Beat = lambda step: None) -> Courier:
        """A new one: a command is a process of its own."""
        keys = HostKeys(self.identity.spki_sha256)
        agent = self.host.agent(beat)
        return Courier(agent, self.identity, keys, self.pins, clock=lambda: self.now, platform=self.platform)

    @property
    def has_it(self) -> bool:
        """Whether a vTPM answers here, or would if its emulator were started."""
        swtpm = self.host.emulator.swtpm
        return (swtpm.listens and swtpm.running()) or self.host.emulator.files() != []

    def kept(self) -> list[str]:
        """What the couriers have left here of it."""
        return [what for what in FILES if self.host.agent().ledgers.file(UUID, what).exists()]


@dataclass
class Ends:
    """Where the vTPM is, and where it is to go; ``sealed`` is what its guest keeps on its disk."""

    here: End
    there: End
    sealed: tuple[bytes, bytes]

    def look(self, end: End) -> object:
        return known_by(end.host.emulator, self.sealed)

    def move(self) -> tuple[bytes, bytes, bytes]:
        """All of it: request, parcel, answer."""
        request = self.there.courier().ask(UUID, "alpha")
        parcel = self.here.courier().leave(UUID, request, "beta", absent)
        answer = self.there.courier().receive(parcel)
        assert self.here.courier().settle(answer) == UUID
        return request, parcel, answer


@pytest.fixture
def ends(tmp_path: Path, key: Path, identity_alpha: Path, identity_beta: Path) -> Iterator[Ends]:
    """alpha's has been lived in and runs, its machine saved to a disk; beta's waits."""
    with emulators() as held:
        here, there = (
            End(Host.make(name, tmp_path / name[0], key), Identity.load(identity, now=NOW))
            for name, identity in (("alpha", identity_alpha), ("beta", identity_beta))
        )
        lived_in(here.host.emulator)
        yield Ends(here, there, here.host.emulator.sealed)
        held += [here.host.emulator, there.host.emulator]


def switch_off(end: End) -> None:
    """Its machine is off, and so is its emulator, which was started anew."""
    end.host.emulator.swtpm.end()
    end.host.restart()


# ---- as it is meant


def test_a_saved_machines_goes_with_all_that_it_has(ends: Ends) -> None:
    before = ends.look(ends.here)
    ends.move()
    assert ends.look(ends.there) == before
    assert (ends.here.has_it, ends.there.has_it) == (False, True)
    assert (ends.here.host.ledger.holding, ends.there.host.ledger.holding) == (Holding.GONE, Holding.HERE)
    last, first = ends.here.host.ledger.entries[-1], ends.there.host.ledger.entries[-1]
    assert (last.epoch, last.digest, last.peer) == (first.epoch, first.digest, "beta")
    assert ends.here.kept() == ends.there.kept() == []
    assert not ends.here.host.emulator.swtpm.listens


@pytest.mark.parametrize("listens", [True, False])
def test_that_of_a_machine_that_is_off_begins_anew_there(ends: Ends, listens: bool) -> None:
    """What is stored goes: identity, NV and seals. PCRs begin at zero, as they would have at home."""
    emulator = ends.here.host.emulator
    with emulator.guest() as guest:
        identity = guest.names()[0]
    switch_off(ends.here)
    if not listens:
        ends.here.host.emulator.swtpm.end()
    ends.move()
    assert not ends.here.has_it
    there = ends.there.host
    assert there.emulator.files() == ["tpm2-00.permall"]  # and the next start of its emulator has it
    there.emulator.swtpm.end()
    there.restart()
    there.emulator.swtpm.start()
    with there.emulator.guest() as guest:
        guest.startup()
        assert guest.names()[0] == identity
        assert guest.read_nv(10) == b"kept in NV"
        assert guest.pcr(16) == bytes(32)
        guest.unseal(ends.sealed, 16, expected=0x99D)  # TPM_RC_POLICY_FAIL: not measured yet
        guest.extend(16, b"\x11" * 32)
        assert guest.unseal(ends.sealed, 16) == SECRET


def test_it_comes_back(ends: Ends) -> None:
    before = ends.look(ends.here)
    ends.move()
    ends.here.host.restart()
    request = ends.here.courier().ask(UUID, "beta")
    parcel = ends.there.courier().leave(UUID, request, "alpha", absent)
    ends.there.courier().settle(ends.here.courier().receive(parcel))
    assert ends.look(ends.here) == before
    assert ends.here.host.ledger.epoch == 2
    assert not ends.there.has_it


def test_it_is_withdrawn_and_stays(ends: Ends) -> None:
    before = ends.look(ends.here)
    request = ends.there.courier().ask(UUID, "alpha")
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    answer = ends.there.courier().withdraw(request)
    assert not ends.here.has_it
    ends.here.host.restart()
    for _ in range(2):
        ends.here.courier().settle(answer)
        assert ends.look(ends.here) == before
    assert ends.here.host.ledger.holding is Holding.HERE
    assert ends.here.kept() == ends.there.kept() == []
    with pytest.raises(VtpmRefused, match="the key for that parcel is not here"):
        ends.there.courier().receive(parcel)
    assert not ends.there.has_it
    ends.move()  # under another epoch
    assert ends.there.host.ledger.epoch == 2


def test_an_operator_keeps_it_where_the_other_host_is_lost(ends: Ends) -> None:
    before = ends.look(ends.here)
    with pytest.raises(VtpmRefused, match="no vTPM of that machine has left in a file"):
        ends.here.courier().keep_here(UUID)
    ends.here.courier().leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    with pytest.raises(VtpmRefused, match="korora vtpm settle first"):  # its copy would be nobody's
        ends.here.host.agent().ledgers.forget(UUID, certain=True)
    with pytest.raises(VtpmFailed, match="no swtpm listens"):
        ends.here.courier().keep_here(UUID)
    ends.here.host.restart()
    ends.here.courier().keep_here(UUID)
    assert ends.look(ends.here) == before
    assert ends.here.host.ledger.holding is Holding.HERE


@pytest.mark.parametrize("step", ["", "taken back"])
def test_the_copy_goes_when_the_emulators_is_on_the_disk(
    ends: Ends, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the command is killed once the emulator runs, and another one removes the copy."""
    flushed: list[list[str]] = []

    def seen(*paths: Path) -> None:
        flush(*paths)
        flushed.append(ends.here.kept())

    monkeypatch.setattr("korora.agents.vtpm.courier.flush", seen)
    ends.here.courier().leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    ends.here.host.restart()
    if step:
        with pytest.raises(Killed):
            ends.here.courier(kill_at(step)).keep_here(UUID)
        flushed.clear()
    ends.here.courier().keep_here(UUID)
    assert flushed == [["left"]]
    assert ends.here.kept() == []


def test_export_and_import_may_be_asked_again(ends: Ends) -> None:
    request = ends.there.courier().ask(UUID, "alpha")
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    assert ends.here.courier().leave(UUID, request, "beta", absent) == parcel
    answer = ends.there.courier().receive(parcel)
    with ends.there.host.emulator.guest() as guest:
        guest.extend(11, b"\x33" * 32)
        later = guest.pcr(11)
    assert ends.there.courier().receive(parcel) == answer
    with ends.there.host.emulator.guest() as guest:
        assert guest.pcr(11) == later  # nothing was put back
    for _ in range(2):
        ends.here.courier().settle(answer)
    with pytest.raises(VtpmRefused, match="that request is settled: the vTPM is gone"):
        ends.here.courier().leave(UUID, request, "beta", absent)


# ---- traps


def test_a_second_use_is_refused(ends: Ends) -> None:
    _, parcel, _ = ends.move()
    ends.here.host.restart()
    request = ends.here.courier().ask(UUID, "beta")
    back = ends.there.courier().leave(UUID, request, "alpha", absent)
    ends.there.courier().settle(ends.here.courier().receive(back))
    ends.there.host.restart()
    with pytest.raises(VtpmRefused, match="the key for that parcel is not here"):
        ends.there.courier().receive(parcel)
    assert not ends.there.has_it


@pytest.fixture
def opened(ends: Ends) -> Callable[[int], None]:
    """An insider at the source, who has kept what it gave, gives it again: under that epoch, by a request of now."""
    request = ends.there.courier().ask(UUID, "alpha")
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    left = msgspec.msgpack.decode(ends.here.host.agent().ledgers.file(UUID, "left").read_bytes())
    luggage = msgspec.convert(left["luggage"], Luggage)
    ends.here.courier().settle(ends.there.courier().receive(parcel))

    def again(epoch: int) -> None:
        asked = msgspec.convert(body(ends.there.courier().ask(UUID, "alpha")), Request)
        wrapped = letters.pack(luggage, Passage(asked.id, UUID, epoch), asked.recipient)
        sent = Sent(1, asked.id, UUID, "beta", epoch, wrapped)
        ends.there.courier().receive(signed(ends.here, sent))

    return again


def body(content: bytes) -> dict[str, object]:
    """What a letter says, whoever says it."""
    said: dict[str, object] = msgspec.msgpack.decode(msgspec.msgpack.decode(content, type=Letter).body)
    return said


def signed(end: End, what: Request | Sent | Answer) -> bytes:
    """A letter that a host says, whatever it is."""
    return end.courier()._say(what)


def test_no_epoch_is_taken_twice(ends: Ends, opened: Callable[[int], None]) -> None:
    with pytest.raises(VtpmRefused, match="the vTPM is here"):  # it does not even ask for another
        opened(2)
    ends.here.host.restart()
    request = ends.here.courier().ask(UUID, "beta")
    ends.there.courier().settle(ends.here.courier().receive(ends.there.courier().leave(UUID, request, "alpha", absent)))
    ends.there.host.restart()
    for epoch, what in ((1, "seen here already"), (2, "seen here already"), (0, "older than epoch 2")):
        with pytest.raises(VtpmRefused, match=what):
            opened(epoch)
    with pytest.raises(VtpmRefused, match="not good"):  # its quotes are of the epoch that it had
        opened(3)
    assert not ends.there.has_it
    assert ends.there.host.ledger.holding is Holding.GONE


def test_a_destination_that_has_seen_more_than_the_source_gets_nothing(ends: Ends) -> None:
    asked = msgspec.convert(body(ends.there.courier().ask(UUID, "alpha")), Request)
    ahead = signed(ends.there, msgspec.structs.replace(asked, epoch=7))
    with pytest.raises(VtpmRefused, match="beta has seen epoch 7 of the vTPM, and this host knows of 0"):
        ends.here.courier().leave(UUID, ahead, "beta", absent)
    assert ends.here.host.usable


def changed(content: bytes) -> Iterator[bytes]:
    """One byte is another: at the beginning and the end each one, and some in between."""
    places = {*range(min(400, len(content))), *range(0, len(content), 251), *range(len(content) - 120, len(content))}
    for at in sorted(places):
        yield content[:at] + bytes([content[at] ^ 0x01]) + content[at + 1 :]


def test_no_byte_of_any_letter_can_be_another(ends: Ends) -> None:
    request = ends.there.courier().ask(UUID, "alpha")
    for other in changed(request):
        with pytest.raises((VtpmRefused, ReceiptError)):
            ends.here.courier().leave(UUID, other, "beta", absent)
    assert ends.here.host.usable
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    for other in changed(parcel):
        with pytest.raises((VtpmRefused, ReceiptError)):
            ends.there.courier().receive(other)
    assert not ends.there.has_it
    answer = ends.there.courier().receive(parcel)
    for other in changed(answer):
        with pytest.raises((VtpmRefused, ReceiptError)):
            ends.here.courier().settle(other)
    assert ends.here.kept() == ["left"]
    for rubbish in (b"", b"\xc1", request, parcel, bytes(2 * letters.LETTER_BYTES_MAX)):
        with pytest.raises(VtpmRefused):
            ends.here.courier().settle(rubbish)


@pytest.fixture
def gamma(ca_dir: Path, tmp_path: Path) -> Identity:
    """A third host of the same CA."""
    return Identity.load(Authority.open(ca_dir).issue("gamma", out=tmp_path / "gamma", now=NOW).directory, now=NOW)


def test_whose_letters_count(ends: Ends, gamma: Identity, tmp_path: Path) -> None:
    """The right host's alone, under this CA, and with the pinned key where one is pinned."""
    Authority.create(tmp_path / "ca", now=NOW)
    stranger = Identity.load(Authority.open(tmp_path / "ca").issue("beta", now=NOW).directory, now=NOW)
    request = ends.there.courier().ask(UUID, "alpha")
    asked = msgspec.convert(body(request), Request)
    for who in (gamma, stranger):
        with pytest.raises(SignerUntrusted):
            ends.here.courier().leave(UUID, signed(End(ends.there.host, who), asked), "beta", absent)
    ends.here.pins = frozenset({bytes(32)})
    with pytest.raises(SignerUntrusted, match="not a pinned one"):
        ends.here.courier().leave(UUID, request, "beta", absent)
    ends.here.pins = frozenset()
    misled = signed(ends.there, msgspec.structs.replace(asked, to="gamma"))
    with pytest.raises(VtpmRefused, match="it is for gamma, and this host is alpha"):
        ends.here.courier().leave(UUID, misled, "beta", absent)
    other = signed(ends.there, msgspec.structs.replace(asked, uuid=UUID.replace("0f9c2f1e", "11111111")))
    with pytest.raises(VtpmRefused, match="the request is for the vTPM of 1111"):
        ends.here.courier().leave(UUID, other, "beta", absent)
    assert ends.here.host.usable
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    sent = msgspec.convert(body(parcel), Sent)
    with pytest.raises(VtpmRefused, match="a parcel of gamma, and it was asked of alpha"):
        ends.there.courier().receive(signed(End(ends.here.host, gamma), sent))
    with pytest.raises(VtpmRefused, match="it is for beta, and this host is gamma"):
        End(ends.there.host, gamma).courier().receive(parcel)
    answer = ends.there.courier().receive(parcel)
    told = msgspec.convert(body(answer), Answer)
    with pytest.raises(VtpmRefused, match="the answer of gamma is not about"):
        ends.here.courier().settle(signed(End(ends.there.host, gamma), told))
    for wrong in ({"epoch": 2}, {"digest": "00" * 32}, {"proof": b""}, {"id": SESSION}):
        with pytest.raises(VtpmRefused):
            ends.here.courier().settle(signed(ends.there, msgspec.structs.replace(told, **wrong)))
    assert ends.here.kept() == ["left"]


def test_anothers_parcel_with_anothers_key(ends: Ends, tmp_path: Path, key: Path, gamma: Identity) -> None:
    """A host that has all files of the exchange, and not the key that is on the destination's disk."""
    parcel = ends.here.courier().leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    with emulators() as held:
        thief = End(Host.make("beta", tmp_path / "x", key), ends.there.identity)
        held.append(thief.host.emulator)
        thief.courier().ask(UUID, "alpha")
        with pytest.raises(VtpmRefused, match="the key for that parcel is not here"):
            thief.courier().receive(parcel)
        own = ends.there.host.agent().ledgers.file(UUID, "asked")
        thief.host.agent().ledgers.file(UUID, "asked").write_bytes(own.read_bytes())
        stolen = Courier(thief.host.agent(), thief.identity, HostKeys(bytes(32)))
        with pytest.raises(VtpmFailed, match="is not this host's"):  # not without the host key, either
            stolen.receive(parcel)
        assert not thief.has_it
    assert own.stat().st_mode & 0o777 == 0o600


def test_a_request_runs_out(ends: Ends) -> None:
    request = ends.there.courier().ask(UUID, "alpha", hours=2)
    ends.here.now += timedelta(hours=3)
    with pytest.raises(VtpmRefused, match="run out"):
        ends.here.courier().leave(UUID, request, "beta", absent)
    ends.here.now -= timedelta(hours=3)
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    ends.there.now += timedelta(hours=3)
    with pytest.raises(VtpmRefused, match="run out: korora vtpm withdraw"):
        ends.there.courier().receive(parcel)
    ends.here.host.restart()
    ends.here.courier().settle(ends.there.courier().withdraw(request))
    assert ends.here.host.usable


@pytest.fixture
def attested(ends: Ends, tmp_path: Path) -> Iterator[SoftTpm]:
    """beta has a TPM, and alpha demands what that is now."""
    with soft_tpm(tmp_path / "tpm") as swtpm:
        tpm, known = Tpm(swtpm.tcti), tmp_path / "known"
        known.mkdir()
        tpm.keep()
        reference = Reference("beta", tpm.show().ak, "00", pcrs={"sha256": {4: frozenset({bytes(32)})}})
        (known / "beta.toml").write_text(render(reference))
        ends.there.platform = HostPlatform(tpm, None)
        ends.here.platform = HostPlatform(NoAttester(), known, state=tmp_path)
        yield swtpm


def test_a_host_that_is_what_it_may_be_gets_it(ends: Ends, attested: SoftTpm) -> None:
    request = ends.there.courier().ask(UUID, "alpha", wanted=PCR_4)
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    assert ends.here.courier().leave(UUID, request, "beta", absent) == parcel
    ends.here.courier().settle(ends.there.courier().receive(parcel))
    assert ends.there.host.usable


def test_one_that_is_not_gets_nothing(ends: Ends, attested: SoftTpm, tmp_path: Path) -> None:
    """Nothing shown; shown for another request, key or time; another boot loader; a TPM of before its last start."""

    def refused(request: bytes, kind: type[AttestationError]) -> None:
        with pytest.raises(kind):
            ends.here.courier().leave(UUID, request, "beta", absent)
        assert ends.here.host.usable
        assert ends.here.host.ledger.holding is Holding.UNKNOWN

    refused(ends.there.courier().ask(UUID, "alpha"), AttestationMissing)
    good = msgspec.convert(body(ends.there.courier().ask(UUID, "alpha", wanted=PCR_4)), Request)
    other = msgspec.convert(body(ends.there.courier().ask(UUID, "alpha", wanted=PCR_4)), Request)
    for changes in (
        {"evidence": other.evidence},
        {"recipient": other.recipient},
        {"id": other.id},
        {"until": good.until + 1},
    ):
        refused(signed(ends.there, msgspec.structs.replace(good, **changes)), QuoteInvalid)
    Tpm(attested.tcti).extend(4, b"another boot loader".ljust(32))
    refused(ends.there.courier().ask(UUID, "alpha", wanted=PCR_4), PlatformChanged)
    with soft_tpm(tmp_path / "another") as unrelated:
        ends.there.platform = HostPlatform(Tpm(unrelated.tcti), None)
        refused(ends.there.courier().ask(UUID, "alpha", wanted=PCR_4), PlatformUnknown)
    shown = messages.decode(good.evidence)
    later = Clock(1, Quote.parse(shown.quote).clock.resets + 1, 0, safe=True)  # it was started again since
    Clocks(tmp_path).saw("beta", Public.parse(shown.ak_public).name.hex(), later)
    refused(signed(ends.there, good), QuoteInvalid)


def test_a_request_is_not_for_ever(ends: Ends) -> None:
    asked = msgspec.convert(body(ends.there.courier().ask(UUID, "alpha")), Request)
    month = signed(ends.there, msgspec.structs.replace(asked, until=asked.until + 30 * 86_400))
    with pytest.raises(VtpmRefused, match="for too long"):
        ends.here.courier().leave(UUID, month, "beta", absent)
    assert ends.here.host.usable


def test_a_machine_that_runs_keeps_its_own(ends: Ends) -> None:
    """Also one that is started while its vTPM is read."""
    request = ends.there.courier().ask(UUID, "alpha")
    looks = iter([True, False])

    def runs_then() -> None:
        if not next(looks):
            raise VtpmFailed("the machine is here")

    for look in (runs_then, runs_then):
        with pytest.raises((VtpmFailed, StopIteration)):
            ends.here.courier().leave(UUID, request, "beta", look)
    assert ends.here.host.usable
    assert ends.here.host.ledger.holding is Holding.UNKNOWN
    assert ends.here.kept() == []


def test_an_emulator_that_hides_keeps_what_it_has(ends: Ends) -> None:
    """Its control socket is gone, or its TPM was stopped: what it has in memory is newer than what is stored."""
    request = ends.there.courier().ask(UUID, "alpha")
    ends.here.host.emulator.swtpm.stop()
    with pytest.raises(VtpmFailed, match="a swtpm has the state at"):
        ends.here.courier().leave(UUID, request, "beta", absent)
    ends.here.host.emulator.control.unlink()
    with pytest.raises(VtpmFailed, match="a swtpm has the state at"):
        ends.here.courier().leave(UUID, request, "beta", absent)
    assert ends.here.host.ledger.holding is Holding.UNKNOWN


@pytest.mark.parametrize("off", [False, True])
def test_nothing_leaves_in_clear(ends: Ends, tmp_path: Path, key: Path, off: bool) -> None:
    """An emulator without a migration key gives nothing; and what it has stored is never given but encrypted."""
    host = ends.here.host
    host.emulator.swtpm.end()
    for path in host.emulator.state.iterdir():
        path.unlink()
    host.emulator.process.wait(5)
    host.emulator = Emulator(host.folder / UUID, None)
    lived_in(host.emulator)
    request = ends.there.courier().ask(UUID, "alpha")
    if not off:
        with pytest.raises(VtpmFailed, match="no migration key"):
            ends.here.courier().leave(UUID, request, "beta", absent)
        assert host.usable
        return
    host.emulator.swtpm.end()
    ends.here.courier().leave(UUID, request, "beta", absent)
    left = msgspec.msgpack.decode(host.agent().ledgers.file(UUID, "left").read_bytes())
    for blob in msgspec.convert(left["luggage"], Luggage).blobs:
        blob.require_sealed()


def test_a_destination_that_has_another_one_leaves_it_alone(ends: Ends) -> None:
    request = ends.there.courier().ask(UUID, "alpha")
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    lived_in(ends.there.host.emulator)
    before = known_by(ends.there.host.emulator, ends.there.host.emulator.sealed)
    with pytest.raises(VtpmFailed, match="is running, so it is somebody's"):
        ends.there.courier().receive(parcel)
    switch_off(ends.there)
    with pytest.raises(VtpmFailed, match="there is a vTPM's state already at"):
        ends.there.courier().receive(parcel)
    ends.there.host.emulator.swtpm.start()
    with ends.there.host.emulator.guest() as guest:
        guest.startup()
        assert guest.names()[0] == before[0][0]  # type: ignore[index]
    assert ends.there.host.ledger.holding is Holding.UNKNOWN
    assert ends.there.kept() == ["asked"]


def made_anew(end: End) -> None:
    """Its emulator was started without anything, and has made a TPM of its own."""
    end.host.restart()
    lived_in(end.host.emulator)


def moved_away(end: End) -> None:
    """The operator has done what is asked for."""
    end.host.emulator.swtpm.end()
    for path in end.host.emulator.state.iterdir():
        path.unlink()
    end.host.restart()


def test_what_was_made_in_its_place_is_not_taken_for_it(ends: Ends) -> None:
    """Somebody starts the machine after the export: with a TPM that is new. The copy is all there is of the old one."""
    before = ends.look(ends.here)
    request = ends.there.courier().ask(UUID, "alpha")
    ends.here.courier().leave(UUID, request, "beta", absent)
    made_anew(ends.here)
    answer = ends.there.courier().withdraw(request)
    with pytest.raises(VtpmFailed, match="there is another vTPM at"):
        ends.here.courier().settle(answer)
    assert ends.here.kept() == ["left"]
    moved_away(ends.here)
    ends.here.courier().settle(answer)
    assert ends.look(ends.here) == before


def test_nor_where_it_arrives(ends: Ends) -> None:
    before = ends.look(ends.here)
    parcel = ends.here.courier().leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    with pytest.raises(Killed):
        ends.there.courier(kill_at("key removed")).receive(parcel)
    made_anew(ends.there)
    with pytest.raises(VtpmFailed, match="there is another vTPM at"):
        ends.there.courier().receive(parcel)
    assert ends.there.kept() == ["came"]
    moved_away(ends.there)
    ends.there.courier().receive(parcel)
    assert ends.look(ends.there) == before


def test_an_export_that_is_asked_again_erases_nothing_that_it_has_not_given(ends: Ends) -> None:
    """Not what a machine is using that was started meanwhile, and not another one."""
    request = ends.there.courier().ask(UUID, "alpha")
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    made_anew(ends.here)

    def runs() -> None:
        raise VtpmFailed("the machine is here")

    with pytest.raises(VtpmFailed, match="the machine is here"):
        ends.here.courier().leave(UUID, request, "beta", runs)
    with pytest.raises(VtpmFailed, match="there is another vTPM at"):
        ends.here.courier().leave(UUID, request, "beta", absent)
    assert ends.here.host.usable
    moved_away(ends.here)
    assert ends.here.courier().leave(UUID, request, "beta", absent) == parcel


def test_an_export_that_died_gives_what_the_machine_has_done_since(ends: Ends) -> None:
    """It was written down and not erased yet; its machine was started, and saved again."""
    request = ends.there.courier().ask(UUID, "alpha")
    with pytest.raises(Killed):
        ends.here.courier(kill_at("leaving")).leave(UUID, request, "beta", absent)
    with ends.here.host.emulator.guest() as guest:
        guest.extend(11, b"\x33" * 32)
        later = guest.pcr(11)
    before = ends.look(ends.here)
    parcel = ends.here.courier().leave(UUID, request, "beta", absent)
    ends.here.courier().settle(ends.there.courier().receive(parcel))
    assert ends.look(ends.there) == before
    with ends.there.host.emulator.guest() as guest:
        assert guest.pcr(11) == later


def test_a_request_by_a_sessions_id_erases_nothing(ends: Ends) -> None:
    """A destination asks in a file for what a session is giving it, where an export has died before that."""
    asked = ends.there.courier().ask(UUID, "alpha")
    with pytest.raises(Killed):
        ends.here.courier(kill_at("left")).leave(UUID, asked, "beta", absent)
    ends.here.host.carrier().depart(UUID, ends.there.host.carrier().recipient())
    request = msgspec.structs.replace(msgspec.convert(body(asked), Request), id=SESSION)
    with pytest.raises(VtpmRefused, match="is not what the ledger says"):
        ends.here.courier().leave(UUID, signed(ends.there, request), "beta", absent)
    assert ends.here.host.usable


def test_an_older_copy_is_not_taken_for_what_arrives(ends: Ends) -> None:
    """An import died at its very end, and the next one in its middle."""
    request = ends.there.courier().ask(UUID, "alpha")
    answer = ends.there.courier().receive(ends.here.courier().leave(UUID, request, "beta", absent))
    ends.here.courier().settle(answer)
    ends.here.host.restart()
    request = ends.here.courier().ask(UUID, "beta")
    parcel = ends.there.courier().leave(UUID, request, "alpha", absent)
    stale = ends.there.host.agent().ledgers.file(UUID, "left").read_bytes()
    ends.there.courier().settle(ends.here.courier().receive(parcel))
    ends.there.host.restart()
    luggage = msgspec.msgpack.decode(stale)["luggage"]
    ends.there.host.agent().ledgers.file(UUID, "came").write_bytes(msgspec.msgpack.encode(luggage))
    before = ends.look(ends.here)
    parcel = ends.here.courier().leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    with pytest.raises(Killed):
        ends.there.courier(kill_at("arriving")).receive(parcel)
    ends.there.courier().receive(parcel)
    assert ends.look(ends.there) == before


def test_what_has_come_is_not_withdrawn(ends: Ends) -> None:
    request, _, _ = ends.move()
    with pytest.raises(VtpmRefused, match="the vTPM has come"):
        ends.there.courier().withdraw(request)
    ends.there.host.agent().ledgers.forget(UUID)
    with pytest.raises(VtpmRefused, match="the vTPM has come"):  # its ledger was put aside, not lost
        ends.there.courier().withdraw(request)
    with pytest.raises(SignerUntrusted):  # nor by another host
        ends.here.courier().withdraw(request)


def test_a_relay_does_not_give_what_has_left_in_a_file(ends: Ends) -> None:
    ends.here.courier().leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    ends.here.host.restart()
    lived_in(ends.here.host.emulator)  # somebody has started its machine all the same
    carrier = ends.here.host.carrier()
    assert carrier.has(UUID)
    with pytest.raises(VtpmRefused, match="not here to be given: it is leaving"):
        carrier.depart(UUID, ends.there.host.carrier().recipient())


def test_what_an_export_has_left_behind_goes_with_the_vtpm(ends: Ends) -> None:
    """It died before anything was given, nobody has asked it again, and a relay has moved the vTPM since."""
    with pytest.raises(Killed):
        ends.here.courier(kill_at("left")).leave(UUID, ends.there.courier().ask(UUID, "alpha"), "beta", absent)
    assert ends.here.kept() == ["left"]
    leaving, arriving = ends.here.host.carrier(), ends.there.host.carrier()
    leaving.check(UUID, arriving.arrive(UUID, leaving.depart(UUID, arriving.recipient())))
    leaving.part(UUID)
    arriving.release(UUID)
    leaving.given(UUID)
    assert ends.here.kept() == []
    assert ends.there.host.usable


def test_both_say_that_they_have_it(ends: Ends) -> None:
    """An operator was certain, and wrong: it is told."""
    request = ends.there.courier().ask(UUID, "alpha")
    answer = ends.there.courier().receive(ends.here.courier().leave(UUID, request, "beta", absent))
    ends.here.host.restart()
    ends.here.courier().keep_here(UUID)
    with pytest.raises(VtpmRefused, match="the vTPM stands as here at this host, and beta says it has it"):
        ends.here.courier().settle(answer)


# ---- killed at each step

SOURCE_STEPS = ("exported", "left", "leaving", "erased", "gone", "copy removed")
DESTINATION_STEPS = (
    *("rehearsed", "arriving", "kept", "key removed"),
    *("started", "answered", "here", "copy removed"),
)


class Killed(BaseException):
    """The command is gone, in the middle of something."""


def kill_at(wanted: str) -> Beat:
    def beat(step: str) -> None:
        if step == wanted:
            raise Killed(step)

    return beat


@pytest.mark.parametrize("off", [False, True], ids=["saved", "off"])
@pytest.mark.parametrize(
    ("side", "step"),
    [*(("source", step) for step in SOURCE_STEPS), *(("destination", step) for step in DESTINATION_STEPS)],
)
def test_killed_at_each_step_leaves_exactly_one(ends: Ends, side: str, step: str, off: bool) -> None:
    """Whoever gives the same command again gets on; what a guest has done meanwhile is not undone."""
    if off:
        switch_off(ends.here)
    before = None if off else ends.look(ends.here)
    killer = kill_at(step)
    source, destination = (killer if side == which else (lambda step: None) for which in ("source", "destination"))
    request = ends.there.courier().ask(UUID, "alpha")
    parcel = answer = b""

    def course() -> None:
        nonlocal parcel, answer
        parcel = ends.here.courier(source).leave(UUID, request, "beta", absent)
        answer = ends.there.courier(destination).receive(parcel)
        ends.here.courier(source).settle(answer)

    with pytest.raises(Killed):
        course()
    assert not (ends.here.has_it and ends.there.has_it)
    later = None
    if ends.there.has_it:
        with ends.there.host.emulator.guest() as guest:
            if off:
                guest.startup()
            guest.extend(11, b"\x33" * 32)
            later = guest.pcr(11)
    parcel = parcel or ends.here.courier().leave(UUID, request, "beta", absent)
    answer = answer or ends.there.courier().receive(parcel)
    ends.here.courier().settle(answer)
    assert (ends.here.has_it, ends.there.has_it) == (False, True)
    assert ends.here.kept() == ends.there.kept() == []
    if before is not None:
        assert ends.look(ends.there) == before
    if later is not None:
        with ends.there.host.emulator.guest() as guest:
            assert guest.pcr(11) == later


@pytest.mark.parametrize("step", ["withdrawn", "taken back", "here", "copy removed"])
def test_killed_while_it_is_withdrawn(ends: Ends, step: str) -> None:
    before = ends.look(ends.here)
    request = ends.there.courier().ask(UUID, "alpha")
    ends.here.courier().leave(UUID, request, "beta", absent)
    ends.here.host.restart()
    with pytest.raises(Killed):
        ends.here.courier(kill_at(step)).settle(ends.there.courier(kill_at(step)).withdraw(request))
    assert not ends.there.has_it
    ends.here.courier().settle(ends.there.courier().withdraw(request))
    assert ends.look(ends.here) == before
    assert ends.here.host.ledger.holding is Holding.HERE
    assert ends.here.kept() == ends.there.kept() == []


def test_the_steps_are_all_of_them(ends: Ends) -> None:
    here: list[str] = []
    there: list[str] = []
    request = ends.there.courier(there.append).ask(UUID, "alpha")
    parcel = ends.here.courier(here.append).leave(UUID, request, "beta", absent)
    ends.here.courier(here.append).settle(ends.there.courier(there.append).receive(parcel))
    assert (tuple(here), tuple(there)) == (SOURCE_STEPS, DESTINATION_STEPS)


def test_a_signature_of_one_kind_is_none_of_another(ends: Ends) -> None:
    request = msgspec.msgpack.decode(ends.there.courier().ask(UUID, "alpha"), type=Letter)
    with pytest.raises(SignatureInvalid):
        ends.here.courier().settle(msgspec.msgpack.encode(msgspec.structs.replace(request, kind="answer")))

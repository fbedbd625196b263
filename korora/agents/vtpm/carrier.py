"""Moves vTPMs: reads and feeds the machines' emulators, keeps the ledgers. Everything blocks; see ``proxy.vtpm``."""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

from crypto.hpke import Recipient
from korora.agents.vtpm import ctrl, parcel
from korora.agents.vtpm.epochs import Entry
from korora.agents.vtpm.handover import Action, Event, Holding
from korora.agents.vtpm.ledger import LedgerFile, Ledgers, keep, now, remove
from korora.agents.vtpm.parcel import Parcel, Passage, Proof, Quoted
from korora.agents.vtpm.rehearsal import Keys, rehearse
from korora.agents.vtpm.swtpm import Swtpm
from proxy.errors import VtpmFailed, VtpmRefused

log = structlog.get_logger("korora.vtpm")

STATE_FILES: Final = ("tpm2-00.permall", "tpm2-00.volatilestate", "tpm2-00.savestate")
"""Of a TPM 2.0 in swtpm's state directory."""

Beat = Callable[[str], None]
"""Told of each step as it has been done; tests end the process there."""

LEFT: Final = "left"
"""Of a vTPM that goes in a file: what is kept until it has come there; see ``courier``."""

VOUCHED_MAX: Final = 64  # keys of sessions that have not begun: attestation is followed by the offer at once


@dataclass(frozen=True, slots=True)
class Places:
    """Where a host's vTPMs are; ``{uuid}`` stands for the machine's.

    Args:
        control: unix socket of the emulator's control channel.
        state: the emulator's state directory.
        keys: of all its emulators.
    """

    control: str
    state: str
    keys: Keys

    def emulator(self, uuid: str) -> Swtpm:
        """The machine's."""
        return Swtpm(Path(self.control.replace("{uuid}", uuid)))

    def files(self, uuid: str) -> tuple[Path, ...]:
        """What an emulator stores of the machine's vTPM."""
        folder = Path(self.state.replace("{uuid}", uuid))
        return tuple(folder / name for name in STATE_FILES)


class Agent:
    """The vTPM agent of a host: makes carriers, and tells how things stand.

    Args:
        places: where the emulators are.
        state: of the relay.
        beat: told of each step.
    """

    def __init__(self, places: Places, state: Path, beat: Beat = lambda step: None) -> None:
        self.places, self.ledgers, self.beat = places, Ledgers(state), beat
        self._vouched: dict[tuple[str, str], Recipient] = {}
        """Keys of sessions that are to come, the oldest first."""
        self._lock = threading.Lock()

    def recipient(self, session: str, peer: str) -> bytes:
        """See ``proxy.vtpm.Carriers``."""
        made = Recipient()
        with self._lock:
            self._vouched[session, peer] = made
            while len(self._vouched) > VOUCHED_MAX:
                del self._vouched[next(iter(self._vouched))]
        return made.public

    def vouched(self, session: str, peer: str) -> Recipient | None:
        """The key that was made for that session before it began, once."""
        with self._lock:
            return self._vouched.pop((session, peer), None)

    def of(self, session: str, peer: str) -> "Carrier":
        """See ``proxy.vtpm.Carriers``."""
        return Carrier(self, session, peer)


class Carrier:
    """See ``proxy.vtpm.Carrier``.

    Args:
        agent: of this host.
        session, peer: which migration it is of.
    """

    def __init__(self, agent: Agent, session: str, peer: str) -> None:
        self._agent, self._session, self._peer = agent, session, peer
        self._places, self._ledgers, self._beat = agent.places, agent.ledgers, agent.beat
        self._recipient = agent.vouched(session, peer)
        self._left: tuple[bytes, bytes] | None = None
        """For whose key it was wrapped, and that."""
        self._arrived: tuple[bytes, bytes] | None = None
        """What came, and the proof that was given for it."""
        self._ours: Proof | None = None
        self._expected = b""
        self.moving: tuple[int, str] | None = None
        """See ``proxy.vtpm.Carrier``."""
        self._turn = threading.Lock()

    # ---- source

    def has(self, uuid: str) -> bool:
        """See ``proxy.vtpm.Carrier``: it has an emulator here, or the ledger knows that it should."""
        if not uuid:
            return False
        emulator = self._places.emulator(uuid)
        return emulator.control.exists() or self._ledgers.read(uuid).holding in (Holding.HERE, Holding.LEAVING)

    def depart(self, uuid: str, recipient: bytes) -> bytes:
        """See ``proxy.vtpm.Carrier``."""
        with self._turn:
            if self._left is not None:
                if self._left[0] != recipient:
                    raise VtpmRefused("the destination wants the vTPM under another key than before")
                return self._left[1]
            if not self.has(uuid):
                return b""
            emulator = self._places.emulator(uuid)
            if not emulator.running():
                raise VtpmFailed(f"the vTPM of {uuid} is not running", "start the machine's swtpm, or migrate without")
            blobs = emulator.export()
            self._beat("exported")
            nonce = secrets.token_bytes(32)
            with self._ledgers.locked(uuid) as file:
                passage = Passage(self._session, uuid, file.ledger.epoch + 1)
                self._expected = passage.quoted(nonce)
                self._ours = prove(blobs, self._places.keys, self._expected)
                identity = parcel.identity_of(self._ours)
                digest = parcel.digest_of(blobs)
                file.write(file.ledger.depart(self._session, self._peer, identity=identity, digest=digest, at=now()))
            self._beat("leaving")
            permanent, volatile = blobs
            held = Parcel(
                version=parcel.VERSION,
                nonce=nonce,
                identity=identity,
                permanent=permanent.data,
                permanent_flags=permanent.flags,
                volatile=volatile.data,
                volatile_flags=volatile.flags,
            )
            self._left = recipient, passage.wrap(held, recipient)
            self.moving = passage.epoch, digest
            log.info("vtpm", holding="leaving", vm=uuid, epoch=passage.epoch, peer=self._peer, digest=digest[:16])
            return self._left[1]

    def check(self, uuid: str, proof: bytes) -> None:
        """See ``proxy.vtpm.Carrier``."""
        if self._ours is None:
            raise VtpmRefused(f"a proof of the vTPM of {uuid}, which was not given")
        said = parcel.read_proof(proof)
        parcel.verify(said, self._expected)
        parcel.same(self._ours, said)

    def part(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.PART)

    def stay(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.STAY)

    def given(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.GIVEN)

    # ---- destination

    def recipient(self) -> bytes:
        """See ``proxy.vtpm.Carrier``."""
        with self._turn:
            if self._recipient is None:
                self._recipient = Recipient()
            return self._recipient.public

    def arrive(self, uuid: str, wrapped: bytes) -> bytes:
        """See ``proxy.vtpm.Carrier``."""
        with self._turn:
            if self._arrived is not None:
                if self._arrived[0] != wrapped:
                    raise VtpmRefused("another vTPM than before")
                return self._arrived[1]
            if self._recipient is None:
                raise VtpmRefused("a vTPM that was not asked for")
            passage, held = parcel.unwrap(self._session, uuid, wrapped, self._recipient)
            for blob in held.blobs:
                blob.require_sealed()
            with self._ledgers.locked(uuid) as file:
                entry = file.ledger.arrive(
                    passage.epoch, self._session, self._peer, identity=held.identity, digest=held.digest, at=now()
                )
                emulator = self._places.emulator(uuid)
                emulator.require_idle()  # before the ledger says that it may be erased
                proof = prove(held.blobs, self._places.keys, passage.quoted(held.nonce))
                if parcel.identity_of(proof) != held.identity:
                    raise VtpmRefused("what has arrived is another vTPM than the one that left")
                self._beat("rehearsed")
                file.write(entry)
                self._beat("arriving")
                keep(self._ledgers.kept(uuid), msgspec.msgpack.encode(held))
                self._beat("kept")
                emulator.load(held.blobs)
                self._beat("loaded")
            self._arrived = wrapped, msgspec.msgpack.encode(proof)
            self.moving = passage.epoch, held.digest
            log.info("vtpm", holding="arriving", vm=uuid, epoch=passage.epoch, peer=self._peer, digest=held.digest[:16])
            return self._arrived[1]

    def release(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.RELEASE)

    def wipe(self, uuid: str) -> None:
        """See ``proxy.vtpm.Carrier``."""
        self._follow(uuid, Event.WIPE)

    # ---- both

    def _follow(self, uuid: str, event: Event) -> None:
        """Do what the machine's hand-over asks for; nothing where this vTPM has no part in it, or not any more."""
        if not uuid:
            return
        with self._turn:
            if not self._ledgers.read(uuid).concerns(self._session):
                return
            with self._ledgers.locked(uuid) as file:
                if not file.ledger.concerns(self._session):
                    return
                entry, actions = file.ledger.follow(event, now())
                for action in actions:
                    self._act(action, uuid, file, entry)
                    self._beat(f"{event.value} {action.value}")
            if entry is not None:
                log.info("vtpm", holding=entry.holding, vm=uuid, epoch=entry.epoch, peer=self._peer)

    def _act(self, action: Action, uuid: str, file: LedgerFile, entry: Entry | None) -> None:
        emulator, kept = self._places.emulator(uuid), self._ledgers.kept(uuid)
        match action:
            case Action.WRITE if entry is not None:
                file.write(entry)
            case Action.STOP if emulator.listens and emulator.running():
                emulator.store()
                emulator.stop()
            case Action.RESUME:
                self._resume(emulator, uuid)
            case Action.ERASE:
                emulator.end()
                remove(*self._places.files(uuid), self._ledgers.file(uuid, LEFT))
            case Action.START:
                self._start(emulator, kept)
            case Action.FORGET:
                remove(kept)
            case _:
                return

    def _resume(self, emulator: Swtpm, uuid: str) -> None:
        if not emulator.listens:
            log.warning("a vTPM stays here, and its emulator has ended", vm=uuid)
            return  # with its machine or without: whoever starts that anew starts this, from what is stored
        if emulator.running():
            return  # it was not stopped yet, or it was resumed before
        volatile = self._places.files(uuid)[1]
        if not volatile.exists():
            raise VtpmFailed(
                f"{volatile} is gone: the vTPM would come up as after a reset, and its guest would not know",
                "shut the machine down, and start it anew",
            )
        emulator.start(ctrl.INIT_DELETE_VOLATILE)

    def _start(self, emulator: Swtpm, kept: Path) -> None:
        if emulator.running():
            return  # before the ledger had it
        try:
            held = msgspec.msgpack.decode(kept.read_bytes(), type=Parcel)
        except (OSError, msgspec.DecodeError) as error:
            raise VtpmFailed(f"what arrived of the vTPM cannot be read from {kept}: {error}") from None
        emulator.load(held.blobs)  # again: the emulator may be another process by now
        emulator.start()


def prove(blobs: tuple[ctrl.StateBlob, ...], keys: Keys, qualifying: bytes, *, off: bool = False) -> Proof:
    """What the vTPM of that state says of itself; see ``rehearsal.rehearse``.

    Raises:
        VtpmFailed: it does not come up, or does not answer.
    """
    told = rehearse(blobs, keys, qualifying, off=off)
    quotes = tuple(Quoted(int(said.hierarchy), said.public, said.quote, said.signature) for said in told.quotes)
    return Proof(quotes, b"".join(told.pcrs))

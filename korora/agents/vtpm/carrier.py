"""Moves vTPMs: reads and feeds the machines' emulators, keeps the ledgers. Everything blocks; see ``proxy.vtpm``."""

import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import structlog

from crypto.hpke import Recipient
from korora.agents.vtpm import ctrl, parcel
from korora.agents.vtpm.carried import Verifier
from korora.agents.vtpm.ctrl import StateBlob
from korora.agents.vtpm.epochs import Entry
from korora.agents.vtpm.follower import Beat, Follower, prove
from korora.agents.vtpm.handover import Action, Holding
from korora.agents.vtpm.ledger import LEFT, LedgerFile, Ledgers, flush, keep, now, remove
from korora.agents.vtpm.parcel import Parcel, Passage
from korora.agents.vtpm.rehearsal import Keys, stored
from korora.agents.vtpm.swtpm import Swtpm
from proxy.errors import VtpmFailed, VtpmRefused

log = structlog.get_logger("korora.vtpm")

STATE_FILES: Final = ("tpm2-00.permall", "tpm2-00.volatilestate", "tpm2-00.savestate")
"""Of a TPM 2.0 in swtpm's state directory."""

VOUCHED_PER_PEER_MAX: Final = 16  # the same of one peer: who floods challenges takes no other peer's key away
VOUCHED_MAX: Final = 256  # keys of sessions that have not begun: attestation is followed by the offer at once


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

    def require_empty(self, uuid: str) -> None:
        """That nothing is stored of a vTPM of the machine.

        Raises:
            VtpmFailed: there is.
        """
        files = self.files(uuid)
        if any(path.exists() for path in files):
            raise VtpmFailed(
                f"there is a vTPM's state already at {files[0].parent}",
                "find out whose it is; if nobody's, remove it",
            )

    def state_of(self, uuid: str) -> tuple[StateBlob, ...]:
        """Of a TPM that runs all of it; of one that does not, what is stored.

        Raises:
            VtpmFailed: there is none, or it cannot be read.
        """
        emulator = self.emulator(uuid)
        if emulator.listens and emulator.running():
            return emulator.export()
        return stored(self.files(uuid), self.keys)

    def require_same(self, uuid: str, identity: str) -> None:
        """That what is there already is the vTPM of that identity, and not one that was made in its place.

        Raises:
            VtpmFailed: it is another, or cannot be told.
        """
        blobs = self.state_of(uuid)
        off = all(blob.type is not ctrl.Blob.VOLATILE for blob in blobs)
        if parcel.identity_of(prove(blobs, self.keys, bytes(32), off=off)) != identity:
            raise VtpmFailed(
                f"there is another vTPM at {self.files(uuid)[0].parent} than the one of {uuid} that was kept",
                "shut its machine down, move that vTPM's files away, start its swtpm uninitialised, and try again",
            )


class Agent:
    """The vTPM agent of a host: makes carriers, and tells how things stand.

    Args:
        places: where the emulators are whose state is moved; None where none is.
        state: of the relay.
        beat: told of each step.
        verifying: what an emulator needs to read what QEMUs carry; None where that is not verified.
    """

    def __init__(
        self, places: Places | None, state: Path, beat: Beat = lambda step: None, *, verifying: Keys | None = None
    ) -> None:
        self.places, self.ledgers, self.beat = places, Ledgers(state), beat
        self.verifying = verifying
        self._vouched: dict[tuple[str, str], Recipient] = {}
        """Keys of sessions that are to come, the oldest first."""
        self._lock = threading.Lock()

    def recipient(self, session: str, peer: str) -> bytes:
        """See ``proxy.vtpm.Carriers``."""
        made = Recipient()
        with self._lock:
            self._vouched.pop((session, peer), None)
            theirs = [key for key in self._vouched if key[1] == peer]
            if len(theirs) >= VOUCHED_PER_PEER_MAX:
                del self._vouched[theirs[0]]
            elif len(self._vouched) >= VOUCHED_MAX:
                del self._vouched[next(iter(self._vouched))]
            self._vouched[session, peer] = made
        return made.public

    def vouched(self, session: str, peer: str) -> Recipient | None:
        """The key that was made for that session before it began, once."""
        with self._lock:
            return self._vouched.pop((session, peer), None)

    def carries(self, kind: str) -> bool:
        """See ``proxy.vtpm.Carriers``."""
        return (self.places if kind == "xl" else self.verifying) is not None

    def of(self, session: str, peer: str) -> "Carrier":
        """See ``proxy.vtpm.Carriers``."""
        return Carrier(self, self.moving_places(), session, peer)

    def moving_places(self) -> Places:
        """Where the emulators are whose state is moved.

        Raises:
            VtpmFailed: this host does not know.
        """
        if self.places is None:
            raise VtpmFailed("this host moves no vTPMs", "name the emulators in vtpm.toml")
        return self.places

    def verifier(self, session: str, peer: str) -> Verifier:
        """See ``proxy.vtpm.Carriers``."""
        keys = self.verifying or Keys()
        return Verifier(self.ledgers, self.beat, self.vouched(session, peer), session, peer, keys=keys)


class Carrier(Follower):
    """See ``proxy.vtpm.Carrier``.

    Args:
        agent: of this host.
        places: where its emulators are.
        session, peer: which migration it is of.
    """

    def __init__(self, agent: Agent, places: Places, session: str, peer: str) -> None:
        super().__init__(agent.ledgers, agent.beat, agent.vouched(session, peer), session, peer)
        self._places = places

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
            if (before := self._given_before(recipient)) is not None:
                return before
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

    # ---- destination

    def arrive(self, uuid: str, wrapped: bytes) -> bytes:
        """See ``proxy.vtpm.Carrier``."""
        with self._turn:
            if (before := self._proved_before(wrapped)) is not None:
                return before
            passage, held = parcel.unwrap(self._session, uuid, wrapped, self._asked())
            for blob in held.blobs:
                blob.require_sealed()
            with self._ledgers.locked(uuid) as file:
                entry = file.ledger.arrive(
                    passage.epoch, self._session, self._peer, identity=held.identity, digest=held.digest, at=now()
                )
                emulator = self._places.emulator(uuid)
                emulator.require_idle()  # before the ledger says that it may be erased
                if file.ledger.holding is Holding.UNKNOWN:  # what is stored then is not what this host gave away
                    self._places.require_empty(uuid)
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
                self._start(emulator, kept, uuid)
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

    def _start(self, emulator: Swtpm, kept: Path, uuid: str) -> None:
        try:
            held = msgspec.msgpack.decode(kept.read_bytes(), type=Parcel)
        except (OSError, msgspec.DecodeError) as error:
            raise VtpmFailed(f"what arrived of the vTPM cannot be read from {kept}: {error}") from None
        if emulator.running():  # before the ledger had it, or somebody else has started one
            self._places.require_same(uuid, held.identity)
        else:
            emulator.load(held.blobs)  # again: the emulator may be another process by now
            emulator.start()
        flush(*self._places.files(uuid))  # the copy goes next

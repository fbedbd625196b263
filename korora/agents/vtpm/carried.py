"""Verifies vTPMs that QEMUs carry in their streams: nothing is moved. Everything blocks; see ``proxy.vtpm.Verifier``.

Each side brings up what its own end of the stream had in an emulator of its own (``rehearsal``). The source challenges,
what the destination got answers, and the ledgers of both say whose it is from then on. To the machine's own emulators
nobody speaks but their QEMUs.
"""

import secrets
from typing import TYPE_CHECKING

import msgspec
import structlog

from crypto.hpke import Recipient
from korora.agents.vtpm import parcel
from korora.agents.vtpm.ctrl import Blob, BlobFlag, StateBlob
from korora.agents.vtpm.epochs import Entry
from korora.agents.vtpm.follower import Beat, Follower, prove
from korora.agents.vtpm.handover import Action
from korora.agents.vtpm.ledger import LedgerFile, Ledgers, now
from korora.agents.vtpm.parcel import Passage, Proof, Voucher
from korora.agents.vtpm.rehearsal import Keys
from proxy.errors import VtpmFailed, VtpmRefused

if TYPE_CHECKING:
    from proxy.streams.vtpm import CarriedVtpm

log = structlog.get_logger("korora.vtpm")


class Verifier(Follower):
    """See ``proxy.vtpm.Verifier``.

    Args:
        ledgers, beat, recipient, session, peer: see ``Follower``.
        keys: under which the state may be encrypted.
    """

    def __init__(
        self, ledgers: Ledgers, beat: Beat, recipient: Recipient | None, session: str, peer: str, *, keys: Keys
    ) -> None:
        super().__init__(ledgers, beat, recipient, session, peer)
        self._keys = keys
        self._state: tuple[StateBlob, ...] = ()
        self._clear = False
        """Whether the state is encrypted by nobody but the channel."""

    def saw(self, carried: "CarriedVtpm") -> None:
        """See ``proxy.vtpm.Verifier``.

        Raises:
            VtpmFailed: it is no state that could be brought up here.
        """
        if carried.savestate.data:
            raise VtpmFailed("the vTPM is a TPM 1.2, which cannot quote for this", "give the machine a TPM 2.0")
        state = (
            StateBlob(Blob.PERMANENT, carried.permanent.flags, carried.permanent.data),
            StateBlob(Blob.VOLATILE, carried.volatile.flags, carried.volatile.data),
        )
        encrypted = [bool(blob.protection & BlobFlag.MIGRATION_ENCRYPTED) for blob in state]
        if any(encrypted) and not self._keys.migration:
            raise VtpmFailed(
                "the vTPM's state is encrypted under a migration key that this host's relay does not have",
                "name it as migration_key in vtpm.toml",
            )
        self._state, self._clear = state, not all(encrypted)

    def has(self, uuid: str) -> bool:
        """See ``proxy.vtpm.Carrier``: whether the stream had one."""
        return bool(self._state)

    # ---- source

    def depart(self, uuid: str, recipient: bytes) -> bytes:
        """See ``proxy.vtpm.Carrier``: what is given is a challenge."""
        with self._turn:
            if (before := self._given_before(recipient)) is not None:
                return before
            self._require(uuid)
            if self._clear:
                log.warning("a vTPM is in clear within its machine's stream", vm=uuid)
            nonce, digest = secrets.token_bytes(32), parcel.digest_of(self._state)
            with self._ledgers.locked(uuid) as file:
                passage = Passage(self._session, uuid, file.ledger.epoch + 1)
                self._expected = passage.quoted(nonce)
                self._ours = self._prove(self._expected)
                identity = parcel.identity_of(self._ours)
                entry = file.ledger.depart(self._session, self._peer, identity=identity, digest=digest, at=now())
                file.write(entry)
            self._beat("leaving")
            voucher = Voucher(version=parcel.VERSION, nonce=nonce, identity=identity, digest=digest)
            self._left = recipient, passage.wrap(voucher, recipient)
            self._tell("leaving", uuid, passage.epoch, digest)
            return self._left[1]

    # ---- destination

    def arrive(self, uuid: str, wrapped: bytes) -> bytes:
        """See ``proxy.vtpm.Carrier``: what the stream has brought answers."""
        with self._turn:
            if (before := self._proved_before(wrapped)) is not None:
                return before
            self._require(uuid)
            passage, voucher = parcel.unwrap_voucher(self._session, uuid, wrapped, self._asked())
            digest = parcel.digest_of(self._state)
            if digest != voucher.digest:
                raise VtpmRefused("what has arrived of the vTPM is not what has left")
            with self._ledgers.locked(uuid) as file:
                entry = file.ledger.arrive(
                    passage.epoch, self._session, self._peer, identity=voucher.identity, digest=digest, at=now()
                )
                proof = self._prove(passage.quoted(voucher.nonce))
                if parcel.identity_of(proof) != voucher.identity:
                    raise VtpmRefused("what has arrived is another vTPM than the one that left")
                self._beat("rehearsed")
                file.write(entry)
            self._beat("arriving")
            self._arrived = wrapped, msgspec.msgpack.encode(proof)
            self._tell("arriving", uuid, passage.epoch, digest)
            return self._arrived[1]

    # ---- both

    def _require(self, uuid: str) -> None:
        if not self._state:
            raise VtpmFailed(f"nobody knows what the stream had of the vTPM of {uuid}")
        if not uuid:
            raise VtpmFailed(
                "the machine has no UUID, so its vTPM cannot be told from others'", "start its QEMU with -uuid"
            )

    def _prove(self, qualifying: bytes) -> Proof:
        return prove(self._state, Keys() if self._clear else self._keys, qualifying, sealed=False)

    def _tell(self, holding: str, uuid: str, epoch: int, digest: str) -> None:
        self.moving = epoch, digest
        log.info("vtpm", holding=holding, vm=uuid, epoch=epoch, peer=self._peer, digest=digest[:16], carried=True)

    def _act(self, action: Action, uuid: str, file: LedgerFile, entry: Entry | None) -> None:
        """The ledger follows; what else a vTPM needs is its QEMU's."""
        if action is Action.WRITE and entry is not None:
            file.write(entry)

"""A vTPM that moves in a file, where no relay carries it: its machine is off or saved, or the way to its host is cut.

    destination                                 source
    ask: a key in a file, wrapped        ──▶    leave: the machine is not here; the vTPM is read, rehearsed, wrapped;
                                                a copy is kept; ledger: leaving; its emulator ends, its state is removed
    receive: opened, rehearsed; ledger:  ◀──
    arriving; kept; the key is removed;
    started; ledger: here                ──▶    settle: ledger: gone; the copy is removed
    withdraw: the key is removed         ──▶    settle: started from the copy; ledger: here

At every moment one host at most can let it answer: the source's emulator has lost it before there is a parcel, and has
it back only by the destination's word that it never came, or an operator's. And one host at least has all of it on its
disk: the source's copy stays until the destination has said that it is there. Each step may be asked for again.

Everything here blocks.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from crypto.at_rest import HostKeys
from crypto.attestation import evidence
from crypto.attestation.evidence import Evidence
from crypto.errors import SealBroken
from crypto.files import read_bounded
from crypto.hpke import Recipient
from crypto.identity import Identity
from korora.agents.vtpm import letters, parcel
from korora.agents.vtpm.carrier import Agent
from korora.agents.vtpm.ctrl import Blob, StateBlob
from korora.agents.vtpm.follower import prove
from korora.agents.vtpm.handover import Event, Holding
from korora.agents.vtpm.ledger import LEFT, LedgerFile, flush, keep, now, remove
from korora.agents.vtpm.letters import Answer, Luggage, Request, Sent, Trust
from korora.agents.vtpm.parcel import Passage
from proxy.attestation import Platform
from proxy.control import Wanted
from proxy.errors import VtpmFailed, VtpmRefused

log = structlog.get_logger("korora.vtpm")

REQUEST_HOURS_DEFAULT: Final = 24  # somebody walks between the hosts
REQUEST_HOURS_MAX: Final = 168  # a week: a key that waits longer is one that was forgotten
_KEPT_BYTES_MAX: Final = 2 * letters.LETTER_BYTES_MAX
_WRAPPING: Final = "vtpm request"  # of the store's folders none is called that: those are hexadecimal

_ASKED, _CAME, _ANSWER = "asked", "came", "answer"
_T = TypeVar("_T")


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Destination: a request that waits; ``secret`` is its key's, wrapped under this host's."""

    id: str
    source: str
    until: int
    secret: bytes


class _Left(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Source: what was given, until it is known to have come: the letter, and what is in it."""

    id: str
    parcel: bytes
    luggage: Luggage


class Courier:
    """Both ends of such moves, on one host.

    Args:
        agent: where the emulators and ledgers are.
        identity: signs what this host says; its CA says whom it believes.
        keys: of what this host keeps at rest.
        pins: of signing keys; see ``letters.Trust``.
        clock: this moment.
        platform: shows this host's to whom it asks, or demands that of whoever asks; None for neither.

    Raises:
        VtpmFailed: this host does not know where emulators are.
    """

    def __init__(
        self,
        agent: Agent,
        identity: Identity,
        keys: HostKeys,
        pins: frozenset[bytes] = frozenset(),
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        platform: Platform | None = None,
    ) -> None:
        self._places, self._ledgers, self._beat = agent.moving_places(), agent.ledgers, agent.beat
        self._identity, self._keys, self._pins, self._clock = identity, keys, pins, clock
        self._platform = platform

    # ---- destination

    def ask(self, uuid: str, source: str, hours: int = REQUEST_HOURS_DEFAULT, wanted: Wanted | None = None) -> bytes:
        """A request for ``source`` to answer; what was asked for before cannot come any more.

        Args:
            uuid: the machine's.
            source: the host that has its vTPM.
            hours: how long the key waits.
            wanted: what to show of this host, so that its TPM vouches for the key; None for nothing.

        Raises:
            VtpmRefused: the vTPM is here.
            VtpmFailed: what has to be kept cannot be.
            TpmUnusable: this host's TPM does not answer.
        """
        recipient, request = Recipient(), secrets.token_hex(16)
        until = int((self._clock() + timedelta(hours=min(hours, REQUEST_HOURS_MAX))).timestamp())
        with self._ledgers.locked(uuid) as file:
            file.ledger.require_elsewhere()
            _, secret = self._keys.make(_WRAPPING, bytes.fromhex(request), recipient.secret)
            self._keep(uuid, _ASKED, _Asked(request, source, until, secret))
            remove(self._file(uuid, _ANSWER))
            epoch = file.ledger.epoch
        asks = Request(letters.VERSION, request, uuid, source, recipient.public, epoch, until)
        if self._platform is not None and wanted is not None:
            asks = msgspec.structs.replace(asks, evidence=self._platform.attest(asks.binding, wanted))
        return self._say(asks)

    def receive(self, content: bytes) -> bytes:
        """Take the vTPM that is in a parcel, so that its emulator has it; the answer for its source.

        Raises:
            VtpmRefused: not this one, not now, not any more, or not by whom it was asked of.
            VtpmFailed: the emulator or the disk refuses.
            ReceiptError: whoever has sent it is not believed.
        """
        sent, source = letters.read(content, Sent, self._trust())
        self._for_us(sent)
        with self._ledgers.locked(sent.uuid) as file:
            if file.ledger.concerns(sent.id) and file.ledger.holding is Holding.HERE:
                remove(self._file(sent.uuid, _CAME))
                return self._answered(sent)
            begun = file.ledger.concerns(sent.id)
            luggage = self._again(sent, file) if begun else self._take(sent, source, file)
            # From here on all of it is in a file of ours, and the key that opens the parcel is not needed any more.
            remove(self._file(sent.uuid, _ASKED))
            self._beat("key removed")
            proof = self._rehearse(sent, luggage)
            self._start(sent.uuid, luggage)
            self._beat("started")
            said = msgspec.msgpack.encode(proof)
            answer = self._say(
                Answer(letters.VERSION, sent.id, sent.uuid, source, "here", sent.epoch, luggage.digest, said)
            )
            keep(self._file(sent.uuid, _ANSWER), answer)
            self._beat("answered")
            self._write(file, Event.RELEASE, sent.uuid)
            self._beat("here")
            remove(self._file(sent.uuid, _CAME))
            self._beat("copy removed")
            return answer

    def withdraw(self, content: bytes) -> bytes:
        """That the vTPM of a request of ours will never come: the answer for its source.

        Raises:
            VtpmRefused: it has come.
            ReceiptError: this host has not made that request.
        """
        asked, _ = letters.read(content, Request, self._trust(self._identity.name, pinned=False))
        with self._ledgers.locked(asked.uuid) as file:
            came = any(entry.session == asked.id for entry in file.ledger.entries)
            if came or self._ledgers.knew(asked.uuid, asked.id):
                raise VtpmRefused("the vTPM has come: it cannot be given back, only away: korora vtpm export")
            path = self._file(asked.uuid, _ASKED)
            if path.exists() and self._read(asked.uuid, _ASKED, _Asked).id == asked.id:
                remove(path)
                self._beat("withdrawn")
        return self._say(Answer(letters.VERSION, asked.id, asked.uuid, asked.to, "withdrawn"))

    def _take(self, sent: Sent, source: str, file: LedgerFile) -> Luggage:
        """Open it, and keep it; nothing has been changed if it is refused."""
        asked = self._awaited(sent)
        if asked.source != source:
            raise VtpmRefused(f"a parcel of {source}, and it was asked of {asked.source}")
        if self._clock().timestamp() > asked.until:
            raise VtpmRefused("the request has run out: korora vtpm withdraw it, so that its source can take it back")
        luggage = self._open(sent, asked)
        entry = file.ledger.arrive(
            sent.epoch, sent.id, source, identity=luggage.identity, digest=luggage.digest, at=now()
        )
        self._places.emulator(sent.uuid).require_idle()
        self._places.require_empty(sent.uuid)
        self._rehearse(sent, luggage)
        self._beat("rehearsed")
        remove(self._file(sent.uuid, _CAME))  # of an earlier one, whose import died at its very end
        file.write(entry)
        self._beat("arriving")
        self._keep(sent.uuid, _CAME, luggage)
        self._beat("kept")
        log.info("vtpm", holding="arriving", vm=sent.uuid, epoch=sent.epoch, peer=source, digest=luggage.digest[:16])
        return luggage

    def _again(self, sent: Sent, file: LedgerFile) -> Luggage:
        """What was taken, where this host ended in the middle of it."""
        if file.ledger.holding is not Holding.ARRIVING:
            raise VtpmRefused(
                f"the vTPM of that parcel was here, and is {file.ledger.holding.value}: a second use of it"
            )
        kept = self._file(sent.uuid, _CAME).exists()
        luggage = self._read(sent.uuid, _CAME, Luggage) if kept else self._open(sent, self._awaited(sent))
        if luggage.digest != file.ledger.entries[-1].digest:
            raise VtpmRefused("another parcel than the one that has begun to arrive")
        if not kept:
            self._keep(sent.uuid, _CAME, luggage)
        return luggage

    def _awaited(self, sent: Sent) -> _Asked:
        if self._file(sent.uuid, _ASKED).exists():
            asked = self._read(sent.uuid, _ASKED, _Asked)
            if asked.id == sent.id:
                return asked
        raise VtpmRefused("the key for that parcel is not here: it was not asked for, was withdrawn, or was used")

    def _open(self, sent: Sent, asked: _Asked) -> Luggage:
        try:
            _, secret = self._keys.unwrap(_WRAPPING, bytes.fromhex(asked.id), asked.secret)
            recipient = Recipient(secret)
        except (SealBroken, ValueError):
            raise VtpmFailed(
                f"the key in {self._file(sent.uuid, _ASKED)} is not this host's",
                "make another request, and export anew",
            ) from None
        _, luggage = letters.unpack(sent, recipient)
        for blob in luggage.blobs:
            blob.require_sealed()
        return luggage

    def _rehearse(self, sent: Sent, luggage: Luggage) -> parcel.Proof:
        """What it says of itself here, which is what it has said at its source."""
        expected = Passage(sent.id, sent.uuid, sent.epoch).quoted(luggage.nonce)
        theirs = parcel.read_proof(luggage.proof)
        parcel.verify(theirs, expected)
        ours = prove(luggage.blobs, self._places.keys, expected, off=luggage.off)
        parcel.same(theirs, ours)
        if parcel.identity_of(ours) != luggage.identity:
            raise VtpmRefused("what has arrived is another vTPM than the one that left")
        return ours

    def _answered(self, sent: Sent) -> bytes:
        try:
            return read_bounded(self._file(sent.uuid, _ANSWER), letters.LETTER_BYTES_MAX)[0]
        except (OSError, ValueError):
            raise VtpmRefused("the vTPM of that parcel is here already: a second use of it") from None

    # ---- source

    def leave(self, uuid: str, content: bytes, peer: str, require_absent: Callable[[], None]) -> bytes:
        """Give the vTPM away by a request: the parcel. From then on this host cannot use it.

        Args:
            uuid: the machine's.
            content: the request.
            peer: the host that has to have made it.
            require_absent: raises where the machine is here.

        Raises:
            VtpmRefused: not to that host, not by that request, or it is not here to be given.
            VtpmFailed: the emulator or the disk refuses.
            ReceiptError: whoever asks is not believed.
            AttestationError: nor its platform.
        """
        asked, _ = letters.read(content, Request, self._trust(peer))
        self._for_us(asked)
        if asked.uuid != uuid:
            raise VtpmRefused(f"the request is for the vTPM of {asked.uuid}")
        with self._ledgers.locked(uuid) as file:
            if not file.ledger.concerns(asked.id):
                self._depart(asked, peer, file, require_absent)
            elif file.ledger.holding is not Holding.LEAVING:
                raise VtpmRefused(f"that request is settled: the vTPM is {file.ledger.holding.value}")
            elif self._remains(uuid):
                self._depart_again(asked, peer, file, require_absent)
            left = self._left(uuid, file)
            self._erase(uuid)
            self._beat("erased")
            return left.parcel

    def _depart(self, asked: Request, peer: str, file: LedgerFile, require_absent: Callable[[], None]) -> None:
        left = asked.until - self._clock().timestamp()
        if not 0 < left <= 3600 * (REQUEST_HOURS_MAX + 1):  # hosts' clocks differ; a key may not wait for ever
            raise VtpmRefused("the request has run out, or is for too long: let the destination make another")
        self._appraise(asked, peer)
        if asked.epoch > file.ledger.epoch:
            raise VtpmRefused(
                f"{peer} has seen epoch {asked.epoch} of the vTPM, and this host knows of {file.ledger.epoch}: "
                "what is here is an older state of it, or this host's ledger is"
            )
        require_absent()
        blobs = self._places.state_of(asked.uuid)
        self._beat("exported")
        off = all(blob.type is not Blob.VOLATILE for blob in blobs)
        nonce = secrets.token_bytes(32)
        passage = Passage(asked.id, asked.uuid, file.ledger.epoch + 1)
        proof = prove(blobs, self._places.keys, passage.quoted(nonce), off=off)
        identity, digest = parcel.identity_of(proof), parcel.digest_of(blobs)
        entry = file.ledger.depart(asked.id, peer, identity=identity, digest=digest, at=now())
        volatile = StateBlob(Blob.VOLATILE, 0, b"") if off else blobs[1]
        luggage = Luggage(
            nonce=nonce,
            identity=identity,
            permanent=blobs[0].data,
            permanent_flags=blobs[0].flags,
            volatile=volatile.data,
            volatile_flags=volatile.flags,
            proof=msgspec.msgpack.encode(proof),
        )
        wrapped = letters.pack(luggage, passage, asked.recipient)
        sent = self._say(Sent(letters.VERSION, asked.id, asked.uuid, peer, passage.epoch, wrapped))
        require_absent()  # it may have been started meanwhile
        self._keep(asked.uuid, LEFT, _Left(asked.id, sent, luggage))
        self._beat("left")
        file.write(entry)
        self._beat("leaving")
        log.info("vtpm", holding="leaving", vm=asked.uuid, epoch=passage.epoch, peer=peer, digest=digest[:16])

    def _depart_again(self, asked: Request, peer: str, file: LedgerFile, require_absent: Callable[[], None]) -> None:
        """This host ended before the vTPM was erased: no parcel was given, and its machine may have used it since."""
        require_absent()
        self._places.require_same(asked.uuid, self._left(asked.uuid, file).luggage.identity)
        self._write(file, Event.STAY, asked.uuid)
        self._depart(asked, peer, file, require_absent)

    def _left(self, uuid: str, file: LedgerFile) -> _Left:
        """What was given last, if that is what the ledger means.

        Raises:
            VtpmRefused: it is not.
        """
        left = self._read(uuid, LEFT, _Left)
        if not file.ledger.concerns(left.id):
            raise VtpmRefused("what has left in a file is not what the ledger says has left last")
        return left

    def _appraise(self, asked: Request, peer: str) -> None:
        """That the host is what it may be, and its TPM has vouched for the key."""
        demand = None if self._platform is None else self._platform.demands(peer)
        if self._platform is None or demand is None:
            return
        if demand.since is not None:  # the quote may be from before the last session, but of no earlier start
            demand = replace(demand, since=replace(demand.since, milliseconds=0))
        shown = asked.evidence or evidence.encode(Evidence("none"))
        if self._platform.appraise(peer, shown, asked.binding, demand).hpke_public != asked.recipient:
            raise VtpmRefused(f"the TPM of {peer} has not vouched for the key of its request")

    def settle(self, content: bytes) -> str:
        """Act on the destination's answer; the machine's UUID.

        Raises:
            VtpmRefused: it is of something else.
            VtpmFailed: the emulator or the disk refuses.
            ReceiptError: whoever answers is not believed.
        """
        answer, peer = letters.read(content, Answer, self._trust())
        self._for_us(answer)
        with self._ledgers.locked(answer.uuid) as file:
            if not file.ledger.concerns(answer.id) or file.ledger.entries[-1].peer != peer:
                raise VtpmRefused(f"the answer of {peer} is not about how the vTPM stands here")
            if answer.outcome == "withdrawn":
                self._take_back(answer.uuid, file)
                return answer.uuid
            last = file.ledger.entries[-1]
            if file.ledger.holding is Holding.LEAVING:
                luggage = self._left(answer.uuid, file).luggage
                if (answer.epoch, answer.digest) != (last.epoch, luggage.digest):
                    raise VtpmRefused("the answer is of another state of the vTPM than was given")
                said = parcel.read_proof(answer.proof)
                parcel.verify(said, Passage(answer.id, answer.uuid, answer.epoch).quoted(luggage.nonce))
                parcel.same(parcel.read_proof(luggage.proof), said)
                self._write(file, Event.GIVEN, answer.uuid)
                self._beat("gone")
            if file.ledger.holding is not Holding.GONE:
                raise VtpmRefused(
                    f"the vTPM stands as {file.ledger.holding.value} at this host, and {peer} says it has it"
                )
            remove(self._file(answer.uuid, LEFT))
            self._beat("copy removed")
        return answer.uuid

    def keep_here(self, uuid: str) -> None:
        """An operator knows that it will never come: let this host have it back.

        Raises:
            VtpmRefused: nothing of it has left in a file.
            VtpmFailed: the emulator or the disk refuses.
        """
        with self._ledgers.locked(uuid) as file:
            if file.ledger.holding not in (Holding.LEAVING, Holding.HERE) or not self._file(uuid, LEFT).exists():
                raise VtpmRefused("no vTPM of that machine has left in a file, and waits for its answer")
            self._left(uuid, file)
            self._take_back(uuid, file)

    def _take_back(self, uuid: str, file: LedgerFile) -> None:
        if file.ledger.holding is Holding.LEAVING:
            self._start(uuid, self._left(uuid, file).luggage)
            self._beat("taken back")
            self._write(file, Event.STAY, uuid)
            self._beat("here")
        if file.ledger.holding is not Holding.HERE:
            raise VtpmRefused(f"the vTPM is {file.ledger.holding.value}: it cannot be taken back")
        remove(self._file(uuid, LEFT))
        self._beat("copy removed")

    def _erase(self, uuid: str) -> None:
        self._places.emulator(uuid).end()
        remove(*self._places.files(uuid))

    # ---- both

    def _start(self, uuid: str, luggage: Luggage) -> None:
        """Let the emulator have it, once: what it has stored since is newer."""
        emulator = self._places.emulator(uuid)
        if not emulator.listens:
            raise VtpmFailed(
                f"no swtpm listens at {emulator.control}", "start the machine's, leave it uninitialised, and try again"
            )
        if self._remains(uuid):  # it was started before, or somebody has made another
            self._places.require_same(uuid, luggage.identity)
        else:
            emulator.load(luggage.blobs, off=luggage.off)
            emulator.start()
        flush(*self._places.files(uuid))

    def _remains(self, uuid: str) -> bool:
        """Whether there is a vTPM: one that runs, or its permanent state."""
        emulator = self._places.emulator(uuid)
        return (emulator.listens and emulator.running()) or self._places.files(uuid)[0].exists()

    def _write(self, file: LedgerFile, event: Event, uuid: str) -> None:
        entry, _ = file.ledger.follow(event, now())
        if entry is None:
            raise VtpmRefused(f"the vTPM is {file.ledger.holding.value}: {event.value} has no place there")
        file.write(entry)
        log.info("vtpm", holding=entry.holding, vm=uuid, epoch=entry.epoch, peer=entry.peer)

    def _for_us(self, body: Request | Sent | Answer) -> None:
        if body.to != self._identity.name:
            raise VtpmRefused(f"it is for {body.to}, and this host is {self._identity.name}")

    def _trust(self, name: str = "", *, pinned: bool = True) -> Trust:
        identity = self._identity
        return Trust(identity.ca, identity.crl, self._clock(), name, self._pins if pinned else frozenset())

    def _say(self, body: Request | Sent | Answer) -> bytes:
        identity = self._identity
        return letters.write(body, identity.signing_certificate.public_bytes(Encoding.DER), identity.signing_key)

    def _file(self, uuid: str, what: str) -> Path:
        return self._ledgers.file(uuid, what)

    def _keep(self, uuid: str, what: str, content: _Asked | _Left | Luggage) -> None:
        keep(self._file(uuid, what), msgspec.msgpack.encode(content))

    def _read(self, uuid: str, what: str, kind: type[_T]) -> _T:
        path = self._file(uuid, what)
        try:
            return msgspec.msgpack.decode(read_bounded(path, _KEPT_BYTES_MAX)[0], type=kind)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise VtpmFailed(f"{path} cannot be read: {error}", "keep it, and see to its owner and mode") from None

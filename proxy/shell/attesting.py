"""Both hosts show what they are, on a new control connection, before OFFER or RESUME (docs/attestation.md).

    source                                                destination
      │  challenge: session, nonce, what is wanted ───────────▶│
      │◀─────────── attested: evidence; nonce, what is wanted  │
      │  attested: evidence ──────────────────────────────────▶│
      │  offer, resume ───────────────────────────────────────▶│

Each is bound to this very connection by its exporter. To the peer every refusal looks alike.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Final

import structlog

from crypto.attestation.binding import Binding, Side
from crypto.attestation.limits import EVIDENCE_BYTES_MAX, NONCE_BYTES
from crypto.errors import AttestationError, AttestationMissing, TpmError
from crypto.keys import SessionId
from crypto.tls import PeerInfo
from proxy.attestation import Platform, Proved
from proxy.control import PROTOCOL_VERSION, Attested, Challenge, Message, Refuse, Wanted, printable
from proxy.errors import EXIT_AUTHENTICATION, EXIT_POLICY, PeerAborted, PeerRefused, PolicyRefused, ProtocolViolation
from proxy.limits import EVIDENCE_PART_BYTES_MAX
from proxy.shell.link import ControlLink

log = structlog.get_logger("korora.attestation")

Recipient = Callable[[str, str], bytes]
"""By session, in hexadecimal, and peer: see ``proxy.vtpm.Carriers``."""
REFUSAL: Final = "attestation failed"


async def begin(link: ControlLink, session: SessionId, peer: PeerInfo, platform: Platform | None) -> Proved:
    """Source: challenge the destination, and show it what it wants; what it has proved.

    Args:
        link: past its handshake.
        session: its id.
        peer: who has authenticated.
        platform: of this process; None: nothing is asked, and nothing shown.

    Raises:
        AttestationError: the destination is not what it has to be; it has been told that much.
        TpmError: this host cannot attest, or has no reference to judge by.
        PeerRefused, PolicyRefused: the destination has refused.
    """
    if platform is None:
        return Proved()
    demand = await asyncio.to_thread(platform.demands, peer.name)
    nonce = os.urandom(NONCE_BYTES)
    await link.send(Challenge(PROTOCOL_VERSION, session, nonce, None if demand is None else demand.wanted))
    exporter = link.tls.export_attestation(session)
    evidence, last = await _evidence(link)
    proved = Proved()
    if demand is not None:
        proved = await asyncio.to_thread(
            platform.appraise, peer.name, evidence, Binding(exporter, session, Side.DESTINATION, nonce), demand
        )
    if last.wanted is not None:
        await _show(link, platform, Binding(exporter, session, Side.SOURCE, _nonce(last.nonce)), last.wanted)
    _log(session, peer, proved)
    return proved


async def answer(
    link: ControlLink, peer: PeerInfo, message: Message, platform: Platform | None, recipient: Recipient | None = None
) -> tuple[Message, str]:
    """Destination: answer a challenge, if ``message`` is one, and challenge the source; it is told of a refusal.

    Args:
        link: past its handshake.
        peer: who has authenticated.
        message: its first one.
        platform: of this process; None: nothing is demanded, and nothing can be shown.
        recipient: makes the key that a vTPM is to be wrapped for, so that this host's TPM vouches for it.

    Returns:
        What comes after that, or ``message``; and what was proved.

    Raises:
        AttestationError: the source is not what it has to be, or has not asked.
        TpmError: this host cannot attest, or has no reference to judge by.
    """
    try:
        return await _answer(link, peer, message, platform, recipient)
    except (AttestationError, TpmError):
        await link.send(Refuse(EXIT_AUTHENTICATION, REFUSAL))
        raise


async def _answer(
    link: ControlLink, peer: PeerInfo, message: Message, platform: Platform | None, recipient: Recipient | None
) -> tuple[Message, str]:
    demand = None if platform is None else await asyncio.to_thread(platform.demands, peer.name)
    if not isinstance(message, Challenge):
        if demand is not None:
            raise AttestationMissing(f"{peer.name!r} does not attest, and here that is demanded")
        return message, ""
    if message.version != PROTOCOL_VERSION:
        raise PeerRefused(f"attestation of version {message.version}")
    session = SessionId(message.session)
    exporter = link.tls.export_attestation(session)
    nonce = os.urandom(NONCE_BYTES) if demand is not None else b""
    shown = b""
    if message.wanted is not None:
        if platform is None:
            raise AttestationMissing(f"{peer.name!r} demands attestation, and this host is not set up for it")
        key = b"" if recipient is None else await asyncio.to_thread(recipient, session.hex(), peer.name)
        binding = Binding(exporter, session, Side.DESTINATION, message.nonce, key)
        shown = await asyncio.to_thread(platform.attest, binding, message.wanted)
    await _send(link, shown, nonce, None if demand is None else demand.wanted)
    proved = Proved()
    if demand is not None and platform is not None:
        evidence, _ = await _evidence(link)
        binding = Binding(exporter, session, Side.SOURCE, nonce)
        proved = await asyncio.to_thread(platform.appraise, peer.name, evidence, binding, demand)
    _log(session, peer, proved)
    following = await link.receive()
    if getattr(following, "session", session) != session:
        raise ProtocolViolation("the peer has attested for another session")
    return following, proved.attested


async def _show(link: ControlLink, platform: Platform, binding: Binding, wanted: Wanted) -> None:
    await _send(link, await asyncio.to_thread(platform.attest, binding, wanted), b"", None)


async def _send(link: ControlLink, evidence: bytes, nonce: bytes, wanted: Wanted | None) -> None:
    """Evidence, in as many messages as it takes."""
    parts = [evidence[at : at + EVIDENCE_PART_BYTES_MAX] for at in range(0, len(evidence), EVIDENCE_PART_BYTES_MAX)]
    for part in parts[:-1]:
        await link.send(Attested(part, more=True))
    await link.send(Attested(parts[-1] if parts else b"", more=False, nonce=nonce, wanted=wanted))


async def _evidence(link: ControlLink) -> tuple[bytes, Attested]:
    """The peer's evidence, put together, and the last of its messages."""
    whole = bytearray()
    while True:
        try:
            message = await link.receive()
        except PeerAborted as abort:
            raise (PolicyRefused if abort.code == EXIT_POLICY else PeerRefused)(str(abort)) from None
        if isinstance(message, Refuse):
            kind = PolicyRefused if message.code == EXIT_POLICY else PeerRefused
            raise kind(f"the peer refused: {printable(message.reason)}")
        if not isinstance(message, Attested):
            raise ProtocolViolation(f"{type(message).__name__} instead of evidence")
        whole += message.part
        if len(whole) > EVIDENCE_BYTES_MAX:
            raise ProtocolViolation(f"evidence of over {EVIDENCE_BYTES_MAX} bytes")
        if not message.more:
            return bytes(whole), message
        if len(message.part) < EVIDENCE_PART_BYTES_MAX:
            raise ProtocolViolation("a part of evidence that is not full, and not the last")


def _nonce(nonce: bytes) -> bytes:
    if len(nonce) != NONCE_BYTES:
        raise ProtocolViolation(f"a challenge of {len(nonce)} bytes")
    return nonce


def _log(session: SessionId, peer: PeerInfo, proved: Proved) -> None:
    log.info("attested", session=session.hex()[:8], peer=peer.name, proved=proved.attested or "nothing was demanded")

"""The source's errand: it goes to the destination until both know how a hand-over ended; its session is over."""

import asyncio
import contextlib

from crypto.errors import CryptoError
from proxy.control import PROTOCOL_VERSION, Recover, Refuse, Word, printable
from proxy.errors import (
    ConfigurationError,
    PeerAborted,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    PeerVanished,
    PolicyRefused,
    ProtocolViolation,
    RelayError,
)
from proxy.handover.record import Record
from proxy.handover.table import State
from proxy.handover.words import event_of, word_of
from proxy.limits import (
    CONTROL_SECONDS_MAX,
    ERRAND_PAUSE_SECONDS_MAX,
    ERRAND_PAUSE_SECONDS_MIN,
    ERRAND_SECONDS_MAX,
    VISIT_SECONDS_MAX,
    WORDS_MAX,
)
from proxy.shell.contact import Contact
from proxy.shell.party import Party


async def visit(contact: Contact, party: Party, route: bytes = b"") -> None:
    """Go to the destination once; say where this side stands, and hear where it stands, until nothing is left to say.

    Args:
        contact: how it is reached.
        party: this side.
        route: to the process that had the session, as ``Contact.meet``.

    Raises:
        PeerUnreachable: it cannot be reached.
        RelayError, CryptoError: it is not who it was, does not answer, or refuses.
    """
    record = party.record
    said: list[Word] = []

    async def collect(state: State, why: str) -> None:
        said.append(word_of(state, why))

    party.say = collect
    link = await contact.meet(record.head.peer, route)
    try:
        async with asyncio.timeout(VISIT_SECONDS_MAX):
            word = word_of(party.handover.word or State.OPEN, record.why)
            await link.send(Recover(PROTOCOL_VERSION, bytes.fromhex(record.head.session), word.state, word.why))
            for _ in range(WORDS_MAX):
                answer = await link.receive()
                if isinstance(answer, Refuse):
                    raise PeerRefused(f"the peer refused: {printable(answer.reason)}")
                if not isinstance(answer, Word):
                    raise ProtocolViolation(f"{type(answer).__name__} instead of a word about the hand-over")
                said.clear()
                event = event_of(answer)
                if event is not None:
                    await party.tell(event, printable(answer.why))
                party.peer_stands = answer.state
                if not said or (party.decided and party.peer_agrees):
                    break
                await link.send(said[-1])
    except TimeoutError:
        raise PeerUnreachable(f"the peer did not answer in {VISIT_SECONDS_MAX:.0f} s") from None
    finally:
        with contextlib.suppress(RelayError, CryptoError, OSError):
            await link.close()


async def _visit_whoever_has_it(contact: Contact, party: Party) -> None:
    """The process that had the session may still have it, and nobody else there can act then; or it may be gone.

    Raises:
        RelayError, CryptoError: see ``visit``.
    """
    route = bytes.fromhex(party.record.head.route)
    if route:
        party.peer_stands = ""
        with contextlib.suppress(PeerVanished, PeerLost):  # there is no such process any more
            await visit(contact, party, route)
            if party.peer_stands != "busy":
                return
    await visit(contact, party)


async def peek(contact: Contact, record: Record) -> str:
    """Ask a destination where it stands, and change nothing.

    Raises:
        RelayError, CryptoError: it cannot be asked, or refuses.
    """
    link = await contact.meet(record.head.peer)
    try:
        async with asyncio.timeout(CONTROL_SECONDS_MAX):
            await link.send(Recover(PROTOCOL_VERSION, bytes.fromhex(record.head.session), "asked"))
            answer = await link.receive()
    except TimeoutError:
        raise PeerUnreachable("the peer did not answer in time") from None
    finally:
        with contextlib.suppress(RelayError, CryptoError, OSError):
            await link.close()
    if isinstance(answer, Refuse):
        raise PeerRefused(f"the peer refused: {printable(answer.reason)}")
    if not isinstance(answer, Word):
        raise ProtocolViolation(f"{type(answer).__name__} instead of a word about the hand-over")
    return f"{answer.state}: {printable(answer.why)}" if answer.why else answer.state


async def run_errand(contact: Contact, party: Party, *, seconds: float | None = None) -> None:
    """Visit the destination until it is decided and both know, or ``seconds`` have passed.

    Args:
        contact: how it is reached.
        party: this side.
        seconds: None for as long as it takes to decide, and ``ERRAND_SECONDS_MAX`` more for the destination to know.
    """
    loop = asyncio.get_running_loop()
    deadline = None if seconds is None else loop.time() + seconds
    pause = ERRAND_PAUSE_SECONDS_MIN
    while not (party.decided and party.peer_agrees):
        if deadline is None and party.decided:
            deadline = loop.time() + ERRAND_SECONDS_MAX
        try:
            await _visit_whoever_has_it(contact, party)
        except (ConfigurationError, ProtocolViolation, PolicyRefused, PeerRefused, PeerAborted) as error:
            party.log.warning("the destination does not go on with the hand-over", reason=str(error))
        except (RelayError, CryptoError) as error:
            party.log.warning("the destination cannot be asked about the hand-over", reason=str(error))
        else:
            if party.decided and party.peer_agrees:
                break
        if deadline is not None and loop.time() + pause > deadline:
            return
        await _pause(party, pause)
        pause = min(2 * pause, ERRAND_PAUSE_SECONDS_MAX)


async def _pause(party: Party, seconds: float) -> None:
    """Wait before the next visit; an operator who decides meanwhile has news for the destination."""
    decided = party.decided
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while party.decided is decided:
                await party.changed.wait()

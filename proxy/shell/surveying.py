"""Before a machine goes: both hosts say what they are, and each judges the other (docs/preflight.md).

In a session the facts go along with OFFER and ACCEPT, after both hosts have attested where that is demanded, and before
a byte of the machine. By hand they go in SURVEY and its answer, which begin nothing (``proxy.shell.visits``).
"""

import asyncio
import time

import msgspec
import structlog

from proxy.control import PROTOCOL_VERSION, Refuse, Survey, Surveyed, printable
from proxy.errors import EXIT_POLICY, PeerAborted, PeerRefused, PolicyRefused, PreflightFailed, ProtocolViolation
from proxy.preflight import HostFacts, Surveyor
from proxy.report import SessionReport
from proxy.shell.link import ControlLink

log = structlog.get_logger("korora.preflight")


class Preflight:
    """One session's: this host is read in a thread while the peer is reached.

    Args:
        surveyor: of this process; None: nothing is shown, and nothing judged.
        report: has what was found.
        departing: whether the machine leaves this host.
    """

    def __init__(self, surveyor: Surveyor | None, report: SessionReport, *, departing: bool) -> None:
        self._surveyor, self._report, self._departing = surveyor, report, departing
        loop = asyncio.get_running_loop()
        self._reading = None if surveyor is None else loop.run_in_executor(None, surveyor.facts)
        self._said_at = 0.0

    async def facts(self) -> HostFacts | None:
        """What this host says of itself now."""
        if self._surveyor is None or self._reading is None:
            return None
        said = self._surveyor.stamped(await self._reading)
        self._said_at = time.monotonic()  # a loop's goes by its turns: two hosts' clocks are compared by this
        return said

    def judge(self, own: HostFacts | None, theirs: HostFacts | None, *, waited: bool = False) -> None:
        """What the peer says of its host.

        Args:
            own: what this one has said, or would.
            theirs: None where the peer says nothing.
            waited: whether it was said in answer to ``facts``.

        Raises:
            PreflightFailed: the machine is not to go.
        """
        if self._surveyor is None or own is None:
            return
        waited_seconds = time.monotonic() - self._said_at if waited else 0.0
        now = self._surveyor.stamped(own)
        # Theirs was said at some moment since ours was: the middle of both is the best guess of when.
        middle = now.clock_ms - round(waited_seconds * 500)
        try:
            found = self._surveyor.judge(
                _at(now, middle), theirs, departing=self._departing, waited_seconds=waited_seconds
            )
        except PreflightFailed as refusal:
            self._report.preflight = list(refusal.findings)
            raise
        self._report.preflight = list(found)
        for finding in found:
            log.warning(
                "preflight",
                session=self._report.session_id[:8],
                peer=self._report.peer,
                check=finding.check,
                says=finding.says,
                remedy=finding.remedy,
            )


def told(refusal: Exception) -> str:
    """What the peer hears of a refusal: with what can be done about it, where it may be the peer's to do."""
    words = f"{refusal}; {refusal.remedy}" if isinstance(refusal, PreflightFailed) and refusal.remedy else str(refusal)
    return printable(words)


async def ask(link: ControlLink, surveyor: Surveyor, egress: str, need_bytes: int) -> tuple[HostFacts, Surveyed, float]:
    """Source, by hand: what the destination says of itself, and has found.

    Args:
        link: authenticated, and attested where that is demanded.
        surveyor: of this process.
        egress: the name of the one that a machine would go to.
        need_bytes: the machine's memory; -1 where that is not known.

    Returns:
        What this host has said of itself at the middle of the exchange, the answer, and how many seconds that took.

    Raises:
        PeerRefused, PolicyRefused: the destination does not answer.
        ProtocolViolation: it answers something else.
    """
    own = surveyor.stamped(await asyncio.to_thread(surveyor.facts, thorough=True))
    began = time.monotonic()
    await link.send(Survey(PROTOCOL_VERSION, egress, own, need_bytes))
    try:
        answer = await link.receive()
    except PeerAborted as abort:
        raise (PolicyRefused if abort.code == EXIT_POLICY else PeerRefused)(str(abort)) from None
    waited_seconds = time.monotonic() - began
    match answer:
        case Surveyed():
            return _at(own, own.clock_ms + round(waited_seconds * 500)), answer, waited_seconds
        case Refuse(code, reason):
            kind = PolicyRefused if code == EXIT_POLICY else PeerRefused
            raise kind(f"the peer refused: {printable(reason)}")
    raise ProtocolViolation(f"{type(answer).__name__} instead of an answer to SURVEY")


def _at(facts: HostFacts, clock_ms: int) -> HostFacts:
    """The same, said at another time."""
    return msgspec.structs.replace(facts, clock_ms=max(0, clock_ms))

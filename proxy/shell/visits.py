"""A source comes to a destination without a session: about a hand-over that is left, or to survey the host."""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import structlog

from crypto.errors import CryptoError
from crypto.tls import PeerInfo
from proxy.control import PROTOCOL_VERSION, Message, Recover, Refuse, Survey, Surveyed, printable
from proxy.errors import EXIT_AUTHENTICATION, EXIT_POLICY, PolicyRefused, RelayError
from proxy.limits import FINDINGS_MAX, SURVEY_SECONDS_MAX, VISITS_MAX
from proxy.preflight import Finding
from proxy.shell.link import ControlLink
from proxy.shell.posting import talk
from proxy.shell.terms import Terms

log = structlog.get_logger("korora.preflight")


class Visits:
    """Those that are under way; a peer that comes without end is sent away."""

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()

    async def receive(
        self, link: ControlLink, peer: PeerInfo, message: Recover | Survey, terms: Terms, egresses: Collection[str]
    ) -> None:
        """Talk to a visitor until it takes its leave.

        Args:
            link: authenticated, and attested where a survey demands that; closed at the end.
            peer: who comes.
            message: what it says first.
            terms: of now.
            egresses: names of those there are.
        """
        if self._under_way[peer.name] >= VISITS_MAX:
            with suppress(RelayError, CryptoError):
                await link.send(Refuse(EXIT_POLICY, f"{VISITS_MAX} visits of this host are under way: come later"))
            await link.close()
            return
        with self._counted(peer.name):
            if isinstance(message, Recover):
                await talk(link, terms.handovers, peer.name, message)
            else:
                await _survey(link, peer, message, terms, egresses)

    @contextmanager
    def _counted(self, peer: str) -> Iterator[None]:
        self._under_way[peer] += 1
        try:
            yield
        finally:
            self._under_way[peer] -= 1


async def _survey(link: ControlLink, peer: PeerInfo, survey: Survey, terms: Terms, egresses: Collection[str]) -> None:
    log.info("surveyed", peer=peer.name, egress=survey.egress)
    try:
        async with asyncio.timeout(SURVEY_SECONDS_MAX):
            await link.send(await _answer(peer, survey, terms, egresses))
    except (RelayError, CryptoError, TimeoutError) as error:
        log.warning("a survey was not answered", peer=peer.name, reason=str(error) or "it took too long")
    finally:
        await link.close()


async def _answer(peer: PeerInfo, survey: Survey, terms: Terms, egresses: Collection[str]) -> Message:
    surveyor = terms.surveyor
    if survey.version != PROTOCOL_VERSION:
        return Refuse(EXIT_AUTHENTICATION, f"protocol version {survey.version}, this relay speaks {PROTOCOL_VERSION}")
    if surveyor is None:
        return Refuse(EXIT_POLICY, "preflight is turned off at this host")
    try:
        if survey.egress not in egresses:
            raise PolicyRefused(f"there is no egress {survey.egress!r} here")
        terms.allow(peer, survey.egress)
    except PolicyRefused as refusal:
        # Who may not send here learns no more than it would by an offer.
        remedy = "name another egress, or let the destination's configuration allow it"
        return Surveyed(None, (Finding("egress", "failed", printable(str(refusal)), remedy),))
    own = surveyor.stamped(await asyncio.to_thread(surveyor.facts, thorough=True))
    found = surveyor.survey(own, survey.host, departing=False, need_bytes=survey.need_bytes)
    may = Finding("egress", "ok", f"{peer.name} may use the egress {survey.egress!r}")
    return Surveyed(own, (may, *found)[:FINDINGS_MAX])

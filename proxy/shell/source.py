"""The source's end: takes the local hypervisor's connections and makes sessions of them."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import structlog

from crypto.keys import SESSION_ID_BYTES, SessionId, Suite, segment_name
from crypto.tls import PeerInfo, TlsConfig
from proxy.attestation import Proved
from proxy.authority import Authority, Point, Question
from proxy.control import Accept, Evidence, LogHead
from proxy.endpoints.base import Connection, Ingress
from proxy.errors import PeerRefused, PolicyRefused, exit_code_of
from proxy.hypervisors.qmp import QemuMonitor
from proxy.limits import QMP_KEEP_SECONDS
from proxy.preflight import HostFacts, Surveyor
from proxy.report import SessionReport
from proxy.session import Role, Session
from proxy.shell.contact import Contact, Peer
from proxy.shell.departure import SourceRunner
from proxy.shell.handovers import Handovers
from proxy.shell.oversight import Oversight
from proxy.shell.posting import guard_departure
from proxy.shell.qemu_keeper import QemuKeeper
from proxy.shell.stored import open_stored
from proxy.shell.surveying import Preflight
from proxy.wire import Codec
from proxy.witness import Notary, Witness

__all__ = ["Peer", "Source", "SourceRunner"]

log = structlog.get_logger("korora.handover")


class Source:
    """Makes sessions of the local hypervisor's connections.

    Args:
        tls: identity and rules for the peer; role CLIENT.
        where: the destination's relay.
        ingress: opened already.
        begun: told of each session as it opens.
        handovers: of this process; None to guard none.
        monitor: where the QEMU that migrates is asked; empty for none. It is prepared while nothing migrates.
        holder: the process that holds xl's pipes, if it is not this one.
        authority: who has a say; None: nobody.
        notary: who signs receipts; None: nobody.
    """

    def __init__(
        self,
        tls: TlsConfig,
        where: Peer,
        ingress: Ingress,
        begun: Callable[[SourceRunner], None] | None = None,
        *,
        handovers: Handovers | None = None,
        monitor: str = "",
        holder: str = "",
        authority: Authority | None = None,
        notary: Notary | None = None,
    ) -> None:
        self._ingress, self._begun = ingress, begun
        self._handovers, self._holder = handovers, holder
        self._authority, self._notary = authority, notary
        self.current: SourceRunner | None = None
        self._watch(monitor)
        self._contact = self._contact_with(tls, where)

    def _contact_with(self, tls: TlsConfig, where: Peer) -> Contact:
        """How the destination is reached; nothing is offered that could not be kept here."""
        guards = self._handovers is not None and (where.handover != "qmp" or bool(self._monitor))
        if self._handovers is None or not guards:
            return Contact(tls, replace(where, handover=""))
        return Contact(tls, replace(where, vtpm=self._handovers.carries(where.handover)))

    def _watch(self, monitor: str) -> None:
        self._monitor = monitor
        guards = self._handovers is not None and monitor
        self._keeper = QemuKeeper(QemuMonitor(Path(monitor))) if guards else None

    async def ready(self) -> None:
        """Prepare the local QEMU, if there is one to be asked: a migration that begins unprepared is refused."""
        if self._keeper is not None:
            await self._keeper.prepare()

    async def accept(self) -> Connection:
        """The ingress's next connection; the local QEMU is kept prepared meanwhile.

        Raises:
            HypervisorFailed: see ``Ingress.accept``.
        """
        keeping = asyncio.create_task(self._keep())
        try:
            return await self._ingress.accept()
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            await self.ready()
            await asyncio.sleep(QMP_KEEP_SECONDS)

    def reconfigure(self, tls: TlsConfig, where: Peer, monitor: str = "") -> None:
        """Another identity, other rules, address or monitor from the next contact on; an open session goes on."""
        if monitor != self._monitor:
            self._watch(monitor)
        self._contact = self._contact_with(tls, where)

    async def session(self, first: Connection, report: SessionReport) -> None:
        """One whole session, begun by the hypervisor's connection ``first``.

        Raises:
            RelayError, CryptoError: what ended it; the hypervisor has been told.
        """
        try:
            runner = await self._greet(first, report)
        except BaseException:
            await first.abort()
            raise
        self.current = runner
        if self._begun is not None:
            self._begun(runner)
        try:
            await runner.run()
        finally:
            self.current = None

    def new_report(self) -> SessionReport:
        """A report with a fresh session id."""
        session_id = self._contact.where.random(SESSION_ID_BYTES).hex()
        report = SessionReport(role=Role.SOURCE.value, session_id=session_id, started=datetime.now(UTC))
        report.peer_address = self._contact.where.address
        return report

    async def _greet(self, first: Connection, report: SessionReport) -> SourceRunner:
        """TCP, TLS, OFFER and its answer, as far as those who have a say here allow it."""
        session = Session(Role.SOURCE, SessionId(bytes.fromhex(report.session_id)))
        where = self._contact.where
        oversight = Oversight(
            self._authority,
            Question(
                point=Point.OFFER,
                role=Role.SOURCE,
                session=report.session_id,
                peer="",
                pin="",
                egress=where.egress,
                tenant=where.paging.tenant,
                user=first.user,
                guarded=bool(where.handover),
            ),
            report,
        )

        try:
            return await self._open(first, session, report, _Introduction(oversight, self._notary, where.surveyor))
        except BaseException:
            oversight.end()
            raise

    async def _open(
        self,
        first: Connection,
        session: Session,
        report: SessionReport,
        introduction: "_Introduction",
    ) -> SourceRunner:
        """The session, agreed on and guarded."""
        began = asyncio.get_running_loop().time()
        meeting, accept = await self._contact.greet(session, introduction)
        report.peer, report.group = meeting.peer.name, meeting.peer.group
        report.cipher = Suite(accept.suite).label
        report.handshake_seconds = asyncio.get_running_loop().time() - began
        paging = self._contact.where.paging
        stored = None
        if accept.codec == Codec.PAGES:
            try:
                name = segment_name(meeting.link.tls.export(session.id), session.id)
                stored = await open_stored(paging, name, accept.segments, accept.cache_bytes)
            except BaseException:
                meeting.link.drop()
                raise
        runner = SourceRunner(
            session,
            report,
            meeting,
            accept,
            min(accept.resume_seconds, self._contact.where.resume_seconds),
            contact=lambda: self._contact,
            ingress=self._ingress,
            first=first,
            stored=stored,
        )
        oversight = introduction.oversight
        oversight.question = replace(oversight.question, guarded=bool(accept.handover))
        if introduction.proved.attested:
            runner.vouched = introduction.proved.hpke_public
        runner.testify(oversight, introduction.witness)
        if introduction.head is not None:
            runner.testimony.show(introduction.head)
        try:
            await self._guard(runner, accept, first)
        except BaseException as error:
            runner.discard()
            if isinstance(error, PolicyRefused):
                await meeting.link.abort(exit_code_of(error), str(error))
            meeting.link.drop()
            raise
        return runner

    async def _guard(self, runner: SourceRunner, accept: Accept, first: Connection) -> None:
        """Stand guard over the hand-over, if both ends can.

        Raises:
            PolicyRefused: they cannot, and have to.
            JournalError: it cannot be written down.
        """
        if accept.handover and self._handovers is not None:
            await guard_departure(
                runner,
                self._handovers,
                accept.handover,
                accept.route,
                contact=lambda: self._contact,
                monitor=self._monitor,
                holder=self._holder,
                first=first,
                vtpm=accept.vtpm,
            )
            return
        if self._contact.where.guarded:
            raise PolicyRefused(
                "the destination does not guard the hand-over, and here it has to: name the QEMU's monitor (--qmp) at "
                "both ends"
            )
        log.info("handover: unguarded", session=runner.report.session_id[:8], peer=runner.peer.name)
        if self._keeper is not None:
            runner.beside = self._keeper.let_through


class _Introduction:
    """See ``contact.Introduction``: who has a say agrees, and the offer is signed.

    Args:
        oversight: of the session, whose peer is not known yet.
        notary: who signs; None: nobody.
        surveyor: of this host; None: it says nothing of itself, and does not judge.
    """

    def __init__(self, oversight: Oversight, notary: Notary | None, surveyor: Surveyor | None) -> None:
        self.oversight, self._notary = oversight, notary
        self._preflight = Preflight(surveyor, oversight.report, departing=True)
        self._host: HostFacts | None = None
        self.witness: Witness | None = None
        self.proved = Proved()
        self.head: LogHead | None = None
        """Of our log, for the destination to see."""

    async def admit(self, peer: PeerInfo, proved: Proved, own_leaf: bytes) -> Evidence | None:
        """See ``contact.Introduction``."""
        oversight = self.oversight
        oversight.report.peer = peer.name
        self.proved = proved
        oversight.report.attested = proved.attested or None
        oversight.question = replace(
            oversight.question,
            peer=peer.name,
            pin=peer.spki_sha256.hex(),
            attested=proved.attested,
            own=own_leaf.hex(),
        )
        if self._notary is not None:
            self.witness = self._notary.begin(oversight.question, oversight.report)
        await oversight.ask(Point.OFFER)
        return None if self.witness is None else await asyncio.to_thread(self.witness.offer)

    async def host(self) -> HostFacts | None:
        """See ``contact.Introduction``."""
        self._host = await self._preflight.facts()
        return self._host

    async def accepted(self, answer: Accept) -> None:
        """See ``contact.Introduction``."""
        self._preflight.judge(self._host, answer.host, waited=True)
        if self.witness is None:
            return
        if answer.evidence is None or answer.head is None:
            raise PeerRefused("the destination signs no receipts, and here that is wanted: update its relay")
        self.head = await asyncio.to_thread(self.witness.accepted, answer.evidence, answer.head)

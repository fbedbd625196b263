"""What `korora send` and `korora receive` share: identity, rules, signals, and how a session is accounted for."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import structlog
import uvloop

from chunking.limits import STORE_BYTES_DEFAULT
from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from korora import report as reports
from korora.authority import APPROVALS, Office
from korora.custody import Custody, note_policy
from korora.errors import complain, line_of
from korora.handovers import reach
from korora.host_store import open_host_store
from korora.memory import affordable, give_back_soon, prepare
from korora.notary import Notary
from korora.policy.board import Board
from korora.policy.desk import Desk
from korora.policy.file import PolicyFile
from proxy.attestation import Platform
from proxy.endpoints.base import Egress, Ingress
from proxy.endpoints.pipes import StdioEndpoint
from proxy.errors import EXIT_BUG, EXIT_DONE, ConfigurationError, Interrupted, exit_code_of
from proxy.handover.record import Record
from proxy.paging import PagingTerms
from proxy.preflight import Surveyor
from proxy.report import SessionReport
from proxy.shell.handovers import Reach

log = structlog.get_logger("korora")


@dataclass(frozen=True, slots=True)
class Common:
    """What both commands are told."""

    identity: Path
    rules: PeerRules
    once: bool
    report: Path | None
    resume_seconds: int
    state: Path | None = None
    """What is kept between sessions; None: ``state`` in the identity's folder."""
    store_bytes: int = STORE_BYTES_DEFAULT
    """Of the content store; 0 for none."""
    policy: Path | None = None
    """Who may migrate what; None: whoever has authenticated, everything."""
    approvals: str | None = None
    """Path of the socket by which people approve."""

    attestation: Path | None = None
    """The folder of what peers' platforms may be; None: nothing is demanded of them."""
    tpm: str = ""
    """TCTI of this host's TPM; empty for none."""
    preflight: Literal["on", "off", "strict"] = "on"
    """Whether both hosts are looked at before each session; strict: warnings refuse, too."""

    def surveyor(self) -> Surveyor | None:
        """What knows this host, and judges others; None where preflight is off."""
        if self.preflight == "off":
            return None
        from korora.preflight.agent import open_surveyor

        return open_surveyor(self.preflight, self.state_folder, self.tpm)

    def platform(self) -> Platform | None:
        """What this host shows of itself and demands of others; None for neither.

        Raises:
            ReferenceInvalid: there is no such folder.
        """
        if self.attestation is None and not self.tpm:
            return None
        from korora.platform import open_platform

        return open_platform(self.tpm, self.attestation, state=self.state_folder)

    @property
    def state_folder(self) -> Path:
        """Where this relay keeps what outlives its sessions."""
        return self.state or self.identity / "state"

    def reach(self) -> Reach:
        """How peers of earlier sessions are reached: by the rules of today's."""
        return reach(self.identity, self.rules)


def run_loop(work: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a command on an event loop of its own; its exit code."""
    prepare()

    async def inside() -> int:
        return await work()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(inside())


def check_streams(endpoint: Egress | Ingress) -> None:
    """`stdio:` with a closed stream would write a migration nowhere, or read an empty one.

    Raises:
        ConfigurationError: standard input or output was closed when the process began.
    """
    if isinstance(endpoint, StdioEndpoint):
        for name, stream in (("standard input", sys.stdin), ("standard output", sys.stdout)):
            if stream is None:
                raise ConfigurationError(f"{endpoint.label}: {name} is closed", "give it a pipe, a file or /dev/null")


@contextmanager
def paging_terms(common: Common, paging: PagingTerms) -> Iterator[PagingTerms]:
    """The terms with the content store, while it is open."""
    host_store = open_host_store(common.state_folder, common.store_bytes) if paging.wanted and paging.tenant else None
    try:
        yield replace(paging, store=host_store, cache_bytes=affordable(paging.cache_bytes))
    finally:
        if host_store is not None:
            host_store.close()


@asynccontextmanager
async def open_office(common: Common, tls: TlsConfig) -> AsyncIterator[Office]:
    """Whoever has a say, while a command runs: the policy is read again on SIGHUP, and a bad one changes nothing.

    Raises:
        ConfigurationError: the policy is bad, or the socket for approvals cannot be listened on.
    """
    policy = PolicyFile(common.policy)
    note_policy(common.state_folder, policy)
    office = Office(tls.identity.name, policy, common.state_folder)

    def reload() -> None:
        with suppress(ConfigurationError):  # it has said so
            policy.reload()
            office.reload(policy)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reload)
    desk = None
    if common.approvals is not None:
        desk = Desk(common.approvals, Board(common.state_folder / APPROVALS))
        await desk.start()
    try:
        yield office
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        if desk is not None:
            await desk.close()


def on_record(notary: Notary | None, custody: Custody) -> Callable[[Record], None]:
    """What puts the end of a hand-over on record whose session is over."""

    def settled(record: Record) -> None:
        if notary is not None and not notary.knows(record):
            # A thread has it when this returns, and the loop's end waits for threads.
            asyncio.get_running_loop().run_in_executor(None, notary.settled, record, custody.acts(record))

    return settled


def tls_config(common: Common, role: TlsRole) -> TlsConfig:
    return TlsConfig(Identity.load(common.identity, now=datetime.now(UTC)), role, common.rules)


def announce_ready(*, stdio: bool) -> None:
    """The first and only line of standard output, once work can be taken.

    Raises:
        ConfigurationError: nobody can read it.
    """
    try:
        print("ready", file=sys.stderr if stdio else sys.stdout, flush=True)
    except OSError as error:
        # What could not be written is tried again when Python ends, and would fail there once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise ConfigurationError(
            f"cannot write to standard output: {error.strerror}", "give it a file, /dev/null or a pipe that is read"
        ) from None


class Stopper:
    """Turns SIGINT and SIGTERM into one orderly stop."""

    def __init__(self, stop: Callable[[Interrupted], None]) -> None:
        self.reason: Interrupted | None = None
        self._stop = stop
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: int) -> None:
        if self.reason is None:
            self.reason = Interrupted(number)
            self._stop(self.reason)


async def account(
    work: Coroutine[Any, Any, None], report: SessionReport, path: Path | None, notary: Notary | None = None
) -> int:
    """Run a session to its end, write its report, sign how it ended, say so in one line; return its exit code."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    code, words = EXIT_DONE, None
    try:
        await work
    except Exception as error:
        code, words = exit_code_of(error), line_of(error)
        if code == EXIT_BUG:
            log.debug("internal error", exc_info=error)
    report.ended = datetime.now(UTC)
    report.seconds = round(loop.time() - began, 6)
    reports.conclude(report, code, words)
    if notary is not None:
        await asyncio.to_thread(notary.ended, report)
    if path is not None:
        await asyncio.to_thread(write_report, path, report)
    facts = {
        "session": report.session_id[:8],
        "peer": report.peer,
        "seconds": round(report.seconds, 3),
        "bytes_forward": report.bytes_in["forward"],
        "bytes_backward": report.bytes_in["backward"],
    }
    if words is not None:
        log.info("session failed", exit_code=code, outcome=report.outcome, **facts)
        print(words, file=sys.stderr, flush=True)  # noqa: T201 - for people
    else:
        log.info("session done", **facts, cipher=report.cipher, group=report.group)
    give_back_soon()
    return code


def write_report(path: Path, report: SessionReport) -> None:
    """Write the report; where that fails the session still ended as it did, so its exit code stands."""
    try:
        reports.write(path, report)
    except OSError as error:
        complain(ConfigurationError(f"cannot write the report {path}: {error.strerror or error}", "free space there"))

"""Migrations that wait for people: a file for each beside the journal, and one for each person's answer to it.

    who waits (any process of the relay)        who asks people (a server at a socket)
    SESSION-SIDE.wanted, locked, fsynced
                                                lists it, as long as it is locked
                                                SESSION-SIDE.UID.answer, fsynced, renamed into place
    reads it; has enough answers, or a no
    removes them all

The lock goes with the process: what nobody waits for any more is not listed and cannot be approved. An answer counts
for exactly what was shown: it names the digest of the request's file. Who may answer is checked by both ends; the
folder is the relay's alone, mode 0700. The kernel says which uid is at a socket (``korora.policy.desk``).
"""

import asyncio
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import msgspec
import structlog
from msgspec import Meta

from crypto.files import fsync_directory, make_private_directory, read_bounded, write_private
from korora.policy.names import spelled
from korora.policy.rules import UID_MAX, Approvals
from proxy.authority import Question
from proxy.errors import ConfigurationError, PolicyRefused
from proxy.limits import KIB
from proxy.session import Role

log = structlog.get_logger("korora.policy")

POLL_SECONDS: Final = 0.25  # between looks for answers: people take seconds to type
REQUEST_BYTES_MAX: Final = 16 * KIB  # of a request's file: a machine's name may take a quarter of it, the rest is short
ANSWER_BYTES_MAX: Final = KIB
WAITING_MAX: Final = 1024  # migrations that wait at once: as many as may arrive
WORDS_CHARACTERS_MAX: Final = 4096  # a machine's name as people are shown it: each character may be an escape of ten
_OF_OTHERS: Final = 0o077
_WANTED: Final = ".wanted"
_ANSWER: Final = ".answer"
_SESSION: Final = r"^[0-9a-f]{16,64}\Z"

Session = Annotated[str, Meta(pattern=_SESSION)]
Words = Annotated[str, Meta(max_length=WORDS_CHARACTERS_MAX)]
Uid = Annotated[int, Meta(ge=0, le=UID_MAX)]


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person approves of.

    Attributes:
        side: this host's part in it.
        vm: the machine's name as its stream tells it, spelled in ASCII; empty where it tells none.
        uuid: the same; empty where it tells none.
        source, destination: NAMEs of the two hosts.
        egress, tenant: see ``proxy.authority.Question``.
        rule: of the policy, that wants approvals.
    """

    side: Literal["source", "destination"]
    vm: Words
    uuid: Words
    source: Words
    destination: Words
    egress: Words
    tenant: Words
    rule: Words

    @classmethod
    def of(cls, question: Question, rule: str, here: str) -> Self:
        """What people are to know of a question.

        Args:
            question: from the identity on.
            rule: that wants approvals.
            here: NAME of this host.
        """
        leaves = question.role is Role.SOURCE
        vm = question.vm
        return cls(
            side="source" if leaves else "destination",
            vm=spelled(vm.name) if vm is not None else "",
            uuid=spelled(vm.uuid) if vm is not None else "",
            source=here if leaves else question.peer,
            destination=question.peer if leaves else here,
            egress=spelled(question.egress),
            tenant=spelled(question.tenant),
            rule=rule,
        )


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A migration that waits.

    Attributes:
        session: its id, in hexadecimal.
        facts: what it is about.
        count: how many people have to approve of it.
        users: their uids are among these.
        initiator: the uid that began it on this host, which cannot approve of it; None where that cannot be told.
        since: when it began to wait, in seconds since 1970.
        seconds: how long it waits.
    """

    session: Session
    facts: Facts
    count: Annotated[int, Meta(ge=1, le=64)]
    users: tuple[Uid, ...]
    initiator: Uid | None
    since: float
    seconds: int
    version: Literal[1] = 1

    @property
    def key(self) -> str:
        """What its files are called by: a machine may leave this host and arrive at it in one session."""
        return f"{self.session}-{self.facts.side}"

    def refusal(self, uid: int) -> str | None:
        """Why that user's answer would not count; None if it would."""
        if uid == self.initiator:
            return f"user {uid} began it, and somebody else has to approve of it"
        if uid not in self.users:
            return f"user {uid} is not among its approvers"
        return None


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One person's."""

    approved: bool
    digest: str
    """Of the request's file, as he was shown it."""


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it stands.

    Attributes:
        digest: BLAKE2b-256 of its file, in hexadecimal.
        approvers: the uids that have approved so far.
    """

    request: Request
    digest: str
    approvers: tuple[int, ...]


class Wanted:
    """A request of this process; ``Board.wanted`` makes one. Its ``close`` removes all of it."""

    def __init__(self, folder: Path, request: Request, digest: str, descriptor: int) -> None:
        self._folder, self.request, self._digest, self._descriptor = folder, request, digest, descriptor

    def granted(self) -> tuple[int, ...]:
        """The uids that have approved, in the order they did.

        Raises:
            PolicyRefused: somebody said no.
        """
        found = _answers(self._folder, self.request, self._digest)
        refused = [uid for uid, approved in found if not approved]
        if refused:
            rule = self.request.facts.rule
            raise PolicyRefused(f"user {refused[0]} does not approve of it, as the rule {rule} wants", rule)
        return tuple(uid for uid, _ in found)

    async def enough(self) -> tuple[int, ...]:
        """Wait for as many as are wanted; their uids, in the order they approved.

        Raises:
            PolicyRefused: somebody said no, or they were not enough in time.
        """
        request = self.request
        approvers: tuple[int, ...] = ()
        try:
            async with asyncio.timeout(request.seconds):
                while True:
                    approvers = await asyncio.to_thread(self.granted)
                    if len(approvers) >= request.count:
                        return approvers
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise PolicyRefused(
                f"the rule {request.facts.rule} wants {request.count} to approve,"
                f" and {len(approvers)} did within {request.seconds} seconds",
                request.facts.rule,
            ) from None

    def close(self) -> None:
        """It waits no more: what it was answered goes too."""
        if self._descriptor < 0:
            return
        try:
            _take_down(self._folder / f"{self.request.key}{_WANTED}", self._descriptor)
        except OSError as error:
            log.warning("a request for approval cannot be removed", session=self.request.session, reason=error.strerror)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@asynccontextmanager
async def put_up(
    folder: Path, session: str, facts: Facts, approvals: Approvals, initiator: int | None
) -> AsyncIterator[Wanted]:
    """Have a request up meanwhile, on the board in that folder; the loop does not wait for its disk.

    Args:
        folder: see ``Board``.
        session, facts, approvals, initiator: see ``Board.wanted``.

    Raises:
        ConfigurationError, PolicyRefused: as ``Board`` and ``Board.wanted``.
    """

    def put() -> Wanted:
        return Board(folder).wanted(session, facts, approvals, initiator)

    putting = asyncio.ensure_future(asyncio.to_thread(put))
    try:
        wanted = await asyncio.shield(putting)
    except asyncio.CancelledError:
        putting.add_done_callback(_taken_back)
        await asyncio.wait({putting})  # a thread cannot be called back: what it puts up is taken down again
        raise
    with wanted:
        yield wanted


def _taken_back(putting: "asyncio.Future[Wanted]") -> None:
    """Who wanted it has gone before it was up."""
    if not putting.cancelled() and putting.exception() is None:
        putting.result().close()


class Board:
    """What waits for people, in a folder that all processes of a relay share.

    Args:
        folder: made with mode 0700 if it is not there.

    Raises:
        ConfigurationError: it cannot be made, or is not its owner's alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            make_private_directory(folder)
            mode = stat.S_IMODE(folder.stat().st_mode)
        except OSError as error:
            raise ConfigurationError(
                f"{folder}: cannot be made: {error.strerror}", "give a state directory that may be written"
            ) from None
        if mode & _OF_OTHERS:
            raise ConfigurationError(f"{folder}: others could put approvals there", "chmod 700 it")

    def wanted(self, session: str, facts: Facts, approvals: Approvals, initiator: int | None) -> Wanted:
        """Put a request up; its closing takes it down, and so does this process's end.

        Args:
            session: its id, in hexadecimal.
            facts: what people are shown.
            approvals: who has to agree, and how long ``Wanted.enough`` waits.
            initiator: the uid that began it, which may not; None where that cannot be told.

        Raises:
            PolicyRefused: it cannot be put up: without it nobody can approve.
        """
        request = Request(
            session=session,
            facts=facts,
            count=approvals.count,
            users=approvals.users,
            initiator=initiator,
            since=time.time(),
            seconds=approvals.seconds,
        )
        content = msgspec.json.encode(request)
        try:
            _decoded(content)  # what nobody could read later is not put up
            descriptor = self._put(request.key, content)
        except OSError as error:
            raise PolicyRefused(f"approvals cannot be asked for: {self.folder}: {error.strerror}", facts.rule) from None
        except ValueError as error:
            raise PolicyRefused(f"approvals cannot be asked for: {error}", facts.rule) from None
        log.warning(
            "a migration waits for approval",
            session=session,
            vm=facts.vm,
            uuid=facts.uuid,
            rule=facts.rule,
            count=approvals.count,
            seconds=approvals.seconds,
        )
        return Wanted(self.folder, request, _digest(content), descriptor)

    def _put(self, key: str, content: bytes) -> int:
        """Write and lock a request's file before it can be found; the answers to an earlier one go first."""
        if len(self.waiting()) >= WAITING_MAX:
            raise ValueError(f"{WAITING_MAX} migrations wait already")
        for stale in self.folder.glob(f"{key}.*{_ANSWER}"):
            stale.unlink(missing_ok=True)
        path = self.folder / f"{key}{_WANTED}"
        fresh = self.folder / f".{key}.{os.getpid()}.tmp"
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, content)
            os.fsync(descriptor)
            fresh.rename(path)
            fsync_directory(self.folder)
        except BaseException:
            fresh.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return descriptor

    def waiting(self) -> list[Listed]:
        """All that somebody waits for, the longest first. Files whose process has gone are removed."""
        found = []
        for path in sorted(self.folder.glob(f"*{_WANTED}")):
            content = _living(path)
            if content is None:
                continue
            try:
                request = _decoded(content)
            except ValueError as error:
                log.warning("a request for approval is not understood", path=str(path), reason=str(error))
                continue
            digest = _digest(content)
            approvers = tuple(uid for uid, approved in _answers(self.folder, request, digest) if approved)
            found.append(Listed(request=request, digest=digest, approvers=approvers))
        return sorted(found, key=lambda listed: listed.request.since)

    def answer(self, session: str, side: str, digest: str, uid: int, *, approved: bool) -> Listed:
        """Write a person's answer down; it is on disk when this returns.

        Args:
            session, side: of the request.
            digest: of what he was shown.
            uid: who he is, as the kernel says.
            approved: yes or no.

        Raises:
            PolicyRefused: his answer does not count, or it is not this that waits.
        """
        listed = next(
            (each for each in self.waiting() if (each.request.session, each.request.facts.side) == (session, side)),
            None,
        )
        if listed is None:
            raise PolicyRefused(f"nothing waits for approval under {session[:8]}")
        refusal = listed.request.refusal(uid)
        if refusal is not None:
            log.warning("an approval is refused", session=session, uid=uid, reason=refusal)
            raise PolicyRefused(refusal)
        if digest != listed.digest:
            raise PolicyRefused("it is no longer what was shown")
        path = self.folder / f"{listed.request.key}.{uid}{_ANSWER}"
        try:
            write_private(path, msgspec.json.encode(Answer(approved, digest)))
        except OSError as error:
            raise PolicyRefused(f"the answer cannot be kept: {error.strerror}") from None
        log.warning("an answer about a migration", approved=approved, session=session, uid=uid)
        approvers = tuple(uid for uid, yes in _answers(self.folder, listed.request, digest) if yes)
        return Listed(request=listed.request, digest=digest, approvers=approvers)


def _answers(folder: Path, request: Request, digest: str) -> list[tuple[int, bool]]:
    """Who has answered what, in the order of their files' times; only those whose answers count."""
    found = []
    for uid in dict.fromkeys(request.users):
        if request.refusal(uid) is not None:
            continue
        path = folder / f"{request.key}.{uid}{_ANSWER}"
        try:
            content, _ = read_bounded(path, ANSWER_BYTES_MAX)
            answer = msgspec.json.decode(content, type=Answer)
            at = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.warning("an answer is not understood", path=str(path), reason=str(error))
            continue
        if answer.digest == digest:
            found.append((at, uid, answer.approved))
    return [(uid, approved) for _, uid, approved in sorted(found)]


def _living(path: Path) -> bytes | None:
    """A request's content, if its process still waits; else it is removed, with what it was answered."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        content = os.pread(descriptor, REQUEST_BYTES_MAX + 1, 0)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return content
        _take_down(path, descriptor)
    except OSError as error:
        log.warning("a request for approval cannot be read", path=str(path), reason=error.strerror)
    finally:
        os.close(descriptor)
    return None


def _take_down(path: Path, descriptor: int) -> None:
    """Remove the request that this descriptor is of, unless another has taken its place, and what it was answered."""
    try:
        there = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    if os.path.samestat(there, os.fstat(descriptor)):
        for answer in path.parent.glob(f"{path.name.removesuffix(_WANTED)}.*{_ANSWER}"):
            answer.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _decoded(content: bytes) -> Request:
    if len(content) > REQUEST_BYTES_MAX:
        raise ValueError(f"a request of more than {REQUEST_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(content, type=Request)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()

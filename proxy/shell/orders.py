"""An operator's word to whoever has a hand-over in hand: a file beside its journal, `SESSION-SIDE.order`.

Whoever acts on a hand-over holds its journal locked, for as long as its peer is away, so nobody else can act on an
operator's word. What is ordered is left beside the journal, by `korora handover resolve` wherever it runs, and found by
the lock's holder, whatever process that is: a daemon's worker, `korora xl`, a process that was left behind.

    operator                           holder
    SESSION-SIDE.order, locked
                                       renames it: it is taken, and can no more be withdrawn
                                       does it
                                       adds a line: what came of it
    reads that line

Whose word it is says the file's owner, whom the kernel knows: root's is left root's, for the relay's group to answer.
An order counts only as long as its giver waits for it, which the lock shows: what somebody ordered who went away is not
done hours later. One operator gives orders at a time, in all of a relay's state.
"""

import asyncio
import fcntl
import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from proxy.authority import Trustee
from proxy.errors import JournalBusy, JournalError, PolicyRefused, RelayError
from proxy.handover.record import Record
from proxy.handover.table import Event, Side
from proxy.limits import ORDER_BYTES_MAX, ORDER_POLL_SECONDS, REASON_CHARACTERS_MAX
from proxy.shell.journal import FRESH, Journal
from proxy.shell.party import Party

log = structlog.get_logger("korora.handover")

ORDERS: Final = (Event.RUN_HERE, Event.GIVE_UP)
WHY: Final = "an operator says so"
_SUFFIX: Final = ".order"


class _Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's first line."""

    decision: Literal["run_here", "give_up"]
    version: Literal[1] = 1


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Its second line: what came of it; ``trouble`` is empty if it was done."""

    trouble: str = ""
    rule: str = ""
    """Which refused it, if one did."""


# ------------------------------------------------------------------ who gives it


class Given:
    """An order that was left; ``give`` makes one.

    Args:
        path: where it is found.
        descriptor: of the file, locked for as long as the order counts.
        size: in bytes; the answer follows.
        folder: the journal's, locked for as long as no other order may be given.
    """

    def __init__(self, path: Path, descriptor: int, size: int, folder: int) -> None:
        self._path, self._descriptor, self._size, self._folder = path, descriptor, size, folder

    def answer(self) -> Answer | None:
        """What came of it; None while that is not known."""
        said = os.pread(self._descriptor, ORDER_BYTES_MAX, self._size)
        if not said.endswith(b"\n"):
            return None
        try:
            return msgspec.json.decode(said, type=Answer)
        except msgspec.DecodeError as error:
            return Answer(f"the relay's answer is not understood: {error}")

    def withdraw(self) -> bool:
        """Take it back: whether nobody had taken it."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Whatever became of it, it counts no more."""
        self.withdraw()
        os.close(self._descriptor)
        os.close(self._folder)


def give(journal: Journal, record: Record, event: Event) -> Given:
    """Leave an order; the caller closes it.

    Args:
        journal: of the relay.
        record: of the hand-over.
        event: one of ``ORDERS``.

    Raises:
        JournalBusy: another operator is giving one.
        JournalError: it cannot be left.
    """
    path = _path(journal, record.head.session, record.side)
    folder = -1
    try:
        folder = os.open(journal.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Of the events only an order's are given to this; mypy sees text.
        return _leave(path, msgspec.json.encode(_Order(event.value)) + b"\n", folder)  # type: ignore[arg-type]
    except OSError as error:
        if folder >= 0:
            os.close(folder)
        if isinstance(error, BlockingIOError):
            raise JournalBusy(
                "another operator's word is under way", "wait for the other korora handover resolve"
            ) from None
        raise JournalError(
            f"cannot leave an order in {journal.folder}: {error.strerror}", "be root, or the relay's user"
        ) from None


def _leave(path: Path, content: bytes, folder: int) -> Given:
    fresh = path.with_name(f"{path.name}{FRESH}{os.getpid()}")
    for stale in (path, fresh):
        with suppress(FileNotFoundError):
            stale.unlink()  # of a command that was killed
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        owner = os.fstat(folder)
        if owner.st_uid != os.fstat(descriptor).st_uid:
            os.fchown(descriptor, -1, owner.st_gid)  # we are root, and the relay is not
            os.fchmod(descriptor, 0o660)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, content)
        fresh.rename(path)
    except BaseException:
        os.close(descriptor)
        raise
    return Given(path, descriptor, len(content), folder)


# ------------------------------------------------------------------ who takes it


class _Taken:
    """An order that is being done."""

    def __init__(self, event: Event, descriptor: int) -> None:
        self.event, self._descriptor = event, descriptor
        self.uid = os.fstat(descriptor).st_uid
        """Of its giver."""

    def answer(self, answer: Answer) -> None:
        """Tell its giver, who may be gone."""
        try:
            os.write(self._descriptor, msgspec.json.encode(answer) + b"\n")
        except OSError as error:
            log.warning("an operator cannot be answered", reason=error.strerror)
        finally:
            os.close(self._descriptor)


def take(journal: Journal, session: str, side: Side) -> _Taken | None:
    """Take an order, if there is one; the caller holds that hand-over's journal locked."""
    path = _path(journal, session, side)
    mine = path.with_name(f"{path.name}{FRESH}taken")
    try:
        path.rename(mine)
        try:
            descriptor = os.open(mine, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            mine.unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("an operator's order cannot be taken", path=str(path), reason=error.strerror)
        return None
    try:
        order = _read(descriptor)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        log.warning("an operator's order is not obeyed", path=str(path), reason=str(error))
        os.close(descriptor)
        return None
    return _Taken(Event(order.decision), descriptor)


def _read(descriptor: int) -> _Order:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ValueError("it is no file")
    content = os.pread(descriptor, ORDER_BYTES_MAX + 1, 0)
    if len(content) > ORDER_BYTES_MAX:
        raise ValueError(f"more than {ORDER_BYTES_MAX} bytes")
    order = msgspec.json.decode(content, type=_Order)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return order
    raise ValueError("who gave it has gone")


class Ear:
    """Listens for orders about one hand-over while this process has it in hand.

    Args:
        journal: of this relay.
        party: at work; its journal's file is locked by this process.
        tell: takes the event, and does all that follows from it.
        trustee: is asked whether whoever gave it may.
    """

    def __init__(
        self, journal: Journal, party: Party, tell: Callable[[Event, str], Awaitable[None]], trustee: Trustee
    ) -> None:
        self._journal, self._party, self._tell, self._trustee = journal, party, tell, trustee
        self._closing = self._at_work = False
        self._task = asyncio.get_running_loop().create_task(self._listen(), name="listen for orders")

    async def _listen(self) -> None:
        handover, head = self._party.handover, self._party.record.head
        while not self._closing:
            await asyncio.sleep(ORDER_POLL_SECONDS)
            if not any(handover.takes(event) for event in ORDERS):
                continue
            self._at_work = True
            taken = await asyncio.to_thread(take, self._journal, head.session, handover.side)
            if taken is not None:
                self._party.log.warning("an operator's order", order=taken.event.value, uid=taken.uid)
                answer = Answer("the relay could not do it: its log says why")
                try:
                    answer = await self._obey(taken.event, taken.uid)
                finally:  # whoever waits is told, also of an error that nobody expected
                    await asyncio.to_thread(taken.answer, answer)
            self._at_work = False

    async def _obey(self, event: Event, uid: int) -> Answer:
        if not self._party.handover.takes(event):
            return Answer(
                f"it stands at {self._party.state.value}, where that cannot be said: see korora handover show"
            )
        try:
            self._trustee.resolve(self._party.record, uid)
            await self._tell(event, WHY)
        except PolicyRefused as refusal:
            self._party.log.warning("an operator's order is refused", uid=uid, rule=refusal.rule, reason=str(refusal))
            return Answer(str(refusal)[:REASON_CHARACTERS_MAX], refusal.rule)
        except RelayError as error:
            return Answer(str(error)[:REASON_CHARACTERS_MAX])
        return Answer(self._party.trouble[:REASON_CHARACTERS_MAX])

    def __enter__(self) -> None:
        """It listens already."""

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more; what is being done is done to its end, and its giver told."""
        self._closing = True
        if not self._at_work:
            self._task.cancel()


def _path(journal: Journal, session: str, side: Side) -> Path:
    return journal.folder / f"{session}-{side.value}{_SUFFIX}"

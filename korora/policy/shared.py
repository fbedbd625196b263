"""The ledger of several processes: a daemon's workers, and ad hoc relays that share its state directory.

    ledger/sessions            who has begun, JSON; nobody reads it while another writes
    ledger/lock                locked by whoever reads or replaces it
    ledger/PID-RANDOM.alive    locked by a process for as long as it lives: what it began ends with it

It is not fsynced: with the host all sessions end; what began in the hour before is then forgotten.
"""

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

import msgspec
import structlog

from crypto.files import make_private_directory, read_bounded
from korora.policy.ledger import STARTS_MAX, Begun, Usage, counted, kept
from proxy.errors import PolicyRefused
from proxy.limits import KIB

log = structlog.get_logger("korora.policy")

LEDGER_BYTES_MAX: Final = STARTS_MAX * KIB  # of some 250 bytes each
LOCK_SECONDS_MAX: Final = 1.0  # others hold it for a millisecond; the loop waits meanwhile
_LOCK_PAUSE_SECONDS: Final = 0.002
_ALIVE: Final = ".alive"


class Ledger:
    """One process's view of it. A session is begun when it is offered; whatever became of it, it is ended once.

    Args:
        folder: made with mode 0700 when the first session begins, if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._alive: tuple[str, int] | None = None
        self._owner = 0  # of ``_alive``: a process that was forked is another one
        self._mine: set[str] = set()  # that run
        self._over: set[str] = set()  # that could not be ended when they were over

    def begin(self, session: str, peer: str, tenant: str, user: int | None, now: datetime) -> None:
        """A session begins; nothing if it runs already.

        Raises:
            PolicyRefused: it cannot be written down.
        """

        def add(begun: list[Begun]) -> list[Begun]:
            process = self._process()
            if any(each.runs and each.session == session and each.process == process for each in begun):
                return begun
            fresh = Begun(session=session, peer=peer, tenant=tenant, user=user, at=now, process=process)
            return [*kept(begun, now), fresh]

        with self._told("a session that begins"):
            self._over.discard(session)
            self._change(add)
            self._mine.add(session)

    def end(self, session: str) -> None:
        """It is over; nothing if it never began. What cannot be written down now is by whatever is asked next."""
        if session not in self._mine:
            return
        self._mine.discard(session)
        self._over.add(session)
        try:
            with self._told("a session that is over"):
                self._change(lambda begun: begun)
        except PolicyRefused as refusal:
            log.warning("a session that is over still counts", session=session, reason=str(refusal))

    def usage(self, now: datetime, session: str = "") -> Usage:
        """See ``counted``.

        Raises:
            PolicyRefused: it cannot be read.
        """
        with self._told("sessions"):
            return counted(self._change(lambda begun: begun), now, session, self._name)

    def close(self) -> None:
        """All that this process began is over."""
        if self._alive is not None and self._owner == os.getpid():
            name, descriptor = self._alive
            with suppress(OSError):
                (self._folder / name).unlink()
            os.close(descriptor)
        self._alive = None

    # ---------------------------------------------------------------- the files

    def _process(self) -> str:
        """What this process is called, and locked by from now on; made while the ledger is locked, lest it be swept."""
        if self._alive is None or self._owner != os.getpid():
            for path in self._folder.glob(f"*{_ALIVE}"):
                self._swept(path.name)
            name = f"{os.getpid()}-{secrets.token_hex(4)}{_ALIVE}"
            descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._alive, self._owner = (name, descriptor), os.getpid()
        return self._alive[0]

    def _change(self, change: Callable[[list[Begun]], list[Begun]]) -> list[Begun]:
        """What has begun, once those that are over are marked so, and it is changed; written back if that differs."""
        with self._locked():
            before = self._read()
            dead = self._dead(before)
            after = change([self._marked(each, dead) for each in before])
            if after != before:
                self._write(after)
            self._over.clear()
            return after

    @property
    def _name(self) -> str:
        """What this process is called; empty until it has begun a session."""
        return self._alive[0] if self._alive is not None else ""

    def _marked(self, begun: Begun, dead: frozenset[str]) -> Begun:
        over = begun.process in dead or (begun.process == self._name and begun.session in self._over)
        return msgspec.structs.replace(begun, runs=False) if begun.runs and over else begun

    def _dead(self, begun: list[Begun]) -> frozenset[str]:
        """Of the processes whose sessions run, those that live no more."""
        return frozenset(
            name for name in {each.process for each in begun if each.runs} if name != self._name and self._swept(name)
        )

    def _swept(self, name: str) -> bool:
        """Whether that process lives no more; its file is gone then."""
        try:
            descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            (self._folder / name).unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _read(self) -> list[Begun]:
        try:
            content, _ = read_bounded(self._folder / "sessions", LEDGER_BYTES_MAX)
            return msgspec.json.decode(content, type=list[Begun])
        except FileNotFoundError:
            return []
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("the ledger of sessions is not understood, and begun anew", reason=str(error))
            return []

    def _write(self, begun: list[Begun]) -> None:
        """In place, for renaming would wait for a disk: whoever reads has the lock; what a crash tore is begun anew."""
        content = msgspec.json.encode(begun)
        descriptor = os.open(self._folder / "sessions", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.pwrite(descriptor, content, 0) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path, flags = self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            make_private_directory(self._folder)
            descriptor = os.open(path, flags, 0o600)
        try:
            late = time.monotonic() + LOCK_SECONDS_MAX
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > late:
                        raise TimeoutError(0, "another process has it locked") from None
                    time.sleep(_LOCK_PAUSE_SECONDS)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PolicyRefused(f"{what} cannot be counted: {self._folder}: {error.strerror}") from None

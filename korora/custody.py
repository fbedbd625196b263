"""Who may take up what is left of hand-overs, and decide about it: the monitor is asked (``authority.Trustee``)."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from crypto.errors import CryptoError
from crypto.files import make_private_directory, read_bounded, write_private
from korora.agents.integrity.items import RELAY, Item
from korora.agents.integrity.monitor import RULE, Monitor
from korora.agents.integrity.procedures import Procedure
from korora.policy.file import PolicyFile
from proxy.authority import Act
from proxy.errors import ConfigurationError, PolicyRefused
from proxy.handover.record import Record
from proxy.handover.table import Side

log = structlog.get_logger("korora.receipts")

POLICY: Final = "policy"
"""File in the state directory that says which policy the relay there goes by, for commands that work beside it."""

_PATH_BYTES_MAX: Final = 4096 + 1  # PATH_MAX, and a newline
_MACHINE: Final = frozenset({Item.JOURNAL, Item.CONFIGURATION, Item.MEMORY})
_RECOVER: Final = (RELAY, Procedure.RECOVER, _MACHINE)
_COMMIT: Final = (RELAY, Procedure.COMMIT, _MACHINE)
_RECORD: Final = (RELAY, Procedure.RECORD, frozenset({Item.RECEIPTS}))


class Custody:
    """Of a process.

    Args:
        here: NAME of this host.
        monitor: says what is certified.
    """

    def __init__(self, here: str, monitor: Monitor) -> None:
        self._here, self._monitor = here, monitor
        self._taken: dict[str, list[Act]] = {}
        """What was performed on each hand-over since it was taken up."""

    def recover(self, record: Record) -> None:
        """See ``Trustee.recover``."""
        key = _key(record)
        if key not in self._taken:
            arriving = record.side is Side.DESTINATION
            self._certified(self._monitor.begin, key, f"host:{record.head.peer}" if arriving else RELAY)
            self._taken[key] = []
        self._perform(key, _RECOVER, _RECORD)

    def commit(self, record: Record) -> None:
        """See ``Trustee.commit``."""
        self.recover(record)  # it may be the second time, and an operator may have had his say
        self._perform(_key(record), _COMMIT)

    def resolve(self, record: Record, uid: int) -> None:
        """See ``Trustee.resolve``."""
        self.recover(record)
        self._perform(_key(record), (f"uid:{uid}", Procedure.RESOLVE, frozenset({Item.JOURNAL, Item.REASON})))

    def over(self, record: Record) -> None:
        """See ``Trustee.over``."""
        key = _key(record)
        if self._taken.pop(key, None) is not None:
            self._monitor.end(key)

    def acts(self, record: Record) -> tuple[Act, ...]:
        """What was performed on a hand-over since it was taken up."""
        return tuple(self._taken.get(_key(record), ()))

    def _perform(self, key: str, *wanted: tuple[str, Procedure, frozenset[Item]]) -> None:
        for subject, procedure, items in wanted:
            self._certified(self._monitor.perform, key, subject, procedure, items)
            act = Act(subject, str(procedure), tuple(sorted(items)))
            if act not in self._taken[key]:
                self._taken[key].append(act)

    def _certified(self, act: Callable[..., object], *args: object) -> None:
        try:
            act(*args)
        except PolicyRefused as refusal:
            raise PolicyRefused(f"refused at {self._here}: {refusal}", RULE) from None


def note_policy(folder: Path, policy: PolicyFile) -> None:
    """Leave word in the state directory which policy counts; blocks for a moment where that has changed.

    Raises:
        ConfigurationError: it cannot be left: commands would go by another policy than the relay.
    """
    path = folder / POLICY
    wanted = "" if policy.path is None else f"{policy.path.absolute()}\n"
    try:
        if wanted == _noted(path):
            return
        if wanted:
            make_private_directory(folder)
            write_private(path, wanted.encode())
        else:
            path.unlink()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be written: {error}", "see to its owner and mode") from None


def custody_beside(folder: Path) -> Custody:
    """For a command that works on a relay's state directory: by the policy that the relay goes by.

    Raises:
        ConfigurationError: that policy cannot be read.
    """
    path = folder / POLICY
    try:
        noted = _noted(path).removesuffix("\n")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}", "be root, or the relay's user") from None
    return Custody("this host", Monitor(PolicyFile(Path(noted) if noted else None).current.certification))


def on_record(folder: Path, identity: Path | None, custody: Custody) -> Callable[[Record], None]:
    """For such a command: puts on record how a hand-over ended that it has finished, as the relay would have.

    What cannot be is told, and changes nothing: a machine must not wait for it.

    Args:
        folder: the state directory.
        identity: whose signature it gets; None where that is not known.
        custody: what was performed.
    """

    def settled(record: Record) -> None:
        from crypto.identity import Identity
        from korora.notary import Notary

        try:
            if identity is None:
                raise ConfigurationError("nothing says who signs: give --identity")
            if folder.stat().st_uid != os.geteuid():  # a file that is ours would stop the relay's log
                raise ConfigurationError(f"{folder} is another user's: be the relay's user")
            notary = Notary(Identity.load(identity, now=datetime.now(UTC)), folder)
        except (CryptoError, ConfigurationError, OSError) as error:
            log.warning("the end of a hand-over is not on record", session=record.head.session[:8], reason=str(error))
        else:
            notary.settled(record, custody.acts(record))

    return settled


def _noted(path: Path) -> str:
    try:
        return read_bounded(path, _PATH_BYTES_MAX)[0].decode()
    except FileNotFoundError:
        return ""


def _key(record: Record) -> str:
    """Not a session's: what is left of a hand-over is taken up by whoever has its journal, its session here or not."""
    return f"{record.head.session}-{record.head.side} recovered"

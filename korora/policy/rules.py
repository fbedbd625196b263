"""The policy's file as it is written, its keys and their bounds; what they mean is ``korora.policy.decide``'s."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import partial
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from msgspec import Meta

from korora.daemon.config import Name, Pin, Rate, bytes_per_second
from korora.policy.names import PATTERN_CHARACTERS_MAX, Glob, telling
from korora.policy.windows import DAYS, ZONE_CHARACTERS_MAX, Window, days_of, hours_of, zone_of
from korora.tables import Table
from proxy.errors import ConfigurationError
from proxy.limits import KIB

T = TypeVar("T")

POLICY_BYTES_MAX: Final = 256 * KIB  # some 1000 rules; read whole at a reload
RULES_MAX: Final = 1024  # each is looked at, at every point of every session: some milliseconds for all
VALUES_MAX: Final = 64  # of one key of a rule; what needs more is two rules
UID_MAX: Final = 2**32 - 2  # 2**32 - 1 is nobody's, chown(2)
RUNNING_MAX: Final = 4096  # beyond a daemon's SESSIONS_MAX and all of its ingresses
PER_HOUR_MAX: Final = 10_000  # starts that a ledger is sure to remember
APPROVALS_MAX: Final = 8  # people who have to agree about one migration
APPROVAL_SECONDS_DEFAULT: Final = 600  # two people are found in ten minutes, or not today
APPROVAL_SECONDS_MAX: Final = 3600
UUID_CHARACTERS: Final = 36

Strings = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=PATTERN_CHARACTERS_MAX)], ...],
    Meta(min_length=1, max_length=VALUES_MAX, description=f"a list of 1 to {VALUES_MAX} strings"),
]
Labels = Annotated[
    tuple[Name, ...], Meta(min_length=1, max_length=VALUES_MAX, description=f"a list of 1 to {VALUES_MAX} names")
]
Users = Annotated[
    tuple[Annotated[int, Meta(ge=0, le=UID_MAX)] | Annotated[str, Meta(min_length=1, max_length=64)], ...],
    Meta(min_length=1, max_length=VALUES_MAX, description=f"a list of 1 to {VALUES_MAX} uids or login names"),
]
Pins = Annotated[
    tuple[Pin, ...], Meta(min_length=1, max_length=VALUES_MAX, description=f"a list of 1 to {VALUES_MAX} pins")
]
Count = Annotated[int, Meta(ge=1, le=RUNNING_MAX)]

_COUNTS: Final = (
    "max_running",
    "max_running_per_peer",
    "max_running_per_tenant",
    "max_running_per_user",
    "sessions_per_hour",
)
"""Keys that go by how many sessions there are."""

OBLIGATIONS: Final = (
    *("requires_attestation", "requires_scans", "rate_limit", "max_running", "max_running_per_peer"),
    *("max_running_per_tenant", "max_running_per_user", "sessions_per_hour", "approvals", "approvers"),
    "approval_timeout",
)
"""Keys that only a rule which allows may have."""


class RuleTable(Table, frozen=True):
    """`[[rule]]`. A key that is left away asks for nothing; of several values of a key, one has to match."""

    name: Name
    effect: Literal["allow", "deny"]
    peer: Strings | None = None
    pin: Pins | None = None
    user: Users | None = None
    vm: Strings | None = None
    uuid: Strings | None = None
    tenant: Strings | None = None
    direction: Literal["in", "out"] | None = None
    egress: Strings | None = None
    hours: Strings | None = None
    days: Strings | None = None
    timezone: Annotated[str, Meta(min_length=1, max_length=ZONE_CHARACTERS_MAX)] = "UTC"
    not_before: datetime | None = None
    not_after: datetime | None = None
    guarded: bool | None = None
    requires_attestation: Labels | None = None
    requires_scans: Labels | None = None
    max_running: Count | None = None
    max_running_per_peer: Count | None = None
    max_running_per_tenant: Count | None = None
    max_running_per_user: Count | None = None
    sessions_per_hour: Annotated[int, Meta(ge=1, le=PER_HOUR_MAX)] | None = None
    rate_limit: Rate = None
    approvals: Annotated[int, Meta(ge=1, le=APPROVALS_MAX)] | None = None
    approvers: Users | None = None
    approval_timeout: Annotated[int, Meta(ge=1, le=APPROVAL_SECONDS_MAX)] = APPROVAL_SECONDS_DEFAULT


class PolicyTable(Table, frozen=True):
    """The whole file."""

    unicode_names: bool = False
    certification: dict[str, Any] | None = None
    """Read, as `triple` is, by ``korora.agents.integrity.certification``."""

    triple: list[Any] | None = None
    rule: Annotated[tuple[RuleTable, ...], Meta(max_length=RULES_MAX)] = ()


@dataclass(frozen=True, slots=True)
class Approvals:
    """People who have to agree.

    Attributes:
        count: how many, each with a uid of his own.
        users: the uids that may.
        seconds: how long they are waited for.
    """

    count: int
    users: tuple[int, ...]
    seconds: int


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that has been checked. None is a key that is left away.

    Attributes:
        number: in the file, from 0.
        table: as it was written.
        users: the uids that ``user`` names.
        pins: in lower case, without their prefix.
        not_before, not_after: with their zones.
        rate_limit: bytes a second.
    """

    number: int
    table: RuleTable
    peers: tuple[Glob, ...] | None
    pins: frozenset[str] | None
    users: frozenset[int] | None
    vms: tuple[Glob, ...] | None
    uuids: tuple[Glob, ...] | None
    tenants: tuple[Glob, ...] | None
    egresses: tuple[Glob, ...] | None
    window: Window | None
    not_before: datetime | None
    not_after: datetime | None
    rate_limit: int | None
    approvals: Approvals | None

    @property
    def name(self) -> str:
        """Of its own among the file's."""
        return self.table.name

    @property
    def allows(self) -> bool:
        """Whether it does, or else denies."""
        return self.table.effect == "allow"

    @property
    def counts(self) -> bool:
        """Whether it goes by how many sessions there are."""
        return any(getattr(self.table, key) is not None for key in _COUNTS)


UidOf = Callable[[str], int | None]
"""A login name's uid; None if there is no such user."""


class Compiler:
    """Makes rules of tables, or says what is wrong with one.

    Args:
        where: what errors call the file.
        unicode_names: as the file says.
        uid_of: the system's users.
    """

    def __init__(self, where: str, uid_of: UidOf, *, unicode_names: bool) -> None:
        self._where, self._unicode, self._uid_of = where, unicode_names, uid_of

    def rule(self, number: int, table: RuleTable) -> Rule:
        """Check one rule.

        Raises:
            ConfigurationError: a key of it is wrong.
        """
        key = f"rule[{number}]"
        self._fits_effect(key, table)
        zone = self._told(f"{key}.timezone", lambda: zone_of(table.timezone))
        begin, end = _aware(table.not_before, zone), _aware(table.not_after, zone)
        if begin is not None and end is not None and begin >= end:
            self._wrong(f"{key}.not_after", "it is not after not_before")
        rate = self._told(f"{key}.rate_limit", lambda: bytes_per_second(table.rate_limit))
        return Rule(
            number,
            table,
            peers=self._globs(f"{key}.peer", table.peer),
            pins=None if table.pin is None else frozenset(pin.lower().removeprefix("sha256:") for pin in table.pin),
            users=None if table.user is None else frozenset(self._uids(f"{key}.user", table.user)),
            vms=self._vms(f"{key}.vm", table.vm),
            uuids=self._uuids(f"{key}.uuid", table.uuid),
            tenants=self._globs(f"{key}.tenant", table.tenant),
            egresses=self._globs(f"{key}.egress", table.egress),
            window=self._window(key, table, zone),
            not_before=begin,
            not_after=end,
            rate_limit=None if rate is None else int(rate),
            approvals=self._approvals(key, table),
        )

    def _fits_effect(self, key: str, table: RuleTable) -> None:
        if table.effect == "deny":
            for name in OBLIGATIONS:
                if getattr(table, name) not in {None, APPROVAL_SECONDS_DEFAULT}:
                    self._wrong(f"{key}.{name}", "a rule that denies cannot ask for it", "put it in one that allows")
            if table.guarded:
                self._wrong(
                    f"{key}.guarded", "it would refuse what is guarded", "write guarded = false to refuse the rest"
                )
        elif table.guarded is False:
            self._wrong(
                f"{key}.guarded", "it would allow only what is not guarded", "leave it away, or write guarded = true"
            )
        if (table.approvals is None) != (table.approvers is None):
            self._wrong(f"{key}.approvals", "approvals and approvers belong together", "give both, or neither")

    def _approvals(self, key: str, table: RuleTable) -> Approvals | None:
        if table.approvals is None or table.approvers is None:
            return None
        users = tuple(dict.fromkeys(self._uids(f"{key}.approvers", table.approvers)))
        return Approvals(table.approvals, users, table.approval_timeout)

    def _globs(self, key: str, texts: Sequence[str] | None) -> tuple[Glob, ...] | None:
        if texts is None:
            return None
        return tuple(self._told(f"{key}[{number}]", partial(Glob, text)) for number, text in enumerate(texts))

    def _vms(self, key: str, texts: Sequence[str] | None) -> tuple[Glob, ...] | None:
        for number, text in enumerate(texts or ()):
            if not telling(text, unicode=self._unicode):
                self._wrong(
                    f"{key}[{number}]",
                    "no name that counts as told can match it",
                    "write printed characters in normal form C" if self._unicode else "set unicode_names = true",
                )
        return self._globs(key, texts)

    def _uuids(self, key: str, texts: Sequence[str] | None) -> tuple[Glob, ...] | None:
        for number, text in enumerate(texts or ()):
            if not set(text.lower()) <= set("0123456789abcdef-*?[]!"):
                self._wrong(f"{key}[{number}]", f"expected hexadecimal digits and dashes, got {text!r}")
            if not set(text) & set("*?[") and not _whole_uuid(text):
                self._wrong(f"{key}[{number}]", f"{text!r} is no whole UUID", "write the beginning of one as 4f1b*")
        return self._globs(key, None if texts is None else [text.lower() for text in texts])

    def _uids(self, key: str, users: Sequence[int | str]) -> Iterator[int]:
        for number, user in enumerate(users):
            uid = user if isinstance(user, int) else self._uid_of(user)
            if uid is None:
                self._wrong(
                    f"{key}[{number}]", f"this host has no user {user!r}", "name one that it has, or give a uid"
                )
            yield uid

    def _window(self, key: str, table: RuleTable, zone: tzinfo) -> Window | None:
        if table.hours is None and table.days is None:
            if table.timezone != "UTC" and not any(
                at is not None and at.tzinfo is None for at in (table.not_before, table.not_after)
            ):
                self._wrong(f"{key}.timezone", "the rule names no time in it", "add hours or days, or leave it away")
            return None
        hours = self._told(f"{key}.hours", lambda: tuple(hours_of(text) for text in table.hours or ()))
        days = self._told(f"{key}.days", lambda: days_of(table.days or DAYS))
        return Window(hours, days, zone)

    def _told(self, key: str, make: Callable[[], T]) -> T:
        try:
            return make()
        except ValueError as error:
            self._wrong(key, str(error))

    def _wrong(self, key: str, words: str, remedy: str = "correct the file") -> NoReturn:
        raise ConfigurationError(f"{self._where}: {key}: {words}", remedy)


def _aware(at: datetime | None, zone: tzinfo) -> datetime | None:
    return at.replace(tzinfo=zone) if at is not None and at.tzinfo is None else at


def _whole_uuid(text: str) -> bool:
    return len(text) == UUID_CHARACTERS and [at for at, digit in enumerate(text) if digit == "-"] == [8, 13, 18, 23]

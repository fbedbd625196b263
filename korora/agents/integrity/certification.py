"""What is certified: which subjects may perform which procedures on which items (Clark and Wilson's E2), and by whom.

In the policy's file:

    [certification]
    by = "security-office"          # who answers for it: performs nothing here
    approvals = 2                   # that every commit needs at least, each by somebody else; default 0
    approver_commits = false        # whether who approved may commit; default false

    [[triple]]
    subject = "host:alpha"          # host:NAME, uid:NUMBER, relay; a `*` at the end stands for any rest
    procedure = ["offer", "transfer", "resume"]
    items = ["offer", "stream"]
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Final, NoReturn, TypeVar

import msgspec
from msgspec import Meta, Struct

from korora.agents.integrity.items import CLAIMED, LEVELS, RELAY, TRUSTED, Item, Kind
from korora.agents.integrity.levels import MODIFIES, Attribute
from korora.agents.integrity.procedures import USES, Procedure
from proxy.errors import ConfigurationError

TRIPLES_MAX: Final = 256  # a file of them is read by people; each is looked at once for every procedure performed
APPROVALS_MAX: Final = 16  # more people than that are not found within a hand-over's time

BUILT_IN: Final = "Kororā"
"""Who has certified ``Certification.default()``: its authors."""

_PATTERN: Final = re.compile(r"relay|host:([A-Za-z0-9][A-Za-z0-9._-]{0,62})?\*?|uid:([0-9]{1,10}|\*)", re.ASCII)

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Triple:
    """A certified relation: these subjects may perform these procedures on these items.

    Attributes:
        subject: as a subject is written; a ``*`` at its end stands for any rest.
        procedures: all of them may be performed.
        items: on as many of them as a procedure touches.
    """

    subject: str
    procedures: frozenset[Procedure]
    items: frozenset[Item]

    def matches(self, subject: str) -> bool:
        """Whether it is about that subject; letters count as they are."""
        if self.subject.endswith("*"):
            return subject.startswith(self.subject[:-1])
        return subject == self.subject

    def names(self, certifier: str) -> bool:
        """Whether whoever certifies is one of its subjects."""
        return self.matches(certifier) or self.subject.partition(":")[2] == certifier


@dataclass(frozen=True, slots=True)
class Certification:
    """All triples of a host.

    Attributes:
        by: who certified them.
        triples: the relation.
        approvals: how many different subjects must approve before a commit.
        approver_commits: whether one of them may then commit.
        rows: for each triple, the accesses that it allows: item's or procedure's name, attribute.
    """

    by: str
    triples: tuple[Triple, ...]
    approvals: int = 0
    approver_commits: bool = False
    rows: tuple[frozenset[tuple[str, Attribute]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(_row(triple) for triple in self.triples))

    def permits(self, subject: str, procedure: Procedure, items: frozenset[Item]) -> bool:
        """Whether one triple has all three."""
        return any(
            procedure in triple.procedures and items <= triple.items and triple.matches(subject)
            for triple in self.triples
        )

    def accesses(self, subject: str) -> frozenset[tuple[str, Attribute]]:
        """The subject's row of the access matrix (4)."""
        found: frozenset[tuple[str, Attribute]] = frozenset()
        for triple, row in zip(self.triples, self.rows, strict=True):
            if triple.matches(subject):
                found |= row
        return found

    @classmethod
    def default(cls) -> "Certification":
        """Of a relay whose file says nothing of it: whoever the policy lets in does what its part is, and no more."""
        return cls(BUILT_IN, _DEFAULT)


CONTROL: Final = "session"
"""The object that everything of a session is below: to write to it is to make items, and to take them for true."""


def program(procedure: Procedure) -> str:
    """What the procedure is called as an object, which is executed."""
    return f"procedure {procedure}"


def _row(triple: Triple) -> frozenset[tuple[str, Attribute]]:
    row: set[tuple[str, Attribute]] = set()
    for procedure in triple.procedures:
        row.add((program(procedure), Attribute.EXECUTE))
        for item, use in USES[procedure].items():
            if item not in triple.items:
                continue
            row.update((item.value, attribute) for attribute in use.attributes)
            if use.raises or use.made_from is not None:
                row.add((CONTROL, Attribute.WRITE))
    return frozenset(row)


def _triple(subject: str, procedures: Iterable[Procedure], items: Iterable[Item]) -> Triple:
    return Triple(subject, frozenset(procedures), frozenset(items))


_P: Final = Procedure
_MACHINE: Final = (Item.CONFIGURATION, Item.MEMORY, Item.DISKS, Item.VTPM)

_DEFAULT: Final = (
    _triple("host:*", (_P.OFFER, _P.TRANSFER, _P.RESUME), (Item.OFFER, Item.STREAM)),
    _triple("uid:*", (_P.OFFER,), (Item.OFFER,)),
    _triple("uid:*", (_P.APPROVE,), (*_MACHINE, Item.JOURNAL)),
    _triple("uid:*", (_P.RESOLVE,), (Item.JOURNAL, Item.MEMORY, Item.REASON)),
    _triple(RELAY, (_P.OFFER, _P.ACCEPT, _P.RESUME), (Item.OFFER,)),
    _triple(RELAY, (_P.IDENTIFY, _P.TRANSFER, _P.VERIFY), (*_MACHINE, Item.STREAM)),
    _triple(RELAY, (_P.COMMIT, _P.RECOVER), (*_MACHINE, Item.JOURNAL)),
    _triple(RELAY, (_P.RECORD,), (Item.RECEIPTS, Item.JOURNAL)),
)


# ---------------------------------------------------------------- the file's words


class _Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file: keys it does not know are errors."""


class Head(_Table, frozen=True):
    """`[certification]`."""

    by: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}\Z")]
    approvals: Annotated[int, Meta(ge=0, le=APPROVALS_MAX)] = 0
    approver_commits: bool = False


class Entry(_Table, frozen=True):
    """`[[triple]]`."""

    subject: str
    procedure: Annotated[tuple[str, ...], Meta(min_length=1)]
    items: Annotated[tuple[str, ...], Meta(min_length=1)]


def parse(tables: Mapping[str, object], where: str) -> Certification:
    """What a file's tables `certification` and `triple` say; the default where it has neither.

    Args:
        tables: the whole file; other keys are not looked at.
        where: what errors call it.

    Raises:
        ConfigurationError: something in them is wrong; the message names `where`, the key and what is expected.
    """
    if "certification" not in tables and "triple" not in tables:
        return Certification.default()
    for key in ("certification", "triple"):
        if key not in tables:
            _wrong(where, key, "missing; expected both [certification] and at least one [[triple]]", "add it")
    head = _converted(tables["certification"], Head, f"{where}: certification")
    entries = tables["triple"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= TRIPLES_MAX:
        _wrong(where, "triple", f"expected 1 to {TRIPLES_MAX} tables [[triple]]")
    triples = tuple(_read(entry, f"{where}: triple[{number}]") for number, entry in enumerate(entries))
    for number, triple in enumerate(triples):
        if triple.names(head.by):
            _wrong(
                where,
                f"triple[{number}].subject",
                f"{triple.subject!r} is {head.by!r}, who certifies and so may not execute; expected somebody else",
                "let somebody else certify, or name the subjects one by one",
            )
    return Certification(head.by, triples, head.approvals, head.approver_commits)


def _read(entry: object, where: str) -> Triple:
    raw = _converted(entry, Entry, where)
    if _PATTERN.fullmatch(raw.subject) is None:
        _wrong(
            where,
            "subject",
            f"expected relay, host:NAME, uid:NUMBER or one of these with a * at its end, got {raw.subject!r}",
        )
    procedures = _members(Procedure, raw.procedure, f"{where}.procedure")
    items = _members(Item, raw.items, f"{where}.items")
    for procedure in procedures:
        if not items & USES[procedure].keys():
            expected = ", ".join(sorted(USES[procedure]))
            _wrong(where, "procedure", f"{procedure} touches none of these items; expected one of {expected}")
    for item in items:
        if not any(item in USES[procedure] for procedure in procedures):
            _wrong(where, "items", f"none of these procedures touches {item}", "leave it away")
    triple = Triple(raw.subject, procedures, items)
    _high_enough(triple, where)
    return triple


def _high_enough(triple: Triple, where: str) -> None:
    """What the formal machine would refuse at every time is refused here, where somebody reads it."""
    level = LEVELS[Kind(triple.subject.partition(":")[0])]
    for procedure in sorted(triple.procedures):
        for item, use in USES[procedure].items():
            trusts = use.raises or use.made_from is not None
            if item not in triple.items or not (trusts or use.attributes & MODIFIES):
                continue
            needed = TRUSTED if trusts else CLAIMED.get(item, TRUSTED)
            if level < needed.level:
                _wrong(
                    where,
                    "subject",
                    f"{triple.subject} stands too low for {procedure} on {item}: no write up; expected {RELAY}",
                    "let the relay do it, which checks first",
                )


def _members(kind: type[E], words: Iterable[str], where: str) -> frozenset[E]:
    found = set()
    for word in words:
        try:
            found.add(kind(word))
        except ValueError:
            expected = ", ".join(kind)
            raise ConfigurationError(
                f"{where}: expected some of {expected}, got {word!r}", "correct the file"
            ) from None
    return frozenset(found)


_S = TypeVar("_S", bound=_Table)


def _converted(raw: Any, kind: type[_S], where: str) -> _S:
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        known = ", ".join(kind.__struct_fields__)
        raise ConfigurationError(
            f"{where}{'.' if key else ''}{key}: {what}; its keys are {known}", "correct the file"
        ) from None


def _wrong(where: str, key: str, words: str, remedy: str = "correct the file") -> NoReturn:
    separator = "." if where.endswith("]") else ": "
    raise ConfigurationError(f"{where}{separator}{key}: {words}", remedy)

"""The state t = (a, B, c, D) of the formal machine (2, 17), immutable."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from korora.agents.integrity.levels import MODIFIES, TAKES, Attribute, Level, Standing

V = TypeVar("V")

UNKNOWN = Standing(Level.USER_AGENT)
"""Of whoever is not there: nobody stands lower."""


class Access(NamedTuple):
    """An element of S × O × A (3): had now in a, allowed in B."""

    subject: str
    obj: str
    attribute: Attribute


class Table(Mapping[str, V], Generic[V]):
    """An immutable mapping that can be hashed, and makes altered copies of itself."""

    __slots__ = ("_entries", "_hash")

    def __init__(self, entries: Mapping[str, V] | None = None) -> None:
        self._entries = dict(entries or {})
        self._hash: int | None = None

    def __getitem__(self, key: str) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._entries.items()))
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._entries == other._entries

    def __repr__(self) -> str:
        return f"Table({self._entries!r})"

    def with_entry(self, key: str, value: V) -> "Table[V]":
        """The same, but for that entry."""
        return Table({**self._entries, key: value})

    def without(self, key: str) -> "Table[V]":
        """The same without that entry."""
        return Table({name: value for name, value in self._entries.items() if name != key})


@dataclass(frozen=True, slots=True)
class State:
    """t (2, 17).

    Attributes:
        accesses: a, those that are had now (3).
        matrix: B, those that may be had (4).
        subjects: S (7) with c_s (5, 12).
        objects: O (8) with c_o.
        parents: D, of each object but the roots (6). Who may write to an object controls what is below it.
    """

    accesses: frozenset[Access]
    matrix: frozenset[Access]
    subjects: Table[Standing]
    objects: Table[Standing]
    parents: Table[str]

    def of_subject(self, subject: str) -> Standing:
        """c_s."""
        return self.subjects.get(subject, UNKNOWN)

    def of_object(self, obj: str) -> Standing:
        """c_o."""
        return self.objects.get(obj, UNKNOWN)

    def controls(self, subject: str, obj: str) -> bool:
        """Whether it is writing to the object's parent: then it may decide about the object."""
        parent = self.parents.get(obj)
        return parent is not None and Access(subject, parent, Attribute.WRITE) in self.accesses

    def children(self, obj: str) -> Iterator[str]:
        """The objects right below one."""
        return (child for child, parent in self.parents.items() if parent == obj)

    def taken(self, subject: str) -> Iterator[Standing]:
        """c_o of what acts on a subject now: of what it reads, or executes."""
        return (self.of_object(had.obj) for had in self.accesses if had.subject == subject and had.attribute in TAKES)

    def modified(self, subject: str) -> Iterator[Standing]:
        """c_o of what a subject writes or appends to now."""
        return (
            self.of_object(had.obj) for had in self.accesses if had.subject == subject and had.attribute in MODIFIES
        )

"""Access attributes and integrity levels: the numbers in brackets are the paper's statements of section 4.1."""

from dataclasses import dataclass
from enum import Enum, IntEnum, unique
from typing import Final


@unique
class Attribute(Enum):
    """A (9), as in Bell and LaPadula: `WRITE` sees what it changes, `APPEND` does not."""

    READ = "r"
    WRITE = "w"
    APPEND = "a"
    EXECUTE = "e"


OBSERVES: Final = frozenset({Attribute.READ, Attribute.WRITE})
MODIFIES: Final = frozenset({Attribute.WRITE, Attribute.APPEND})
TAKES: Final = OBSERVES | {Attribute.EXECUTE}
"""By what an object has an effect on the subject: who executes a program lets it act."""


@unique
class Level(IntEnum):
    """c1 to c5 (13), the vTPM's the highest: how far one may be believed."""

    USER_AGENT = 1
    RELYING_PARTY = 2
    IDENTITY_PROVIDER = 3
    TRUSTED_AUTHORITY = 4
    VTPM = 5


@dataclass(frozen=True, slots=True)
class Standing:
    """A value of c (5, 12): a level, and the categories it is had for."""

    level: Level
    categories: frozenset[str] = frozenset()

    def dominates(self, other: "Standing") -> bool:
        """At least as high, and for at least its categories."""
        return self.level >= other.level and self.categories >= other.categories

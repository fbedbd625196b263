"""R and I (10): what may be asked of the formal machine, and what it answers."""

from dataclasses import dataclass
from enum import Enum, unique

from korora.agents.integrity.levels import Attribute, Standing


@unique
class Answer(Enum):
    """I (10): the state changes on YES only."""

    YES = "yes"
    NO = "no"
    ERROR = "error"  # more than one rule applies
    QUESTION = "question"  # none does


@dataclass(frozen=True, slots=True)
class Get:
    """Have an access from now on."""

    subject: str
    obj: str
    attribute: Attribute


@dataclass(frozen=True, slots=True)
class Release:
    """Have it no more."""

    subject: str
    obj: str
    attribute: Attribute


@dataclass(frozen=True, slots=True)
class Give:
    """Allow somebody an access."""

    giver: str
    subject: str
    obj: str
    attribute: Attribute


@dataclass(frozen=True, slots=True)
class Rescind:
    """Allow it no more, and take it away at once."""

    giver: str
    subject: str
    obj: str
    attribute: Attribute


@dataclass(frozen=True, slots=True)
class Create:
    """Make an object below another one."""

    subject: str
    obj: str
    parent: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an object that has none below it."""

    subject: str
    obj: str


@dataclass(frozen=True, slots=True)
class ChangeObject:
    """Change c_o of an object: its content has been found better, or worse, than it was taken for."""

    subject: str
    obj: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class ChangeSubject:
    """Lower one's own c_s."""

    subject: str
    standing: Standing


Request = Get | Release | Give | Rescind | Create | Delete | ChangeObject | ChangeSubject

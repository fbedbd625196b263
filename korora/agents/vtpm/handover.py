"""What becomes of one host's part in one vTPM, as a literal table. Sans-IO.

Which host is to have it, the hand-over of its machine decides (``proxy.handover``); this follows, and never leads. So
each step may be asked for again after a crash, and a step that was done asks for what may be unfinished of it.
"""

from collections.abc import Mapping
from enum import Enum, unique
from types import MappingProxyType
from typing import Final, NamedTuple


@unique
class Holding(Enum):
    """Where a host stands with a vTPM; all but UNKNOWN are in its ledger."""

    UNKNOWN = "unknown"  # never seen here
    HERE = "here"  # this host's, usable
    LEAVING = "leaving"  # read for another host; may still stay
    GONE = "gone"  # another host's
    ARRIVING = "arriving"  # whole here, not usable
    WIPED = "wiped"  # it arrived, and stayed where it was


@unique
class Event(Enum):
    """What the machine's hand-over says."""

    DEPART = "depart"  # source: the destination asks for it; the machine is suspended
    PART = "part"  # source: its hypervisor has given the machine up
    STAY = "stay"  # source: its copy of the machine is to run on
    GIVEN = "given"  # source: the destination's copy runs
    ARRIVE = "arrive"  # destination: it has been received, and is the right one
    RELEASE = "release"  # destination: its copy is about to run
    WIPE = "wipe"  # destination: its copy is gone, and never ran


@unique
class Action(Enum):
    """What has to be done, in the order given; WRITE is on the disk before anything after it begins."""

    WRITE = "write"
    STOP = "stop"  # store the volatile state, and let the TPM answer nobody
    RESUME = "resume"  # let it answer again, as it was
    ERASE = "erase"  # end the emulator, remove its state
    KEEP = "keep"  # what arrived, in a file of this host's
    LOAD = "load"  # into the machine's emulator, which must not be running
    START = "start"  # let it answer
    FORGET = "forget"  # the file of what arrived


class Step(NamedTuple):
    """Where an event leads, and what has to be done."""

    holding: Holding
    actions: tuple[Action, ...] = ()


_GIVE_AWAY: Final = Step(Holding.GONE, (Action.WRITE, Action.ERASE))
_RECEIVE: Final = Step(Holding.ARRIVING, (Action.WRITE, Action.KEEP, Action.LOAD))

TABLE: Final[Mapping[tuple[Holding, Event], Step]] = MappingProxyType(
    {
        (Holding.UNKNOWN, Event.DEPART): Step(Holding.LEAVING, (Action.WRITE,)),
        (Holding.HERE, Event.DEPART): Step(Holding.LEAVING, (Action.WRITE,)),
        (Holding.LEAVING, Event.PART): Step(Holding.LEAVING, (Action.STOP,)),
        (Holding.LEAVING, Event.STAY): Step(Holding.HERE, (Action.RESUME, Action.WRITE)),
        (Holding.LEAVING, Event.GIVEN): _GIVE_AWAY,
        (Holding.GONE, Event.GIVEN): Step(Holding.GONE, (Action.ERASE,)),
        (Holding.HERE, Event.STAY): Step(Holding.HERE),
        (Holding.UNKNOWN, Event.ARRIVE): _RECEIVE,
        (Holding.GONE, Event.ARRIVE): _RECEIVE,
        (Holding.WIPED, Event.ARRIVE): _RECEIVE,
        (Holding.ARRIVING, Event.RELEASE): Step(Holding.HERE, (Action.START, Action.WRITE, Action.FORGET)),
        (Holding.HERE, Event.RELEASE): Step(Holding.HERE, (Action.FORGET,)),
        (Holding.ARRIVING, Event.WIPE): Step(Holding.WIPED, (Action.ERASE, Action.FORGET, Action.WRITE)),
        (Holding.WIPED, Event.WIPE): Step(Holding.WIPED),
        # It answered, and its machine was lost before it ran: an operator has given that copy up.
        (Holding.HERE, Event.WIPE): Step(Holding.WIPED, (Action.ERASE, Action.FORGET, Action.WRITE)),
    }
)

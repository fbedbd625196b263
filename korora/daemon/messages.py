"""What the parent and its workers say to one another, one msgpack message a datagram; some bring a descriptor along."""

from typing import Final

import msgspec

from korora.daemon.config import Config
from proxy.limits import KIB
from proxy.status import SessionStatus

MESSAGE_BYTES_MAX: Final = 128 * KIB  # a configuration of 64 KiB, or SAMPLE_SESSIONS statuses; fits a default buffer
SAMPLE_SESSIONS: Final = 32  # in one message, some 2 KiB each with the longest name of a VM
QUEUE_MESSAGES_MAX: Final = 1024  # that wait for a busy other end; one that takes none of them is as good as dead


class _Message(msgspec.Struct, frozen=True, tag=True):
    """Tagged by its class's name."""


# ---------------------------------------------------------------- parent to worker


class Configure(_Message, frozen=True):
    """Serve by this from now on; the first message there is, and one for each reload."""

    generation: int
    config: Config
    arriving_max: int
    """This worker's part of `sessions_max`."""
    xl_max: int = 0
    """This worker's part of `xl.sessions_max`."""


class Take(_Message, frozen=True):
    """A connection from another relay; its descriptor comes along, unread."""

    address: str


class Greet(_Message, frozen=True):
    """A connection from `korora xl`; its descriptor comes along, unread. Who it is, by the kernel."""

    uid: int
    pid: int


class Serve(_Message, frozen=True):
    """An ingress to serve; its listening socket comes along."""

    name: str
    label: str


class Leave(_Message, frozen=True):
    """An ingress to give up: at once if it is idle, else with its session."""

    name: str


class Rates(_Message, frozen=True):
    """Rates of departing sessions, by session id; None lifts a limit."""

    rates: dict[str, float | None]


class Cancel(_Message, frozen=True):
    """An operator wants a session ended."""

    session_id: str


class Lanes(_Message, frozen=True):
    """An operator wants a departing session to have so many lanes."""

    session_id: str
    count: int


class Drain(_Message, frozen=True):
    """Take no new session; say `Drained` when the last has ended."""


class Stop(_Message, frozen=True):
    """End every session now, as on a signal; then end."""

    signal_number: int


class Quit(_Message, frozen=True):
    """Nothing is left to do: end."""


# ---------------------------------------------------------------- worker to parent


class Configured(_Message, frozen=True):
    """A configuration was taken over, or why the old one stays."""

    generation: int
    error: str | None = None


class Begun(_Message, frozen=True):
    """A session is open."""

    way: str
    """The name of its ingress or egress."""
    status: SessionStatus


class Ended(_Message, frozen=True):
    """A session has ended."""

    session_id: str
    role: str
    way: str
    peer: str | None
    outcome: str
    exit_code: int
    seconds: float
    error: str | None = None
    status: SessionStatus | None = None
    """Its last, if it was ever open."""


class Sample(_Message, frozen=True):
    """How sessions stand, once a second; several where there are many."""

    statuses: tuple[SessionStatus, ...]
    lag_seconds: float
    """The worst delay of the worker's event loop since the last sample."""


class Refused(_Message, frozen=True):
    """A peer was not let in."""

    reason: str


class Greeted(_Message, frozen=True):
    """What `Greet` brought is a session now, or has been answered."""


class Left(_Message, frozen=True):
    """An ingress is served no longer: its listening socket is closed here."""

    name: str


class Drained(_Message, frozen=True):
    """After `Drain`: nothing is left."""


ToWorker = Configure | Take | Greet | Serve | Leave | Rates | Lanes | Cancel | Drain | Stop | Quit
ToParent = Configured | Begun | Ended | Sample | Refused | Greeted | Left | Drained

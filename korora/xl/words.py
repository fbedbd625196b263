"""What `korora xl` and the daemon say on the daemon's xl socket: one JSON object a packet (SOCK_SEQPACKET).

`korora xl` begins with `carry`, which brings its standard input and output along (SCM_RIGHTS). It is answered by
`taken` and, at the end, by `verdict`; between them by `moved` and `let_go`. A process of one version may meet a daemon
of the next, which was installed while it waited: what changes raises `VERSION`.
"""

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from proxy.errors import EXIT_CONFIGURATION
from proxy.limits import KIB
from proxy.status import SessionStatus

VERSION: Final = 1
REQUEST_BYTES_MAX: Final = 8 * KIB  # `carry` with the longest names; fits one packet of any socket
ANSWER_BYTES_MAX: Final = 64 * KIB  # `verdict` with a report is about 4 KiB; fits a default send buffer
DESCRIPTORS: Final = 2  # standard input and standard output
PEER_CHARACTERS_MAX: Final = 300  # a host name has 253 at most, an address fewer
NAMES_MAX: Final = 64  # --name is for a few hosts
NAME_CHARACTERS_MAX: Final = 63  # as a certificate's

Name = Annotated[str, Meta(max_length=NAME_CHARACTERS_MAX)]


class _Word(Struct, frozen=True, forbid_unknown_fields=True, tag_field="say"):
    """Tagged by a word of its own."""


# ---------------------------------------------------------------- korora xl to the daemon


class Carry(_Word, frozen=True, tag="carry"):
    """Carry what comes out of the first descriptor to a peer, and give its answers into the second."""

    version: int
    peer: Annotated[str, Meta(max_length=PEER_CHARACTERS_MAX)]
    """A peer's name, HOST or HOST:PORT, as the operator wrote it."""
    flags: Annotated[str, Meta(pattern=r"^e?d?p?\Z")] = ""
    names: Annotated[tuple[Name, ...], Meta(max_length=NAMES_MAX)] = ()
    """Accept only these peers; none: all that the daemon does."""
    session: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")] | None = None
    """What `taken` said, where they are handed over again: the daemon that had the session is gone."""


class Stop(_Word, frozen=True, tag="stop"):
    """A signal came: end the session."""

    signal: Annotated[int, Meta(ge=1, le=64)]


Request = Carry | Stop

# ---------------------------------------------------------------- the daemon to korora xl


class Taken(_Word, frozen=True, tag="taken"):
    """The descriptors are the daemon's from now on; before this it has not touched their streams."""

    session: str


class Moved(_Word, frozen=True, tag="moved"):
    """How the session stands, once a second; left out where nobody reads them."""

    status: SessionStatus


class LetGo(_Word, frozen=True, tag="let_go"):
    """Close your copies, so that xl sees the end: of the output alone, or of both."""

    output_only: bool = False


class Verdict(_Word, frozen=True, tag="verdict"):
    """How it ended; the last word. Nothing is kept after it."""

    code: int
    """What `korora xl` exits with."""
    words: str | None = None
    """For standard error."""
    session: str | None = None
    report: dict[str, Any] | None = None
    """As --report has it."""


Answer = Taken | Moved | LetGo | Verdict

_REQUESTS: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)
_ANSWERS: Final[msgspec.json.Decoder[Answer]] = msgspec.json.Decoder(Answer)


def encode(word: Request | Answer) -> bytes:
    """As one packet."""
    return msgspec.json.encode(word)


def request_of(data: bytes) -> Request:
    """A packet of `korora xl`.

    Raises:
        ValueError: it is none.
    """
    return _REQUESTS.decode(data)


def answer_of(data: bytes) -> Answer:
    """A packet of the daemon.

    Raises:
        ValueError: it is none.
    """
    return _ANSWERS.decode(data)


def no_request(why: str) -> Verdict:
    """The answer to what is no request."""
    return Verdict(EXIT_CONFIGURATION, f"korora: error: the daemon cannot take this: {why}")

"""The daemon's configuration: TOML in, checked structs out. Every error names file, key and what was expected."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from msgspec import Meta

from chunking.limits import CACHE_BYTES_DEFAULT, CACHE_SLOTS_MAX, CHAINS_MAX, STORE_BYTES_DEFAULT
from chunking.pages import PAGE_BYTES
from crypto.files import read_bounded
from korora import tables
from korora.tables import Table
from proxy.endpoints.spec import parse_address, parse_egress, parse_ingress, parse_monitor, parse_xl_flags
from proxy.errors import ConfigurationError
from proxy.limits import KIB, LANES_MAX
from proxy.paging import CHAINS_DEFAULT
from proxy.rate import RATE_MIN

CONFIG_BYTES_MAX: Final = 64 * KIB  # some 500 ingresses; and a configuration fits one message to a worker
WORKERS_MAX: Final = 64  # a lane's token names its worker in one byte; more cores than this carry nothing more
SESSIONS_MAX: Final = 1024  # arriving ones, all workers together: memory is the operator's to count
SESSIONS_DEFAULT: Final = 64
INGRESSES_MAX: Final = 512  # each holds a listening socket and a task
XL_SESSIONS_MAX: Final = 512  # departing ones of `korora xl`, all workers together
XL_SESSIONS_DEFAULT: Final = 16
XL: Final = "xl"  # what the sessions of `korora xl` came by, where an ingress has its name
SECONDS_MAX: Final = 86_400  # a day: whoever waits longer than that waits for ever
RESUME_SECONDS_MAX: Final = 3600
TENANT_DEFAULT: Final = "default"  # as of the ad hoc commands
STORE_BYTES_MAX: Final = 2**50  # 1 PiB: whoever writes more has mistaken the unit
UNIX_PATH_BYTES_MAX: Final = 107  # sun_path without its NUL, unix(7)

_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"  # as a certificate's, and as OFFER's egress
_PIN: Final = r"^(?:sha256:)?[0-9A-Fa-f]{64}\Z"
_RATE: Final = re.compile(
    r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,6})?) ?(?P<prefix>[kKMGT]i?)?(?P<unit>B|bit)/s", re.ASCII
)
_PREFIXES: Final = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 2**10,
    "ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}

_RATE_EXPECTED: Final = f'an integer of bytes a second, ≥ {RATE_MIN}, or a string like "200 MiB/s"'

Name = Annotated[
    str,
    Meta(
        pattern=_NAME,
        description="a name of 1 to 63 letters, digits, dots, dashes and underscores, a letter or digit first",
    ),
]
Pin = Annotated[str, Meta(pattern=_PIN, description="a SHA-256 of 64 hexadecimal digits")]
Rate = Annotated[Annotated[int, Meta(ge=RATE_MIN)] | str | None, Meta(description=_RATE_EXPECTED)]
Priority = Literal["low", "normal", "high"]
Encoding = Literal["auto", "opaque", "pages", "best"]


class Listen(Table, frozen=True):
    """`[listen]`: where other relays reach this one."""

    address: str = ":8010"
    lanes: Annotated[int, Meta(ge=1, le=LANES_MAX)] = 1


class Limits(Table, frozen=True):
    """`[limits]`. Rates in bytes a second, times in seconds."""

    rate_limit: Rate = None
    session_rate_limit: Rate = None
    resume_timeout: Annotated[int, Meta(ge=0, le=RESUME_SECONDS_MAX)] = 30
    drain_timeout: Annotated[int, Meta(ge=0, le=SECONDS_MAX)] = 900


class Pages(Table, frozen=True):
    """`[pages]`: what may be remembered of guests' memory. Sizes in bytes; 0 turns a thing off."""

    cache_bytes: Annotated[int, Meta(ge=0, le=CACHE_SLOTS_MAX * PAGE_BYTES)] = CACHE_BYTES_DEFAULT
    chains: Annotated[int, Meta(ge=1, le=CHAINS_MAX)] = CHAINS_DEFAULT
    store_bytes: Annotated[int, Meta(ge=0, le=STORE_BYTES_MAX)] = STORE_BYTES_DEFAULT


class Metrics(Table, frozen=True):
    """`[metrics]`: where Prometheus reads; an empty address turns it off."""

    address: str = "127.0.0.1:9464"


class Xl(Table, frozen=True):
    """`[xl]`: where `korora xl` of this host hands xl's migrations over; an empty socket turns it off."""

    socket: str = ""
    sessions_max: Annotated[int, Meta(ge=1, le=XL_SESSIONS_MAX)] = XL_SESSIONS_DEFAULT
    peers: tuple[Name, ...] = ()
    any_address: bool = False
    egress: Name = "default"
    lanes: Annotated[int, Meta(ge=1, le=LANES_MAX)] = 1
    priority: Priority = "normal"
    rate_limit: Rate = None
    encode: Encoding = "auto"
    tenant: Name = TENANT_DEFAULT


class Peer(Table, frozen=True):
    """`[[peer]]`: a host that sessions may come from, and, with an address, go to."""

    name: Name
    address: str | None = None
    pins: tuple[Pin, ...] = ()


class Ingress(Table, frozen=True, rename={"source": "from"}):
    """`[[ingress]]`: where a local hypervisor's migrations leave, and to whom they go."""

    name: Name
    source: str
    peer: Name
    egress: Name = "default"
    lanes: Annotated[int, Meta(ge=1, le=LANES_MAX)] = 1
    priority: Priority = "normal"
    rate_limit: Rate = None
    encode: Encoding = "auto"
    tenant: Name = TENANT_DEFAULT
    xl_flags: str | None = None
    qmp: str | None = None
    require_guarded: bool = False


Departure = Ingress | Xl
"""What sessions leave by: both say where to, how fast and how."""


class Egress(Table, frozen=True):
    """`[[egress]]`: a name that sources may ask for, and the local hypervisor it stands for."""

    name: Name
    to: str
    peers: tuple[Name, ...] = ()
    tenant: Name = TENANT_DEFAULT
    qmp: str | None = None
    require_guarded: bool = False


class Config(Table, frozen=True):
    """The whole file."""

    identity: str = "/etc/korora/identity"
    state: str = "/var/lib/korora"
    control: str = "/run/korora/control.sock"
    policy: str = ""
    approvals: str = "/run/korora/approve.sock"
    attestation: str = ""
    tpm: str = ""
    preflight: Literal["on", "off", "strict"] = "on"
    workers: Annotated[int, Meta(ge=0, le=WORKERS_MAX)] = 0
    sessions_max: Annotated[int, Meta(ge=1, le=SESSIONS_MAX)] = SESSIONS_DEFAULT
    allow_classical: bool = False
    listen: Listen = Listen()
    limits: Limits = Limits()
    pages: Pages = Pages()
    metrics: Metrics = Metrics()
    xl: Xl = Xl()
    peer: tuple[Peer, ...] = ()
    ingress: Annotated[tuple[Ingress, ...], Meta(max_length=INGRESSES_MAX)] = ()
    egress: tuple[Egress, ...] = ()

    def peer_named(self, name: str) -> Peer:
        """The peer of that name; every name that a checked configuration uses is in its table."""
        return next(peer for peer in self.peer if peer.name == name)

    def egress_named(self, name: str) -> Egress | None:
        """The egress of that name, if there is one."""
        return next((egress for egress in self.egress if egress.name == name), None)

    def ingress_named(self, name: str) -> Ingress | None:
        """The ingress of that name, if there is one."""
        return next((ingress for ingress in self.ingress if ingress.name == name), None)

    def departure_named(self, name: str) -> Departure | None:
        """The ingress of that name, or `[xl]`, if it is there."""
        return self.xl if name == XL and self.xl.socket else self.ingress_named(name)

    def xl_peers(self) -> tuple[Peer, ...]:
        """The hosts that `korora xl` may send to."""
        return tuple(peer for peer in self.peer if not self.xl.peers or peer.name in self.xl.peers)


def read(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigurationError: it cannot be read, is too long, or something in it is wrong.
    """
    try:
        content, _ = read_bounded(path, CONFIG_BYTES_MAX)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}", "give a file that exists") from None
    except ValueError as error:
        raise ConfigurationError(f"{path}: it is {error}", "give a file of TOML") from None
    return parse(content, str(path))


def parse(content: bytes, where: str) -> Config:
    """Check a configuration.

    Args:
        content: TOML, UTF-8.
        where: what errors call it.

    Raises:
        ConfigurationError: something in it is wrong; the message names `where` and the key.
    """
    return convert(tables.load(content, where, "docs/daemon.md"), where)


def convert(raw: dict[str, Any], where: str) -> Config:
    """Check what TOML held. See ``parse``."""
    config = tables.convert(raw, Config, where)
    _Check(where, config).run()
    return config


def bytes_per_second(rate: Rate) -> float | None:
    """A rate as a number.

    Args:
        rate: bytes a second, or a number with its unit: "200 MiB/s", "1.5 Gbit/s"; None for no limit.

    Raises:
        ValueError: it is no rate, or less than `RATE_MIN`.
    """
    if rate is None or isinstance(rate, int):
        value = rate
    else:
        match = _RATE.fullmatch(rate)
        if match is None:
            raise ValueError(f"{rate!r} is no rate")
        scale = _PREFIXES[match["prefix"] or ""] / (8 if match["unit"] == "bit" else 1)
        value = float(match["number"]) * scale  # type: ignore[assignment]  # mypy keeps to the int of above
    if value is not None and value < RATE_MIN:
        raise ValueError(f"a rate below {RATE_MIN} bytes a second")
    return None if value is None else float(value)


# ---------------------------------------------------------------- what the types cannot say


class _Check:
    """One configuration held against itself."""

    def __init__(self, where: str, config: Config) -> None:
        self._where, self._config = where, config

    def run(self) -> None:
        """Check everything; the first thing wrong is raised."""
        config = self._config
        for key, path in (("identity", config.identity), ("state", config.state), ("control", config.control)):
            self._path(key, path)
        self._socket("control", config.control)
        self._address("listen.address", config.listen.address)
        if config.metrics.address:
            self._address("metrics.address", config.metrics.address)
        self._rate("limits.rate_limit", config.limits.rate_limit)
        self._rate("limits.session_rate_limit", config.limits.session_rate_limit)
        for table in ("peer", "ingress", "egress"):
            self._distinct(table, "name", [entry.name for entry in getattr(config, table)])
        for number, peer in enumerate(config.peer):
            if peer.address is not None and not self._address(f"peer[{number}].address", peer.address)[0]:
                self._wrong(f"peer[{number}].address", f"expected HOST:PORT with a host, got {peer.address!r}")
        for number, ingress in enumerate(config.ingress):
            self._ingress(f"ingress[{number}]", ingress)
        fixed = [ingress.source for ingress in config.ingress if not re.fullmatch(r"tcp:.*:0+", ingress.source)]
        self._distinct("ingress", "from", fixed)
        for number, egress in enumerate(config.egress):
            self._egress(f"egress[{number}]", egress)
        if config.xl.socket:
            self._xl(config.xl)
        if not config.ingress and not config.egress and not config.xl.socket:
            self._wrong("ingress", "there is neither an [[ingress]] nor an [[egress]]", "add what is to be served")

    def _ingress(self, key: str, ingress: Ingress) -> None:
        if ingress.source.partition(":")[0] not in {"tcp", "unix"}:
            self._wrong(f"{key}.from", f"expected tcp:HOST:PORT or unix:PATH, got {ingress.source!r}")
        with _Told(self._where, f"{key}.from"):
            parse_ingress(ingress.source)
        peer = self._known(f"{key}.peer", ingress.peer)
        if peer.address is None:
            self._wrong(f"{key}.peer", f"peer {peer.name!r} has no address", "give that [[peer]] an address")
        self._rate(f"{key}.rate_limit", ingress.rate_limit)
        with _Told(self._where, f"{key}.xl_flags"):
            parse_xl_flags(ingress.xl_flags or "", "it")
        self._monitor(f"{key}.qmp", ingress.qmp)
        if ingress.qmp is not None and ingress.xl_flags is not None:
            self._wrong(f"{key}.qmp", "what comes by an ingress with xl_flags is xl", "leave one of the two away")

    def _xl(self, xl: Xl) -> None:
        self._path("xl.socket", xl.socket)
        self._socket("xl.socket", xl.socket)
        if xl.socket == self._config.control:
            self._wrong("xl.socket", "it is the control socket's path", "give it one of its own")
        for number, name in enumerate(xl.peers):
            self._known(f"xl.peers[{number}]", name)
        if not any(peer.address or xl.any_address for peer in self._config.xl_peers()):
            self._wrong("xl", "there is no [[peer]] with an address that it could send to", "add one")
        self._rate("xl.rate_limit", xl.rate_limit)
        if self._config.ingress_named(XL) is not None:
            self._wrong("ingress", f"the name {XL!r} is that of [xl]", "give the ingress another one")

    def _egress(self, key: str, egress: Egress) -> None:
        with _Told(self._where, f"{key}.to"):
            parse_egress(egress.to)
        if egress.to.startswith("stdio:"):
            self._wrong(f"{key}.to", "a daemon has no standard streams to give", "use korora receive for stdio:")
        self._monitor(f"{key}.qmp", egress.qmp)
        if egress.qmp is not None and egress.to.startswith("xl:"):
            self._wrong(f"{key}.qmp", "xl: is guarded by itself, and has no QEMU to be asked", "leave it away")
        for number, name in enumerate(egress.peers):
            self._known(f"{key}.peers[{number}]", name)
        if not self._config.peer:
            self._wrong(key, "nobody could use it: there is no [[peer]]", "name the hosts that may send")

    def _known(self, key: str, name: str) -> Peer:
        known = next((peer for peer in self._config.peer if peer.name == name), None)
        if known is None:
            self._wrong(key, f"{name!r} is no [[peer]] of this file", "add it, or correct the name")
        return known

    def _distinct(self, table: str, key: str, values: Sequence[str]) -> None:
        for value, count in Counter(values).items():
            if count > 1:
                self._wrong(table, f"{count} entries have the {key} {value!r}", f"each needs a {key} of its own")

    def _path(self, key: str, path: str) -> None:
        if not path.startswith("/") or "\0" in path:
            self._wrong(key, f"expected an absolute path, got {path!r}")

    def _monitor(self, key: str, text: str | None) -> None:
        if text is None:
            return
        with _Told(self._where, key):
            path = parse_monitor(text)
        self._path(key, path)

    def _socket(self, key: str, path: str) -> None:
        if len(path.encode()) > UNIX_PATH_BYTES_MAX:
            self._wrong(key, f"the path of a unix socket has at most {UNIX_PATH_BYTES_MAX} bytes")

    def _address(self, key: str, text: str) -> tuple[str, int]:
        with _Told(self._where, key):
            return parse_address(text, "the address")

    def _rate(self, key: str, rate: Rate) -> None:
        try:
            bytes_per_second(rate)
        except ValueError:
            self._wrong(key, f"expected {_RATE_EXPECTED}, got {rate!r}")

    def _wrong(self, key: str, words: str, remedy: str = "correct the file") -> NoReturn:
        raise ConfigurationError(f"{self._where}: {key}: {words}", remedy)


class _Told:
    """Puts file and key before what a parser of the command line says."""

    def __init__(self, where: str, key: str) -> None:
        self._prefix = f"{where}: {key}: "

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, ConfigurationError):
            raise ConfigurationError(self._prefix + str(error), error.remedy) from None

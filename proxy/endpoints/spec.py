"""ENDPOINT of the command line: tcp:HOST:PORT · unix:PATH · stdio: · file:PATH · exec:COMMAND · xl:[FLAGS]."""

import re
from typing import Final

from proxy.endpoints.base import Egress, Ingress
from proxy.endpoints.files import FileEgress, FileIngress
from proxy.endpoints.pipes import ExecEndpoint, StdioEndpoint
from proxy.endpoints.sockets import TcpEgress, TcpIngress, UnixEgress, UnixIngress
from proxy.endpoints.xl import XlEgress
from proxy.errors import ConfigurationError

FORMS: Final = "tcp:HOST:PORT, unix:PATH, stdio:, file:PATH, exec:COMMAND"
UNIX_PATH_BYTES_MAX: Final = 107  # sun_path without its NUL, unix(7)

_ADDRESS: Final = re.compile(r"^(?:\[(?P<v6>[0-9A-Fa-f:.%a-z]+)\]|(?P<host>[^:\s\[\]]*)):(?P<port>[0-9]{1,5})\Z")
_XL_FLAGS: Final = re.compile(r"^[edp]{0,3}\Z")


def parse_address(text: str, what: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT.

    Raises:
        ConfigurationError: it is neither, or the port is over 65535.
    """
    match = _ADDRESS.match(text)
    if match is None or int(match["port"]) > 0xFFFF:
        raise ConfigurationError(
            f"{what} {text!r} is no HOST:PORT", "write for instance 192.0.2.7:8010 or [2001:db8::7]:8010"
        )
    host = match["v6"] or match["host"]
    try:
        host.encode("idna")
    except UnicodeError:
        raise ConfigurationError(f"{what} {text!r}: {host!r} is no host name", "give a name or an address") from None
    return host, int(match["port"])


def _split(text: str, forms: str) -> tuple[str, str]:
    kind, colon, rest = text.partition(":")
    if not colon:
        raise ConfigurationError(f"{text!r} is no endpoint", f"write one of {forms}")
    return kind, rest


def _path(text: str, rest: str) -> str:
    if not rest or "\0" in rest:
        raise ConfigurationError(f"{text!r} names no path", "write the path after the colon")
    return rest


def _unix_path(text: str, rest: str) -> str:
    path = _path(text, rest)
    if len(path.encode(errors="surrogateescape")) > UNIX_PATH_BYTES_MAX:
        raise ConfigurationError(
            f"{text!r}: the path of a unix socket has at most {UNIX_PATH_BYTES_MAX} bytes", "use a shorter path"
        )
    return path


def parse_monitor(text: str) -> str:
    """The path of a QEMU's monitor, which ``--qmp`` names as unix:PATH.

    Raises:
        ConfigurationError: it names none.
    """
    kind, _, rest = text.partition(":")
    if kind != "unix":
        raise ConfigurationError(
            f"{text!r} is no monitor", "write unix:PATH, as QEMU's -qmp unix:PATH,server=on,wait=off"
        )
    return _unix_path(text, rest)


def parse_ingress(text: str) -> Ingress:
    """What ``--from`` names.

    Raises:
        ConfigurationError: it is no endpoint.
    """
    kind, rest = _split(text, FORMS)
    match kind:
        case "tcp":
            host, port = parse_address(rest, "the endpoint's address")
            return TcpIngress(host, port, text)
        case "unix":
            return UnixIngress(_unix_path(text, rest), text)
        case "stdio" if not rest:
            return StdioEndpoint()
        case "file":
            return FileIngress(_path(text, rest), text)
        case "exec" if rest.strip():
            return ExecEndpoint(rest, text)
    raise ConfigurationError(f"{text!r} is no endpoint a migration can come from", f"write one of {FORMS}")


def parse_egress(text: str) -> Egress:
    """What ``--to`` names.

    Raises:
        ConfigurationError: it is no endpoint.
    """
    forms = f"{FORMS}, xl:[FLAGS]"
    kind, rest = _split(text, forms)
    match kind:
        case "tcp":
            host, port = parse_address(rest, "the endpoint's address")
            if port == 0:
                raise ConfigurationError(f"{text!r}: nobody can be reached on port 0", "give the hypervisor's port")
            return TcpEgress(host or "127.0.0.1", port, text)
        case "unix":
            return UnixEgress(_unix_path(text, rest), text)
        case "stdio" if not rest:
            return StdioEndpoint()
        case "file":
            return FileEgress(_path(text, rest), text)
        case "exec" if rest.strip():
            return ExecEndpoint(rest, text)
        case "xl":
            return XlEgress(parse_xl_flags(rest, "xl:"), text)
    raise ConfigurationError(f"{text!r} is no endpoint a migration can go to", f"write one of {forms}")


def parse_xl_flags(text: str, what: str) -> str:
    """Flags of xl migrate-receive: "-e -p", "-ep" or "ep" gives "ep".

    Raises:
        ConfigurationError: there are others among them.
    """
    flags = text.replace("-", "").replace(" ", "")
    if not _XL_FLAGS.match(flags):
        raise ConfigurationError(f"{what} {text!r}: unknown flags of xl", f"{what} takes -e, -d and -p")
    return flags

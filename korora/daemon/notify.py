"""Talk to the service manager: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3)."""

import os
import socket
import stat
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Final

from proxy.errors import ConfigurationError

LISTEN_FDS_START: Final = 3  # sd_listen_fds(3)
LISTEN_FDS_MAX: Final = 1024
RELAY, CONTROL, METRICS, XL = "relay", "control", "metrics", "xl"
INGRESS_PREFIX: Final = "ingress-"


class Notifier:
    """Tells the service manager how we are; silent where there is none, and where it does not listen.

    Args:
        environ: its variables for us are taken out, so that no child speaks in our name.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        path = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        interval, process = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = not process or process == str(os.getpid())
        self.watchdog_seconds = int(interval) / 2e6 if ours and interval.isdigit() and int(interval) else None
        """How often WATCHDOG=1 is due: twice as often as it is missed; None where nobody watches."""

    def send(self, **variables: str | int) -> None:
        """Send variables in one datagram; STATUS is for people."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in variables.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), self._address)


def inherited(environ: MutableMapping[str, str]) -> dict[str, socket.socket]:
    """The listening sockets that the service manager has opened for us, by name.

    Args:
        environ: its variables for us are taken out, so that no child takes them for its own.

    Raises:
        ConfigurationError: a name that says nothing to us, or what is no listening stream socket.
    """
    process, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "")
    if process != str(os.getpid()) or not count.isdigit() or not 0 < int(count) <= LISTEN_FDS_MAX:
        return {}
    named = names.split(":") if names else []
    sockets: dict[str, socket.socket] = {}
    for number in range(int(count)):
        name = named[number] if number < len(named) else ""
        if name in sockets or not (name in {RELAY, CONTROL, METRICS, XL} or name.startswith(INGRESS_PREFIX)):
            raise ConfigurationError(
                f"socket {number} of LISTEN_FDS has the name {name!r}",
                f"set FileDescriptorName= to {RELAY}, {CONTROL}, {METRICS}, {XL} or {INGRESS_PREFIX}NAME, each once",
            )
        sockets[name] = _listening(LISTEN_FDS_START + number, name)
    return sockets


def _listening(fd: int, name: str) -> socket.socket:
    """Take over a descriptor that must be a listening socket, of packets for `korora xl` and else of a stream."""
    kind, words = socket.SOCK_STREAM, ("stream", "ListenStream=")
    if name == XL:
        kind, words = socket.SOCK_SEQPACKET, ("packet", "ListenSequentialPacket=")
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError
        sock = socket.socket(fileno=fd)
        if sock.type != kind or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError
    except OSError:
        raise ConfigurationError(
            f"the inherited socket {name!r} is no listening {words[0]} socket", f"give it {words[1]} and Accept=no"
        ) from None
    os.set_inheritable(fd, False)
    sock.setblocking(False)
    return sock

"""What the parent listens on beside the ingresses: the relay port, the metrics port, the control and the xl socket."""

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from korora.daemon import notify
from korora.daemon.config import Config
from korora.daemon.control import Answer, ControlServer, Request
from korora.daemon.door import Door, Route
from korora.daemon.metering import Metering
from korora.daemon.ways import Listening
from korora.policy.board import Board
from korora.policy.desk import Desk
from korora.xl import door as xl
from proxy.endpoints.sockets import GivenIngress, UnixIngress, listen_tcp
from proxy.endpoints.spec import parse_address


class Listeners:
    """Opened one by one, so that what is wrong with one shows before anything runs.

    Args:
        inherited: listening sockets that the service manager has opened, by name; those used are taken out.
    """

    def __init__(self, inherited: dict[str, socket.socket]) -> None:
        self._inherited = inherited
        self._door: Door | None = None
        self._xl_door: xl.XlDoor | None = None
        self._control: ControlServer | None = None
        self._desk: Desk | None = None
        self._sockets: list[Listening] = []
        self.metering: Metering | None = None
        """What all processes count into; None where nothing is counted."""

    @property
    def address(self) -> str | None:
        """HOST:PORT where other relays reach this one; None where they do not."""
        return None if self._door is None else self._door.address

    def open_relay(self, wanted: Config, route: Route) -> None:
        """The relay port, where there is anything behind it.

        Raises:
            ConfigurationError: it cannot be listened on; and so with the others.
        """
        relay = self._inherited.pop(notify.RELAY, None)
        if relay is None and wanted.egress:
            relay = listen_tcp(*parse_address(wanted.listen.address, "the address"), wanted.listen.address)
        if relay is not None:
            self._door = Door(relay, route)

    async def open_metrics(
        self,
        wanted: Config,
        *,
        health: Callable[[], str | None],
        ready: Callable[[], str | None],
        status: Callable[[], Awaitable[object]],
    ) -> None:
        """The metrics port, where it is not turned off."""
        given = self._inherited.pop(notify.METRICS, None)
        if given is None:
            if not wanted.metrics.address:
                return
            given = listen_tcp(*parse_address(wanted.metrics.address, "the address"), wanted.metrics.address)
        self.metering = Metering(Path(wanted.state))
        await self.metering.start(given, health=health, ready=ready, status=status)

    async def open_control(self, path: str, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        """The control socket; it answers from now on."""
        listener = await self._unix(notify.CONTROL, path, socket.SOCK_STREAM)
        self._control = ControlServer(listener.dup(), answer)
        await self._control.start()

    async def open_xl(self, path: str, route: xl.Route, greeted: Callable[[], int]) -> None:
        """The xl socket, where one is wanted; it takes nobody before ``start``."""
        if path or notify.XL in self._inherited:
            listener = await self._unix(notify.XL, path, socket.SOCK_SEQPACKET)
            self._xl_door = xl.XlDoor(listener, route, greeted)

    async def open_approvals(self, path: str, folder: Path) -> None:
        """Where people approve of migrations, if a socket for that is wanted."""
        if path and self._desk is None:
            desk = Desk(path, Board(folder))
            await desk.start()
            self._desk = desk  # not before: a reload that could not open it is followed by one that may

    async def _unix(self, name: str, path: str, kind: socket.SocketKind) -> socket.socket:
        given = self._inherited.pop(name, None)
        label = f"unix:{path}"
        listening = UnixIngress(path, label, kind) if given is None else GivenIngress(given, label)
        await listening.open()
        self._sockets.append(listening)
        if listening.listener is None:
            raise RuntimeError(f"{label} is open, and has no socket")
        return listening.listener

    def start(self) -> None:
        """Take sessions; who came before has waited in the backlogs."""
        if self._door is not None:
            self._door.open()
        if self._xl_door is not None:
            self._xl_door.open()

    async def close_doors(self) -> None:
        """Take no session any more."""
        if self._door is not None:
            await self._door.close()
        if self._xl_door is not None:
            self._xl_door.close()

    async def close(self) -> None:
        """Close what is left; all workers have ended."""
        if self._control is not None:
            await self._control.close()
        if self._desk is not None:
            await self._desk.close()
        for listening in self._sockets:
            await listening.close()
        if self.metering is not None:
            await self.metering.close()

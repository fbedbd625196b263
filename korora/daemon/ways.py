"""The ingresses as the parent has them: opened here, served by a worker each."""

import asyncio
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from korora.daemon import notify
from korora.daemon.config import Ingress
from korora.daemon.crew import Member
from korora.daemon.messages import Serve
from proxy.endpoints.sockets import GivenIngress, TcpIngress, UnixIngress
from proxy.endpoints.spec import parse_ingress
from proxy.errors import ConfigurationError

Listening = TcpIngress | UnixIngress | GivenIngress

_ORDER: Final = {"high": 0, "normal": 1, "low": 2}


@dataclass(slots=True)
class Way:
    """One ingress: its listening socket and the number of the worker that serves it."""

    name: str
    source: str
    ingress: Listening
    worker: int
    leaving: bool = False


class Ways:
    """All ingresses.

    Args:
        inherited: listening sockets that the service manager has opened, by name; those used are taken out.
        workers: how many there are.
    """

    def __init__(self, inherited: dict[str, socket.socket], workers: int) -> None:
        self._inherited, self._workers = inherited, workers
        self._ways: dict[str, Way] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Way]:
        return iter(list(self._ways.values()))

    def __len__(self) -> int:
        return len(self._ways)

    def get(self, name: str) -> Way | None:
        """The one of that name."""
        return self._ways.get(name)

    def of(self, worker: int) -> list[Way]:
        """Those that a worker serves."""
        return [way for way in self._ways.values() if way.worker == worker]

    async def open(self, ingresses: Iterable[Ingress]) -> list[Way]:
        """Open them, all or none, and give each a worker; they are not among the others before ``add``.

        Raises:
            ConfigurationError: one cannot be listened on.
        """
        made: list[Way] = []
        try:
            for ingress in sorted(ingresses, key=lambda entry: _ORDER[entry.priority]):
                burden = [way.worker for way in (*self._ways.values(), *made)]
                made.append(await self._opened(ingress, min(range(self._workers), key=burden.count)))
        except ConfigurationError:
            for way in made:
                await way.ingress.close()
            raise
        return made

    async def _opened(self, ingress: Ingress, worker: int) -> Way:
        given = self._inherited.pop(notify.INGRESS_PREFIX + ingress.name, None)
        listening = parse_ingress(ingress.source) if given is None else GivenIngress(given, ingress.source)
        if not isinstance(listening, Listening):
            raise ConfigurationError(f"{ingress.source} is nothing to listen on", "use tcp: or unix:")
        await listening.open()
        return Way(ingress.name, ingress.source, listening, worker)

    def add(self, ways: Iterable[Way]) -> None:
        """They belong to the others from now on."""
        self._ways |= {way.name: way for way in ways}

    @staticmethod
    def give(member: Member, way: Way) -> None:
        """Let a worker serve it."""
        listener = way.ingress.listener
        if listener is not None and member.ready:
            member.send(Serve(way.name, way.ingress.label), listener.fileno())

    def forget(self, way: Way) -> None:
        """It is served no longer: close it here, too."""
        self._ways.pop(way.name, None)
        task = asyncio.get_running_loop().create_task(way.ingress.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all."""
        for way in self:
            self.forget(way)
        await asyncio.gather(*self._closing)

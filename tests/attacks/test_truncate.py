"""Connections cut at every kind of boundary, by FIN and by RST, one or all of them; and connections that fall silent.

Nothing cut may look whole: to a hypervisor a stream ends cleanly only where all of it has arrived and been checked.
"""

import asyncio
import socket
from collections.abc import Iterable
from contextlib import suppress

import pytest

from proxy.endpoints.sockets import TcpEgress
from proxy.errors import PeerLost
from proxy.shell.source import Peer
from tests.attacks.mitm import Action, Attack, Cut, Mitm, Stall
from tests.attacks.points import (
    BACKWARD,
    FORWARD,
    Control,
    Which,
    end,
    final,
    first_data,
    hello,
    middle_ack,
    prefix,
    tls,
)
from tests.attacks.relays import (
    BOUND_SECONDS,
    CONVERSATION,
    Identities,
    Receiver,
    StubHypervisor,
    attacked,
    attacked_all,
    on_uvloop,
    send,
    shorten,
)
from tests.attacks.wire import HEADER_BYTES, TAG_BYTES, TLS_HEADER_BYTES, Unit, Way

Codes = set[tuple[int | None, int | None]]
REFUSED: Codes = {(4, 4)}
LOST: Codes = {(6, 6)}
DONE: Codes = {(0, 0)}

NOTHING, WHOLE = 0, -1
IN_TLS = (TLS_HEADER_BYTES - 2, TLS_HEADER_BYTES + 9, WHOLE)  # in the header, in the ciphertext, behind the record
IN_RECORD = (HEADER_BYTES // 2, HEADER_BYTES + 3, -(TAG_BYTES // 2), WHOLE)  # header, ciphertext, tag, behind it


class Strike:
    """Forward so many bytes of the first unit that is meant, then act.

    Args:
        way: the unit's way.
        which: tells the unit.
        kept: bytes to forward; negative: all but so many, `WHOLE` everything.
        action: what then.
    """

    def __init__(self, way: Way, which: Which, kept: int, action: Action) -> None:
        self._way, self._which, self.kept, self._action = way, which, kept, action
        self.done = False

    def __call__(self, unit: Unit) -> Iterable[Action]:
        """See `Attack`."""
        if self.done or unit.way is not self._way or not self._which(unit):
            return (unit.data,)
        self.done = True
        kept = self.kept if self.kept >= 0 else len(unit.data) + 1 + self.kept
        return (unit.data[:kept], self._action)


ACTIONS: dict[str, Action] = {
    "one FIN": Cut(),
    "one RST": Cut(reset=True),
    "every FIN": Cut(everything=True),
    "every RST": Cut(reset=True, everything=True),
    "one silent": Stall(),
    "all silent": Stall(everything=True),
}

Point = tuple[Way, Which, tuple[int, ...], Codes, Codes]
"""Where, after how many bytes; the codes allowed where the unit is cut short, and where it is whole."""


def points(control: Control, action: Action) -> dict[str, Point]:
    """Every kind of boundary, with the codes that both ends may end with."""
    alone = not action.everything if isinstance(action, Cut | Stall) else True
    silent = isinstance(action, Stall)
    # A lane's hello that fails alone is made anew; a session cannot go on without its control connection.
    anew = DONE if alone else LOST
    # Silence in one way after the last record that way: what matters went the other way.
    late = LOST | DONE if silent and alone else LOST
    # The destination may have agreed, and the source not know: the one case that no protocol can exclude.
    generals: Codes = {(6, 0)}
    return {
        "hello": (FORWARD, tls(0), IN_TLS, REFUSED, REFUSED),
        "certificate": (BACKWARD, tls(4), (NOTHING, *IN_TLS), REFUSED, REFUSED),
        "source's flight": (FORWARD, tls(control.offer - 2), (NOTHING, *IN_TLS), REFUSED, REFUSED),
        "OFFER": (FORWARD, tls(control.offer), (NOTHING, *IN_TLS), REFUSED, {(4, 6), (6, 6)}),
        "ACCEPT": (BACKWARD, tls(control.accept), (NOTHING, *IN_TLS), {(4, 6)}, LOST),
        "token": (FORWARD, prefix, (NOTHING, 1, 10, WHOLE), anew, anew),
        "HELLO": (FORWARD, hello, (NOTHING, *IN_RECORD), anew, LOST if silent else anew),
        "LANE_OK": (BACKWARD, hello, (NOTHING, *IN_RECORD), anew, LOST),
        "CHANNEL_OPEN": (FORWARD, control.message("CHANNEL_OPEN"), (NOTHING, *IN_TLS), LOST, LOST),
        "CHANNEL_OPENED": (BACKWARD, control.message("CHANNEL_OPENED"), (NOTHING, *IN_TLS), LOST, LOST | generals),
        "data": (FORWARD, first_data, (NOTHING, *IN_RECORD), LOST, LOST),
        "acknowledgement": (FORWARD, middle_ack, (NOTHING, *IN_RECORD), LOST, LOST),
        "END": (FORWARD, end, (NOTHING, *IN_RECORD), LOST, late),
        "answer": (BACKWARD, first_data, (NOTHING, *IN_RECORD), LOST, LOST),
        "answer's acknowledgement": (BACKWARD, middle_ack, (NOTHING, *IN_RECORD), LOST, LOST),
        "answer's END": (BACKWARD, end, (NOTHING, *IN_RECORD), LOST, LOST),
        "FINISH": (FORWARD, control.message("FINISH"), (NOTHING, *IN_TLS), LOST, late | LOST | generals),
        "FINISHED": (BACKWARD, control.message("FINISHED"), (NOTHING, *IN_TLS), generals, DONE),
        "FINAL": (FORWARD, final, (NOTHING, *IN_RECORD), DONE, DONE),
        "answer's FINAL": (BACKWARD, final, (NOTHING, *IN_RECORD), DONE, DONE),
    }


@pytest.mark.parametrize("name", ACTIONS)
@on_uvloop
async def test_every_kind_of_boundary(identities: Identities, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    clean = Control.of(await attacked(identities))
    action = ACTIONS[name]
    if isinstance(action, Stall):
        shorten(monkeypatch, HEARTBEAT_SECONDS=0.4, HANDSHAKE_SECONDS_MAX=2.0, LANE_HELLO_SECONDS_MAX=2.0)
        shorten(monkeypatch, CHANNEL_OPEN_SECONDS_MAX=1.5, HANDOVER_SECONDS_MAX=0.5, CONTROL_SECONDS_MAX=1.0)
    shorten(monkeypatch, ABORT_SECONDS_MAX=0.6, DRAIN_SECONDS_MAX=0.2)
    cases = [
        (point, Strike(way, which, kept, action), whole if kept == WHOLE else short)
        for point, (way, which, places, short, whole) in points(clean, action).items()
        for kept in places
    ]
    outcomes = await attacked_all(identities, list[Attack](strike for _, strike, _ in cases), at_once=30)
    for (point, strike, codes), outcome in zip(cases, outcomes, strict=True):
        assert strike.done, point
        outcome.check_safe()
        assert outcome.codes in codes, (point, strike.kept, str(outcome))
        if codes == REFUSED:
            assert outcome.there == [], (point, strike.kept, str(outcome))
        if codes == DONE:
            outcome.check_exact()


@on_uvloop
async def test_cut_before_the_first_byte(identities: Identities) -> None:
    """For the destination nobody was there; the source has been turned away."""
    outcome = await attacked(identities, Strike(FORWARD, tls(0), NOTHING, Cut()), verdict_seconds=0.3)
    outcome.check_safe()
    assert outcome.codes == (4, None)


@on_uvloop
async def test_hypervisors_are_told_before_the_peer(identities: Identities) -> None:
    """Telling a silent peer takes seconds; the hypervisors do not wait for it."""
    struck = asyncio.Event()

    def attack(unit: Unit) -> Iterable[Action]:
        if unit.way is FORWARD and middle_ack(unit):
            struck.set()
            return (Stall(everything=True),)
        return (unit.data,)

    async with (
        asyncio.timeout(BOUND_SECONDS),
        StubHypervisor(CONVERSATION) as hypervisor,
        Receiver(identities.destination, TcpEgress("127.0.0.1", hypervisor.port, "tcp:egress")) as receiver,
        Mitm(("127.0.0.1", receiver.port), attack) as mitm,
    ):
        sending = asyncio.create_task(
            send(identities.source, Peer("127.0.0.1", mitm.port, resume_seconds=0), CONVERSATION)
        )
        await struck.wait()
        loop = asyncio.get_running_loop()
        began = loop.time()
        receiver.runners[0].stop(PeerLost("pulled out"))
        await hypervisor.sides[0].told()
        assert loop.time() - began < 0.5
        assert hypervisor.sides[0].ended == "reset"
        assert receiver.codes == []  # it still waits for the peer to hear
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


@on_uvloop
async def test_an_egress_connection_that_is_called_off() -> None:
    """The session ends while its hypervisor is being connected to: what has accepted us sees a reset, never an end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        connecting = asyncio.create_task(TcpEgress("127.0.0.1", listener.getsockname()[1], "tcp:egress").connect(""))
        accepted = None
        while accepted is None:
            await asyncio.sleep(0)
            with suppress(BlockingIOError):
                accepted, _ = listener.accept()
        # The kernel has connected, and the task has not been told yet.
        connecting.cancel()
        (result,) = await asyncio.gather(connecting, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError)
        with accepted, pytest.raises(ConnectionResetError):
            accepted.recv(1)

"""What a destination tells a source that comes back late, or that it does not let in at all."""

import asyncio
from dataclasses import dataclass

from crypto.errors import AuthenticationError
from crypto.keys import ResumeSecret, SessionId
from crypto.tls import PeerInfo
from proxy.errors import (
    EXIT_AUTHENTICATION,
    EXIT_DONE,
    EXIT_INTEGRITY,
    EXIT_LOST,
    EXIT_POLICY,
    PeerLost,
    PeerRefused,
    PolicyRefused,
    ProtocolViolation,
    RelayError,
    exit_code_of,
)
from proxy.limits import ENDED_SESSIONS_MAX, HANDSHAKE_SECONDS_MAX
from proxy.shell.arrival import DestinationRunner


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a session ended whose source may not know it.

    Args:
        secret: by which the source proves that the session was its own.
        peer: who it was.
        code: exit code; ``EXIT_DONE`` if all went well.
        reason: in words for people; empty if all went well.
    """

    secret: ResumeSecret
    peer: PeerInfo
    code: int
    reason: str

    def check(self) -> None:
        """Nothing, if all went well.

        Raises:
            RelayError: the session has failed; ``refusal_code`` and message say how, as ABORT would have.
        """
        if self.code != EXIT_DONE:
            raise _Over(self.code, self.reason)


def verdict_on(runner: DestinationRunner) -> Verdict:
    """How a session has ended, or is certain to end."""
    failure = runner.failure
    if failure is None:
        return Verdict(runner.secret, runner.peer, EXIT_DONE, "")
    return Verdict(runner.secret, runner.peer, exit_code_of(failure), str(failure))


class Verdicts:
    """The verdicts that are kept: each for as long as its session could have been resumed, and so many at most."""

    def __init__(self) -> None:
        self._kept: dict[SessionId, tuple[Verdict, asyncio.TimerHandle]] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, session: SessionId) -> bool:
        return session in self._kept

    def get(self, session: SessionId) -> Verdict | None:
        """The verdict on a session; None if there is none any more."""
        kept = self._kept.get(session)
        return None if kept is None else kept[0]

    def keep(self, runner: DestinationRunner) -> None:
        """A session is over: keep the verdict on it; the oldest makes room."""
        while len(self._kept) >= ENDED_SESSIONS_MAX:
            self.forget(next(iter(self._kept)))
        session, seconds = runner.session.id, runner.session.resume_seconds
        timer = asyncio.get_running_loop().call_later(seconds, self.forget, session)
        self._kept[session] = (verdict_on(runner), timer)

    def forget(self, session: SessionId) -> None:
        """Its source knows, or has had its time to ask."""
        kept = self._kept.pop(session, None)
        if kept is not None:
            kept[1].cancel()
        self._changed.set()

    async def told(self) -> None:
        """Wait until none is left."""
        while self._kept:
            self._changed.clear()
            await self._changed.wait()


class _Over(RelayError):
    """The session that is asked for has failed; ``code`` and message say how, as ABORT would have."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def refusal_code(refusal: Exception) -> int:
    """The exit code a refusal stands for at the source."""
    if isinstance(refusal, PolicyRefused):
        return EXIT_POLICY
    if isinstance(refusal, PeerLost):
        return EXIT_LOST
    if isinstance(refusal, ProtocolViolation):
        return EXIT_INTEGRITY
    return refusal.code if isinstance(refusal, _Over) else EXIT_AUTHENTICATION


def as_refusal(error: Exception) -> Exception:
    """Anything that fails before ACCEPT is a failed authentication, but a policy's no."""
    if isinstance(error, AuthenticationError | PolicyRefused | PeerRefused):
        return error
    if isinstance(error, TimeoutError):
        return PeerRefused(f"no complete handshake within {HANDSHAKE_SECONDS_MAX:.0f} s")
    return PeerRefused(str(error))

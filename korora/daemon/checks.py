"""What can be checked of a configuration beyond its file: at the start, by --check, and before a reload."""

import asyncio
import os
from pathlib import Path
from typing import Final

import msgspec

from crypto.files import make_private_directory
from korora.authority import APPROVALS
from korora.daemon import build
from korora.daemon.config import Config
from proxy.errors import ConfigurationError

# What a reload cannot change; the rest of a new file counts.
_FIXED: Final = ("workers", "state", "control", "approvals", "metrics")


async def check(wanted: Config) -> str:
    """Check what a configuration names outside itself: identity, CRL, endpoints; the identity's name.

    Raises:
        CryptoError, ConfigurationError: something is not as it must be.
    """
    credentials = await asyncio.to_thread(build.Credentials.load, wanted)
    await asyncio.to_thread(build.policy_of, wanted)
    await asyncio.to_thread(build.platform_of, wanted)
    for ingress in wanted.ingress:
        build.destination_of(wanted, ingress)
    for egress in build.egresses(wanted).values():
        await egress.check()
    return credentials.identity.name


def make_state(path: Path) -> None:
    """The state directory and what is in it.

    Raises:
        ConfigurationError: it cannot be made or written.
    """
    try:
        for folder in (path, path / build.REPORTS, path / build.LOCKS, path / APPROVALS):
            make_private_directory(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "it may not be written")
    except OSError as error:
        raise ConfigurationError(
            f"the state directory {path} cannot be used: {error.strerror}", "give one that this user may write"
        ) from None


def unchanged(served: Config, wanted: Config, *, listening: bool) -> tuple[Config, list[str]]:
    """A new configuration with what a reload cannot change as it is; and the keys that wait for a restart.

    Args:
        served: what counts now.
        wanted: what the file says.
        listening: whether the relay port is open.
    """
    needed = [key for key in _FIXED if getattr(wanted, key) != getattr(served, key)]
    address, path = served.listen.address, served.xl.socket
    if wanted.listen.address != address or (wanted.egress and not listening):
        needed.append("listen.address")
    if wanted.xl.socket != path:
        needed.append("xl.socket")
    listen = msgspec.structs.replace(wanted.listen, address=address)
    xl = msgspec.structs.replace(wanted.xl, socket=path)
    fixed = {key: getattr(served, key) for key in _FIXED}
    return msgspec.structs.replace(wanted, listen=listen, xl=xl, **fixed), needed

"""What can be checked of a configuration beyond its file: at the start, by --check, and before a reload."""

import asyncio
import os
from pathlib import Path

from crypto.files import make_private_directory
from korora.daemon import build
from korora.daemon.config import Config
from proxy.errors import ConfigurationError


async def check(wanted: Config) -> str:
    """Check what a configuration names outside itself: identity, CRL, endpoints; the identity's name.

    Raises:
        CryptoError, ConfigurationError: something is not as it must be.
    """
    credentials = await asyncio.to_thread(build.Credentials.load, wanted)
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
        for folder in (path, path / build.REPORTS, path / build.LOCKS):
            make_private_directory(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "it may not be written")
    except OSError as error:
        raise ConfigurationError(
            f"the state directory {path} cannot be used: {error.strerror}", "give one that this user may write"
        ) from None

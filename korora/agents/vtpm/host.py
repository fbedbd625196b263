"""Whether this host's relay moves or verifies vTPMs, and where they are: ``vtpm.toml`` in its state directory.

There, and not among a relay's options, because whoever acts on a hand-over has to follow it with the vTPM: the daemon,
``korora xl`` by itself, ``korora handover resolve``. All of them know the state directory.
"""

from pathlib import Path
from typing import Annotated, Final, Literal
from uuid import UUID

from msgspec import Meta

from crypto.files import read_bounded
from korora import tables
from korora.agents.vtpm.carrier import Agent, Places
from korora.agents.vtpm.rehearsal import Keys
from korora.tables import Table
from proxy.errors import ConfigurationError

FILE: Final = "vtpm.toml"
FILE_BYTES_MAX: Final = 16 * 1024
_EXAMPLE: Final = "docs/vtpm.md"
_UNIX_PATH_BYTES_MAX: Final = 107  # sun_path without its NUL, unix(7)
_Place = Annotated[
    str, Meta(pattern=r"^/[^\0]*\{uuid\}[^\0]*\Z", description="an absolute path with {uuid} in it, for the machine's")
]
_Key = Annotated[
    str,
    Meta(
        pattern=r"^(file|pwdfile)=/[^,\0]+(,format=(hex|binary)|,kdf=(sha512|pbkdf2))?,mode=aes-256-cbc\Z",
        description='what swtpm is given, as "file=/PATH,format=hex,mode=aes-256-cbc"',
    ),
]


class HostFile(Table, frozen=True):
    """``vtpm.toml``; see ``carrier.Places`` and ``rehearsal.Keys``."""

    control: _Place | None = None
    state: _Place | None = None
    migration_key: _Key | None = None
    state_key: _Key | None = None
    carried: Literal["off", "verify"] = "off"


def open_agent(state: Path) -> Agent:
    """The vTPM agent of the relay that keeps its state in ``state``.

    Raises:
        ConfigurationError: its ``vtpm.toml`` is not in order.
    """
    path = state / FILE
    try:
        content, _ = read_bounded(path, FILE_BYTES_MAX)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}", f"{_EXAMPLE} has an example") from None
    told = tables.convert(tables.load(content, str(path), _EXAMPLE), HostFile, str(path))
    keys = Keys(told.migration_key or "", told.state_key or "")
    return Agent(_places(told, keys, path), state, verifying=keys if told.carried == "verify" else None)


def _places(told: HostFile, keys: Keys, path: Path) -> Places | None:
    if told.control is None and told.state is None and told.carried == "verify":
        return None
    if told.control is None or told.state is None or told.migration_key is None:
        raise ConfigurationError(
            f"{path}: control, state and migration_key belong together",
            f'name all three, or carried = "verify" for QEMU\'s alone; {_EXAMPLE} has examples',
        )
    longest = told.control.replace("{uuid}", str(UUID(int=0)))
    if len(longest.encode()) > _UNIX_PATH_BYTES_MAX:
        raise ConfigurationError(
            f"{path}: control: a path of more than {_UNIX_PATH_BYTES_MAX} bytes", "a unix socket's is no longer"
        )
    return Places(told.control, told.state, keys)

"""The content store of this host: where its key and its folder are, and how it is opened."""

from pathlib import Path
from typing import Final

from chunking.limits import STORE_BYTES_DEFAULT
from chunking.store import Counters, Store
from chunking.store.writer import Fingerprinter
from crypto.at_rest import HostKeys
from crypto.host_key import HOST_KEY_FILE, host_key

STORE_FOLDER: Final = "store"


def open_store(
    state: Path,
    *,
    bytes_max: int = STORE_BYTES_DEFAULT,
    fingerprint: Fingerprinter | None = None,
    counters: Counters | None = None,
) -> Store:
    """The store in a state directory; key and folder are made on first use.

    Args:
        state: the directory.
        bytes_max: of all that is stored.
        fingerprint: the one that the encoder uses, where pages are written without.
        counters: to count in.

    Raises:
        IdentityError: the host key is not in order.
        StoreUnusable: the folder cannot be used.
    """
    keys = HostKeys(host_key(state / HOST_KEY_FILE))
    return Store(state / STORE_FOLDER, keys, bytes_max=bytes_max, fingerprint=fingerprint, counters=counters)


def is_there(state: Path) -> bool:
    """Whether a store has ever been opened in a state directory."""
    return (state / STORE_FOLDER).is_dir() and (state / HOST_KEY_FILE).exists()

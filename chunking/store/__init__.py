"""The content store: pages of earlier sessions, kept on the disk, sealed, bounded, one tenant apart from the other."""

from chunking.store.counters import Counters
from chunking.store.disk import Disk
from chunking.store.keys import StoreKeys
from chunking.store.store import Forgotten, SegmentInfo, Status, Store, TenantStatus
from chunking.store.view import Agreed, StoreView
from chunking.store.writer import SegmentWriter

__all__ = [
    "Agreed",
    "Counters",
    "Disk",
    "Forgotten",
    "SegmentInfo",
    "SegmentWriter",
    "Status",
    "Store",
    "StoreKeys",
    "StoreView",
    "TenantStatus",
]

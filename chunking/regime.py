"""How much work a frame gets. Which one, chunking/adapt.py chooses."""

from enum import IntEnum


class Regime(IntEnum):
    """Kinds of work, cheapest first; each does what those before it do.

    Everything above RAW finds zero pages and references pages that both sides hold.
    """

    RAW = 0  # the stream's bytes as they are: the engine takes no part
    DEDUP = 1  # zero pages and references; what is new goes as it is
    DELTA = 2  # what is new goes as a difference to the page's last version where it has one
    FAST = 3  # what is left is compressed, at the quickest level that pays
    LIGHT = 4
    FIRM = 5
    BEST = 6  # the fewest bytes: one chain with a long window

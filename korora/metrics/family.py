"""What a metric is: name, kind, labels, help, unit, and how the processes' values of it become one."""

from dataclasses import dataclass
from enum import Enum, Flag, auto, unique
from typing import Final


@unique
class Kind(Enum):
    """Prometheus' kinds of metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@unique
class Merge(Enum):
    """How one value is made of the values that several processes hold of a gauge.

    The ``live`` ones forget a process that has ended; counters and histograms are always summed, the dead included.
    """

    SUM = "livesum"
    MAX = "livemax"
    EARLIEST = "livemin"
    LAST = "max"  # of a point in time: stays when the process that saw it has gone


class Side(Flag):
    """Which process reports a metric from its start on; 0 for one that appears with its first value."""

    WORKER = auto()
    SUPERVISOR = auto()
    BOTH = WORKER | SUPERVISOR


NEVER_BEFORE_A_VALUE: Final = Side(0)

Labels = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Args:
        name: as it is scraped; a counter's ends in ``_total``.
        kind: see ``Kind``.
        help: one sentence without its full stop.
        labels: each with all its values; ``()`` where the configuration bounds them (the number of a worker).
        unit: base unit, the end of the name; empty for a plain count.
        merge: for a gauge.
        side: who reports it from the start, at 0.
        buckets: upper bounds of a histogram, in its unit.
    """

    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    unit: str = ""
    merge: Merge = Merge.SUM
    side: Side = Side.WORKER
    buckets: tuple[float, ...] = ()

    @property
    def base_name(self) -> str:
        """The name without a counter's ``_total``, as OpenMetrics names the family."""
        return self.name.removesuffix("_total") if self.kind is Kind.COUNTER else self.name

    @property
    def sample_names(self) -> tuple[str, ...]:
        """The names its samples have, which are what an expression can ask for."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Its labels, in order."""
        return tuple(name for name, _ in self.labels)

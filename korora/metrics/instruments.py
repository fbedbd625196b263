"""prometheus-client's metrics made from the table of families, alone in one process or shared by several.

prometheus-client chooses between the two by a module global and an environment variable, for every metric of a process
and by what they are when it is first imported. Here both are set only while a value is made, so that nothing depends
on the order of imports and nothing is left behind for child processes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, values
from prometheus_client.multiprocess import MultiProcessCollector

from korora.metrics.families import FAMILIES
from korora.metrics.family import Family, Kind
from korora.metrics.shared import allocate

_DIRECTORY_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"

_Any = Counter | Gauge | Histogram


class Instruments:
    """The metrics of this process, each made when it is first asked for.

    Use ``alone`` or ``shared``. Not for several threads at once, and not across a fork: a worker makes its own.
    """

    def __init__(self, value_class: type[Any], directory: Path | None) -> None:
        self._value_class = value_class
        self._directory = directory
        self._metrics: dict[str, _Any] = {}
        self._children: dict[tuple[str, ...], _Any] = {}

    @classmethod
    def alone(cls) -> Self:
        """Metrics in the memory of this process; ``registry`` reads them."""
        return cls(values.MutexValue, None)

    @classmethod
    def shared(cls, directory: Path, worker: str) -> Self:
        """Metrics in the directory that ``SharedDirectory.prepare`` made; ``shared_registry`` reads those of all.

        Args:
            directory: its path.
            worker: the name of this process, lower-case letters and digits. No two that live may have the same; one
                that is started again takes the name of the one before, and goes on where that stopped.

        Raises:
            ConfigurationError: the disk is full, or there is no such directory.
        """
        allocate(directory, worker)
        process = os.getpid()

        def name() -> str:
            if os.getpid() != process:
                raise RuntimeError("metrics were made before this process was forked off; it must make its own")
            return worker

        # prometheus-client has no types for it.
        value_class = values.MultiProcessValue(name)  # type: ignore[no-untyped-call]
        return cls(value_class, directory)

    def counter(self, family: Family, *labels: str) -> Counter:
        """The counter of these label values, in the order of ``family.labels``."""
        child = self._child(family, labels)
        if not isinstance(child, Counter):
            raise TypeError(f"{family.name} is no counter")
        return child

    def gauge(self, family: Family, *labels: str) -> Gauge:
        """The gauge of these label values, in the order of ``family.labels``."""
        child = self._child(family, labels)
        if not isinstance(child, Gauge):
            raise TypeError(f"{family.name} is no gauge")
        return child

    def histogram(self, family: Family, *labels: str) -> Histogram:
        """The histogram of these label values, in the order of ``family.labels``."""
        child = self._child(family, labels)
        if not isinstance(child, Histogram):
            raise TypeError(f"{family.name} is no histogram")
        return child

    def touch(self, family: Family, *labels: str) -> None:
        """Report it from now on, at 0: a counter that appears with its first event hides that event from rate()."""
        self._child(family, labels)

    def _child(self, family: Family, labels: tuple[str, ...]) -> _Any:
        key = (family.name, *labels)
        child = self._children.get(key)
        if child is None:
            for (label, allowed), value in zip(family.labels, labels, strict=True):
                if allowed and value not in allowed:
                    raise ValueError(f"{family.name} has no {label} {value!r}")
            with self._making():
                metric = self._metrics.get(family.name)
                if metric is None:
                    metric = self._metrics[family.name] = _make(family)
                child = self._children[key] = metric.labels(*labels) if labels else metric
        return child

    @contextmanager
    def _making(self) -> Iterator[None]:
        before = values.ValueClass, os.environ.get(_DIRECTORY_VARIABLE)
        try:
            values.ValueClass = self._value_class
            if self._directory is not None:
                os.environ[_DIRECTORY_VARIABLE] = str(self._directory)
            yield
        finally:
            values.ValueClass = before[0]
            if before[1] is None:
                os.environ.pop(_DIRECTORY_VARIABLE, None)
            else:
                os.environ[_DIRECTORY_VARIABLE] = before[1]

    def registry(self) -> CollectorRegistry:
        """What a scrape reads when there is one process only."""
        registry = CollectorRegistry()
        registry.register(_Ordered(self._collect))
        return registry

    def _collect(self) -> Iterable[Metric]:
        for metric in list(self._metrics.values()):
            yield from metric.collect()


def shared_registry(directory: Path) -> CollectorRegistry:
    """What a scrape reads when several processes share ``directory``."""

    def collect() -> Iterable[Metric]:
        # A file that was opened and not sized yet cannot be read, and says nothing.
        files = [str(path) for path in sorted(directory.glob("*.db")) if _size(path)]
        # As above: no types.
        merged: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return merged

    registry = CollectorRegistry()
    registry.register(_Ordered(collect))
    return registry


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class _Ordered:
    """Gives the families in the order of the table, with their units, and alike for one process and for many."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client.registry.Collector."""
        found = {metric.name: metric for metric in self._collect()}
        for family in FAMILIES:
            metric = found.get(family.base_name)
            if metric is not None:
                metric.unit = family.unit  # the files do not carry it
                # Times of creation are not kept in the files, and are wrong for a worker that goes on counting.
                metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
                yield metric


def _make(family: Family) -> _Any:
    common: dict[str, Any] = {"labelnames": family.label_names, "unit": family.unit, "registry": None}
    match family.kind:
        case Kind.COUNTER:
            return Counter(family.name, family.help, **common)
        case Kind.GAUGE:
            return Gauge(family.name, family.help, multiprocess_mode=family.merge.value, **common)
        case Kind.HISTOGRAM:
            return Histogram(family.name, family.help, buckets=family.buckets, **common)

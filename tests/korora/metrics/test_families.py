"""The table of metrics: names as Prometheus wants them, labels that nobody outside can multiply."""

import re
from collections.abc import Iterator

import pytest

from chunking.regime import Regime
from crypto.errors import AuthenticationError, IntegrityError, ReceiptError, SealBroken, WrapBroken
from crypto.receipts.statement import Stage
from korora.metrics import families, labels, observer
from korora.metrics.families import FAMILIES
from korora.metrics.family import Family, Kind, Merge
from proxy.authority import Point
from proxy.errors import EXIT_INTEGRITY, OUTCOMES, PeerAborted, RelayError
from proxy.handover.table import WRITTEN
from proxy.session import State
from proxy.status import SessionStatus

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
BASE_UNITS = {"", "seconds", "bytes", "bytes_per_second"}


def test_the_table_has_every_family_once() -> None:
    defined = [value for value in vars(families).values() if isinstance(value, Family)]
    assert defined == list(FAMILIES)


def test_no_two_families_share_a_name() -> None:
    """A counter's name without _total is the family's: a gauge of that name would be merged with it."""
    names = [name for family in FAMILIES for name in {family.base_name, *family.sample_names}]
    assert len(names) == len(set(names))


@each_family
def test_names_follow_the_conventions(family: Family) -> None:
    assert re.fullmatch(r"korora_[a-z]+(_[a-z]+)*", family.name)
    assert family.name.endswith("_total") == (family.kind is Kind.COUNTER)
    assert family.unit in BASE_UNITS
    if family.unit:
        assert family.base_name.endswith(f"_{family.unit}")
    else:
        assert not re.search(r"_(seconds|bytes)$", family.base_name)
    assert not family.help.endswith(".")
    assert "|" not in family.help, "the help stands in a table of the page"
    assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM)
    if family.kind is not Kind.GAUGE:
        assert family.merge is Merge.SUM


@each_family
def test_labels_are_bounded(family: Family) -> None:
    """What is outside decides no label: peers, VMs, addresses and sessions are in /status and in reports."""
    series = 1
    for name, values in family.labels:
        assert name in {"role", "state", "outcome", "way", "cause", "kind", "reason", "form", "regime"} or (
            name
            in {"worker", "version", "python", "result", "certificate", "point", "answer", "stage", "signed", "vtpm"}
            or name in {"check", "grade"}
        )
        assert len(values) == len(set(values))
        series *= max(1, len(values))
    assert series <= 40


def test_the_values_of_labels_are_the_program_s() -> None:
    assert set(labels.STATES) == {state.value for state in State} | {"resuming"}
    assert set(labels.OUTCOME[1]) == set(OUTCOMES.values()) | {"interrupted", "died"}
    assert set(labels.REFUSALS) == set(observer.REFUSALS.values())
    assert set(labels.CAUSES) == set(observer.CAUSES.values()) | {"unknown"}
    assert set(labels.REASONS) == set(observer.REASONS.values()) | {"other"}
    assert {f"pages_{kind}" for kind in labels.PAGE_KINDS} <= set(SessionStatus.__slots__)
    assert tuple(regime.name.lower() for regime in Regime) == labels.REGIMES
    assert set(labels.HANDOVER_STATES) == {state.value for state in WRITTEN} | {"unreadable"}
    assert set(labels.DISPUTES) == set(observer.DISPUTES.values())
    assert set(labels.POINTS) == {point.value for point in Point}
    assert set(labels.STAGES) == {stage.value for stage in Stage}
    assert labels.HANDOVER_KINDS == ("xl", "qmp")


def below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


@pytest.mark.parametrize(
    ("root", "names"),
    [(IntegrityError, observer.REFUSALS), (AuthenticationError, observer.REASONS)],
    ids=["records", "peers"],
)
def test_every_class_of_error_has_a_name_of_its_own(
    root: type[BaseException], names: dict[type[BaseException], str]
) -> None:
    classes = [
        kind for kind in below(root) if kind.__module__ == "crypto.errors" and kind not in (SealBroken, WrapBroken)
    ]
    assert len(classes) >= 8
    assert [kind for kind in classes if kind not in names] == []
    given = [names[kind] for kind in classes]
    assert len(given) == len(set(given))


def test_every_class_of_integrity_failure_has_a_cause() -> None:
    classes = [
        kind
        for kind in below(RelayError)
        if getattr(kind, "exit_code", None) == EXIT_INTEGRITY and kind.__module__ == "proxy.errors"
    ]
    assert set(classes) == set(observer.CAUSES) - {IntegrityError, PeerAborted, ReceiptError}

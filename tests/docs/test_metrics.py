"""docs/metrics.md has every metric, label, limit, alert and log event, and none that does not exist.

Where a table of metrics or labels differs, run this file as a program: it writes them anew.
"""

import re
from pathlib import Path

from korora.metrics import http
from korora.metrics.families import FAMILIES
from korora.metrics.family import Family, Side
from korora.metrics.observer import STALL_SECONDS_MAX
from proxy.report import SessionReport
from proxy.status import SessionStatus

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs" / "metrics.md"
PAGE = PATH.read_text(encoding="utf-8")
METRICS = "| metric | type | labels | meaning |"
LABELS = "| label | values |"
# What bounds the labels whose values the program does not list.
BOUNDED_BY = {
    "worker": "the workers' numbers, and `supervisor`",
    "version": "of the program",
    "python": "its version",
}


def row_of(family: Family) -> str:
    labels = ", ".join(f"`{name}`" for name in family.label_names) or "–"
    when = "" if family.side & Side.BOTH else "; when known"
    return f"| `{family.name}` | {family.kind.value} | {labels} | {family.help}{when} |"


def rows_of_labels() -> list[str]:
    """By label, its values; one that means different things in two metrics has a row for each set."""
    seen: dict[tuple[str, tuple[str, ...]], None] = {}
    for family in FAMILIES:
        seen |= dict.fromkeys(family.labels)
    return [
        f"| `{name}` | {', '.join(f'`{value}`' for value in values) or BOUNDED_BY[name]} |" for name, values in seen
    ]


def rows_below(header: str) -> list[str]:
    """The rows of the table with this header."""
    _, found, after = PAGE.partition(f"\n{header}\n")
    assert found, header
    return after.partition("\n\n")[0].splitlines()[1:]


def test_every_metric_with_its_type_labels_and_help() -> None:
    assert rows_below(METRICS) == [row_of(family) for family in FAMILIES], "run this file: it writes the table anew"


def test_every_label_with_its_values() -> None:
    assert rows_below(LABELS) == rows_of_labels(), "run this file: it writes the table anew"


def test_the_text_names_only_what_exists() -> None:
    known = {name for family in FAMILIES for name in (family.name, *family.sample_names)}
    text = PAGE.replace("`korora_sessions_total` is not used", "")
    named = set(re.findall(r"\bkorora_[a-z_]+", text))
    assert {name for name in named - known if not any(other.startswith(name) for other in known)} == set()
    assert "korora_sessions_total" not in known


def test_the_numbers_of_the_listener() -> None:
    text = " ".join(PAGE.split())
    host, port = http.METRICS_ADDRESS
    assert f"`{host}:{port}`" in text
    assert f"within {http.HEAD_SECONDS_MAX:.0f} s of the connection" in text
    assert f"longer than {http.HEAD_BYTES_MAX} bytes" in text
    assert f"took longer than {http.PAGE_SECONDS_MAX:.0f} s" in text
    assert f"At most {http.CONNECTIONS_MAX} connections" in text
    assert any(f"for {STALL_SECONDS_MAX:.0f} s" in family.help for family in FAMILIES)


def test_every_alert_with_its_severity() -> None:
    rules = (ROOT / "deploy/prometheus/korora.rules.yml").read_text(encoding="utf-8")
    coded = re.findall(r"- alert: (\w+)\n.*?severity: (\w+)\n", rules, re.DOTALL)
    documented = [tuple(row.split(" | ")[:2]) for row in rows_below("| alert | severity | fires when |")]
    assert documented == [(f"| `{name}`", severity) for name, severity in coded]


def test_the_keys_of_reports_and_status_that_stand_in_for_metrics() -> None:
    table = "\n".join(rows_below("| KubeVirt, `kubevirt_vmi_migration…` | here |"))
    named = set(re.findall(r"`([a-z_]+)`", table)) - {family.name for family in FAMILIES}
    assert named == {"bytes_in", "bytes_out", "started", "ended", "outcome", "dirty_pages", "eta_seconds"}
    assert named - {"eta_seconds"} <= set(SessionReport.__slots__)
    assert {"bytes_in", "bytes_out", "dirty_pages"} <= set(SessionStatus.__slots__)


def write() -> None:
    """Write the tables of metrics and labels anew."""
    page = PAGE
    for header, rows in ((METRICS, [row_of(family) for family in FAMILIES]), (LABELS, rows_of_labels())):
        before, _, after = page.partition(f"\n{header}\n")
        rule, _, _ = after.partition("\n")
        _, _, rest = after.partition("\n\n")
        page = "\n".join([before, header, rule, *rows, "", rest])
    PATH.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write()

"""The alert rules, the scrape example and the dashboard are valid and ask only for metrics that exist.

What promtool has to say of them is heard where there is one: deploy/rig/fetch-promtool gets it.
"""

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from korora.metrics.families import FAMILIES
from korora.metrics.family import Family

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "korora.rules.yml"
RULE_TESTS = FOLDER / "korora.rules_test.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "korora.json"
SAMPLES: dict[str, Family] = {name: family for family in FAMILIES for name in family.sample_names}
OF_THE_SCRAPE = {"job", "instance", "le"}  # labels that Prometheus adds, and a histogram's own


def promtool() -> str | None:
    """A promtool that is installed, or the one that deploy/rig/fetch-promtool got."""
    rig = Path(os.environ.get("KORORA_RIG") or ROOT / ".cache" / "rig")
    fetched = rig / "promtool" / "promtool"
    return shutil.which("promtool") or (str(fetched) if os.access(fetched, os.X_OK) else None)


needs_promtool = pytest.mark.skipif(
    promtool() is None, reason="there is no promtool: deploy/rig/fetch-promtool gets it, and says why it cannot"
)


def ask_promtool(*words: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(promtool()), *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=50, check=False)


def selectors(text: str) -> list[tuple[str, str]]:
    """Every name that begins with korora_, with what stands in braces behind it."""
    return re.findall(r"\b(korora_\w+)(?:\{([^{}]*)\})?", text)


def labels_of(matchers: str) -> dict[str, tuple[str, str]]:
    """Label matchers: name to operator and value."""
    return {name: (how, value) for name, how, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers)}


def check_names(text: str) -> set[str]:
    """Hold every metric, label and value that an expression names against the table; return the metrics."""
    found = selectors(text)
    for name, matchers in found:
        assert name in SAMPLES, name
        family = SAMPLES[name]
        allowed = dict(family.labels)
        for label, (_, wanted) in labels_of(matchers).items():
            assert label in set(allowed) | OF_THE_SCRAPE, f"{name} has no label {label}"
            if allowed.get(label):
                assert set(wanted.split("|")) <= set(allowed[label]), f"{name} has no {label} {wanted}"
            if label == "le" and name.endswith("_bucket"):
                assert float(wanted) in family.buckets, f"{name} has no bucket {wanted}"
    return {name for name, _ in found}


# ---- rules


def alerts() -> dict[str, str]:
    """Each alert's text in the rules file, by its name."""
    parts = re.split(r"^ +- alert: (\w+)$", RULES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_rules_ask_for_what_exists() -> None:
    text = RULES.read_text(encoding="utf-8")
    assert check_names(re.sub(r"korora\.rules\w*\.yml", "", text))


def test_there_is_an_alert_for_each_thing_that_must_be_heard() -> None:
    heard = {name for text in alerts().values() for name, _ in selectors(text.partition("labels:")[0])}
    assert heard >= {
        "korora_integrity_failures_total",
        "korora_record_refusals_total",
        "korora_handovers_unsettled",
        "korora_log_disputes_total",
        "korora_receipts_failed_total",
        "korora_sessions_ended_total",
        "korora_resumes_total",
        "korora_sessions_stalled",
        "korora_dirty_pages_total",
        "korora_stored_pages_missing_total",
        "korora_ready",
        "korora_draining",
        "korora_event_loop_lag_seconds_bucket",
        "korora_worker_sampled_timestamp_seconds",
        "korora_worker_restarts_total",
        "korora_certificate_expiry_timestamp_seconds",
        "korora_crl_expiry_timestamp_seconds",
        "korora_last_reload_successful",
    }


@pytest.mark.parametrize("name", alerts())
def test_each_alert_says_what_and_what_to_do(name: str) -> None:
    text = alerts()[name]
    assert re.search(r"severity: (critical|warning)$", text, re.MULTILINE)
    for annotation in ("summary", "description", "action"):
        assert len(re.findall(rf"^ +{annotation}: ", text, re.MULTILINE)) == 1, annotation


@pytest.mark.parametrize("name", alerts())
def test_each_alert_is_tested_with_a_moment_at_which_it_fires(name: str) -> None:
    assert f'alertname="{name}"' in RULE_TESTS.read_text(encoding="utf-8")


def test_the_tests_of_the_rules_use_series_that_exist() -> None:
    text = RULE_TESTS.read_text(encoding="utf-8")
    series = re.findall(r"series: '(.*)'", text)
    assert len(series) > 20
    for one in series:
        check_names(one)
        name, matchers = (selectors(one) or [("", "")])[0]
        if name:
            own = set(SAMPLES[name].label_names) | {"job", "instance"} | ({"le"} if name.endswith("_bucket") else set())
            assert set(labels_of(matchers)) == own, one
    # Each group has a moment at which nothing fires, or shows one alert without the other.
    assert text.count("exp_samples: []") >= len(alerts()) - 1


@needs_promtool
@pytest.mark.parametrize("command", [("check", "rules", RULES), ("check", "config", FOLDER / "scrape.yml")])
def test_promtool_finds_nothing_wrong(command: tuple[str | Path, ...]) -> None:
    done = ask_promtool(*command)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_fire_when_they_should() -> None:
    done = ask_promtool("test", "rules", RULE_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("name", alerts())
def test_an_alert_that_never_fires_is_noticed(name: str, tmp_path: Path) -> None:
    """The tests of the rules are no formality: without its alert each of them fails."""
    rules = RULES.read_text(encoding="utf-8")
    body = alerts()[name]
    silent = re.sub(r"expr: .*?(?=^ {8}(?:labels|for):)", "expr: vector(0) > 1\n", body, flags=re.DOTALL | re.MULTILINE)
    assert silent != body
    (tmp_path / RULES.name).write_text(rules.replace(body, silent), encoding="utf-8")
    # Only the group that shows it, for speed: the alert's name stands in no other.
    head, *groups = re.split(r"^(?=  - name: )", RULE_TESTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    showing = [group for group in groups if f'alertname="{name}"' in group]
    assert showing
    (tmp_path / RULE_TESTS.name).write_text(head + "".join(showing), encoding="utf-8")
    done = ask_promtool("test", "rules", tmp_path / RULE_TESTS.name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert name in done.stdout + done.stderr


@needs_promtool
def test_promtool_lints_what_a_relay_gives_out() -> None:
    from prometheus_client import generate_latest

    from korora.metrics.instruments import Instruments
    from korora.metrics.observer import Observer

    instruments = Instruments.alone()
    observer = Observer(instruments)
    observer.session_begun("source")
    observer.sample([], 0.0)
    done = ask_promtool("check", "metrics", stdin=generate_latest(instruments.registry()).decode())
    assert done.returncode == 0, done.stdout + done.stderr


# ---- dashboard


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    """All panels that are no rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_the_dashboard_asks_for_what_exists() -> None:
    for expression in expressions():
        assert check_names(expression), expression


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for expression in expressions() for name, _ in selectors(expression)}
    missing = [family.name for family in FAMILIES if not shown & set(family.sample_names)]
    assert missing == []


def test_every_series_is_of_the_chosen_job_and_hosts() -> None:
    for expression in expressions():
        for name, matchers in selectors(expression):
            found = labels_of(matchers)
            assert found["job"] == ("=", "$job"), name
            assert found["instance"] == ("=~", "$instance"), name


def test_the_dashboard_s_rows() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == [
        "Sessions",
        "Hand-overs",
        "Policy and receipts",
        "Throughput",
        "Pages",
        "Faults",
        "Latency",
        "Process",
        "Platforms and vTPMs",
    ]


def test_the_data_source_is_a_variable_and_no_uid_is_fixed() -> None:
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert not {"uid", "id"} & set(dashboard()), "an import would overwrite another dashboard"
    assert set(re.findall(r'"uid": "([^"]*)"', DASHBOARD.read_text(encoding="utf-8"))) == {"${datasource}"}
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
    for variable in ("job", "instance"):
        check_names(variables[variable]["definition"].replace("$job", "x"))


def test_panels_are_numbered_titled_and_do_not_overlap() -> None:
    everything = dashboard()["panels"]
    assert max(Counter(panel["id"] for panel in everything).values()) == 1
    taken: Counter[tuple[int, int]] = Counter()
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert max(taken.values()) == 1


@needs_promtool
def test_promtool_can_parse_every_expression(tmp_path: Path) -> None:
    filled = [
        expression.replace("$__rate_interval", "5m").replace("$job", "korora").replace("$instance", ".*")
        for expression in expressions()
    ]
    assert not any("$" in expression for expression in filled)
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    path = tmp_path / "dashboard.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    done = ask_promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr

"""The section on pages: a small run of it, its tables, its goals, and what is left out where things are absent."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.budget import Budget, Outcome
from bench.codecs import ZSTD_1
from bench.corpus import IDLE_A, IDLE_B, QEMU_A
from bench.goals import Goal, goals
from bench.guests import WAYS, measure_guests
from bench.linkmodel import AUTO, OPAQUE, RATES_GBIT
from bench.pages import AFTERS, QUICK_PAGES, LinkCase, PagesPlan, PagesResult, measure_pages
from tests.bench.canned import pages, session
from tests.bench.small import small_corpus
from tests.bench.told import Told

TINY = replace(
    QUICK_PAGES,
    streams=(IDLE_A, IDLE_B, QEMU_A),
    alone=(IDLE_A,),
    methods=("raw", "pages", "cdc 1 MiB"),
    links=(LinkCase("loopback", None, IDLE_A, ("auto",)),),
    guests=(),
    rounds=1,
)


def test_a_tiny_run_has_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_corpus(tmp_path / "shared")
    monkeypatch.setenv("KORORA_SHARED", str(tmp_path / "shared"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    result = measure_pages(TINY, scratch, budget=Budget(50), teller=Told())
    assert [sample.item for sample in result.wire.samples] == [
        f"{IDLE_A}, pages", f"{IDLE_A}, best", f"{AFTERS[0].name}, pages", f"{AFTERS[0].name}, best",
    ]  # fmt: skip
    alone, after = (result.ratio(name, "best") for name in (IDLE_A, AFTERS[0].name))
    assert alone is not None
    assert after is not None
    assert 0 < after < alone
    assert {sample.method for sample in result.engine.samples} == {"raw", "pages", "cdc 1 MiB"}
    assert [sample.after for sample in result.peers_after.samples] == [AFTERS[0].name]
    assert {(AUTO, rate) for rate in RATES_GBIT} <= set(result.modelled())
    assert [sample.item for sample in result.links.samples] == ["loopback, auto"]
    assert {name.partition(":")[0] for name in result.rows()} == {"wire", "engine", "model", "link"}
    assert result.to_json()["goals"]


def test_without_a_corpus_all_is_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORORA_SHARED", str(tmp_path))
    told = Told()
    result = measure_pages(replace(PagesPlan(), links=()), tmp_path, budget=Budget(50), teller=told)
    assert result.rows() == {}
    assert set(result.absent) == set(PagesPlan().streams)
    assert all("KORORA_SHARED" in warning for warning in told.warnings)
    assert "left out" in "\n".join(result.to_markdown())
    assert all(goal.measured is None for goal in goals(result))


def test_the_tables_are_whole_and_say_what_was_left_out() -> None:
    text = "\n".join(pages().to_markdown())
    assert "- qemu idle-a: left out: no such file" in text
    assert "- loopback, auto: left out: it | failed" in text
    assert "| xen idle-b after idle-a | 1024 | 1024 |" in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


def test_a_peer_that_remembers_is_never_shown_with_what_it_makes_of_a_stream_alone() -> None:
    result = pages()
    result.plan = replace(result.plan, methods=(ZSTD_1, "cdc 1 MiB"))
    for samples, shown in ((result.peers_after.samples, "0.1250 | 0.0300"), ([], "0.1250 | –")):
        result.peers_after.samples = samples
        result.engine.samples = [
            replace(sample, method=method, ratios={IDLE_B: 0.125})
            for method in result.plan.methods
            for sample in result.engine.samples[:1]
        ]
        assert f"| xen idle-b after idle-a | 1024 | 1024 | {shown} |" in "\n".join(result.to_markdown())


def test_goals_are_met_missed_or_not_measured() -> None:
    found = {goal.what: goal for goal in goals(pages())}
    assert found["wire ÷ stream, best: xen idle-a"].met
    assert found["wire ÷ stream, best: xen idle-b after idle-a"].met
    assert found["wire ÷ stream, best: qemu idle-a"].measured is None
    assert not found["wire ÷ stream, best: qemu idle-a"].met
    encode = found["encode, pages, GiB/s on one core"]
    assert encode.met
    assert encode.measured == pytest.approx(1.25)
    assert found["decode, pages, GiB/s on one core"].measured == pytest.approx(2)
    assert found["2 cores ÷ 1, encode, FAST"].measured == pytest.approx(1.8)
    assert not found["2 cores ÷ 1, decode, FAST"].met
    assert not found["time, auto ÷ opaque, 10 Gb/s modelled"].met
    assert found["time, auto ÷ opaque, 1 Gb/s"].measured == pytest.approx(0.25)
    assert found["memory of a relay with its page cache, MiB"].measured == 300
    assert not Goal("x", None, 1.0).met


def test_auto_is_held_against_opaque_on_every_link() -> None:
    slow = replace(pages().plan, links=(LinkCase("one", None, IDLE_A), LinkCase("two", None, IDLE_A)))
    result = PagesResult(slow, links=Outcome([
        session(f"one, {OPAQUE}", 1.0), session(f"one, {AUTO}", 1.04),
        session(f"two, {OPAQUE}", 1.0), session(f"two, {AUTO}", 1.06),
    ]))  # fmt: skip
    met = {goal.what: goal.met for goal in goals(result) if goal.what.endswith(("one", "two"))}
    assert met == {"time, auto ÷ opaque, one": True, "time, auto ÷ opaque, two": False}


def test_shares_of_the_time_are_of_all_of_it() -> None:
    for plan in (PagesPlan(), QUICK_PAGES):
        assert list(plan.shares) == list(pages().parts())
        assert sum(plan.shares.values()) == pytest.approx(1)
        assert set(plan.alone) <= set(plan.streams)


def test_without_qemu_its_ways_are_left_out_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORORA_KERNEL", str(tmp_path / "absent"))
    told = Told()
    stream = pages().streams[IDLE_A]
    outcome = measure_guests({QEMU_A: (stream, 128)}, 1, budget=Budget(60), teller=told)
    assert set(outcome.left_out) == {f"{QEMU_A}, {way}" for way in WAYS}
    assert "no kernel for the guest" in told.warnings[0]

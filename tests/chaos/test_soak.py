"""The soak itself: a short one passes, and one whose relays leak does not.

Why: a soak is run rarely and watched by nobody; one that cannot fail is worse than none.
"""

import asyncio
import json
from pathlib import Path

import pytest

from tests.chaos import soak as soak_module
from tests.chaos.load import KIB
from tests.chaos.relays import Usage
from tests.chaos.soak import RSS_GROWTH_MIB_MAX, Soak, main, soak
from tests.chaos.soak_acts import Tally

SMOKE_SECONDS = 5.0
LONG_SECONDS = 60.0
SEED = 20
LEVEL = Usage(rss_kib=60 * KIB, peak_kib=80 * KIB, threads=5, descriptors=18, cpu_seconds=1.0)


def check(done: Soak) -> None:
    assert done.failures == [], done.table()
    assert sum(tally.sessions for tally in done.tallies.values()) >= len(done.tallies) // 2
    assert {"send", "receive", "alpha", "alpha worker 0", "beta", "beta worker 1"} <= set(done.end)


@pytest.mark.timeout(120)
def test_a_few_seconds() -> None:
    done = soak(SMOKE_SECONDS, SEED)
    check(done)
    assert "level, and every byte as it was sent" in done.table()
    json.dumps(done.as_json())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("patience", [0, 30], ids=lambda seconds: f"resume-timeout {seconds}")
def test_a_minute(patience: int) -> None:
    check(soak(LONG_SECONDS, SEED + 1, patience=patience))


# ------------------------------------------------------------------ the verdict


def ended(
    seconds: float, *, descriptors: int = 18, threads: int = 5, growth_mib: float = 0.0, peak_mib: float = 80.0
) -> list[str]:
    """The failures of a run of 100 samples that ended so."""

    async def story() -> Soak:
        made = Soak(seconds, 0)
        made.tallies["churn"] = Tally(acts=1, sessions=1)
        for number in range(100):
            rss = LEVEL.rss_kib + int(growth_mib * KIB * number / 100)
            made.samples.append((seconds * number / 100, {"send": replaced(rss_kib=rss)}))
        made.warm = {"send": LEVEL}
        made.end = {"send": replaced(descriptors=descriptors, threads=threads, peak_kib=int(peak_mib * KIB))}
        made.judge()
        return made

    return asyncio.run(story()).failures


def replaced(**changes: int) -> Usage:
    return Usage(**({name: getattr(LEVEL, name) for name in Usage.__slots__} | changes))


def test_level_is_level() -> None:
    assert ended(900) == []
    assert ended(900, descriptors=18 + soak_module.DESCRIPTORS_SLACK, threads=5 + soak_module.THREADS_SLACK) == []
    assert ended(900, growth_mib=RSS_GROWTH_MIB_MAX) == [], "half of that lies between the medians"
    assert ended(10, growth_mib=3 * RSS_GROWTH_MIB_MAX) == [], "pools that are still filling"


@pytest.mark.parametrize(
    ("leak", "word"),
    [
        ({"descriptors": 19 + soak_module.DESCRIPTORS_SLACK}, "descriptors 18 → 23"),
        ({"threads": 6 + soak_module.THREADS_SLACK}, "threads 5 → 12"),
        ({"growth_mib": 3 * RSS_GROWTH_MIB_MAX}, "memory"),
        ({"peak_mib": 1 + soak_module.PEAK_MIB_MAX}, "321.0 MiB at its peak"),
    ],
)
def test_a_leak_is_found(leak: dict[str, float], word: str) -> None:
    (failure,) = ended(900, **leak)  # type: ignore[arg-type]
    assert failure.startswith(f"send: {word}")


def test_a_run_that_carries_nothing_fails() -> None:
    async def story() -> list[str]:
        made = Soak(10, 0)
        made.judge()
        return made.failures

    assert asyncio.run(story()) == ["no session was carried at all"]


def test_the_command_says_the_seed_and_fails_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def broken(self: Soak, folder: Path) -> None:
        self.failures.append(f"act 3 of seed {self.seed}")

    monkeypatch.setattr(Soak, "run", broken)
    assert main(["--seconds", "1", "--seed", "77", "--json", str(tmp_path / "soak.json")]) == 1
    output = capsys.readouterr().out
    assert "seed 77" in output.splitlines()[0]
    assert "FAILED: act 3 of seed 77" in output
    assert json.loads((tmp_path / "soak.json").read_text())["failures"] == ["act 3 of seed 77"]

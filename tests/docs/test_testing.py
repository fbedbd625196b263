"""docs/testing.md names the scenarios and tools that there are, and the soak's limits."""

import re
from pathlib import Path

from tests.chaos import soak

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
CHAOS = ROOT / "tests" / "chaos"


def named(header: str) -> set[str]:
    """Files in the first column of a table."""
    table = PAGE.partition(header)[2].partition("\n\n")[0]
    return set(re.findall(r"`(\w+\.py)`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))


def test_every_scenario_is_named() -> None:
    assert named("| file | what happens |\n") == {path.name for path in CHAOS.glob("test_*.py")}


def test_every_scenario_says_why() -> None:
    for path in CHAOS.glob("test_*.py"):
        docstring = path.read_text(encoding="utf-8").split('"""')[1]
        assert "\n\nWhy: " in docstring, path.name


def test_the_tools_exist() -> None:
    assert named("| module | for |\n") <= {path.name for path in CHAOS.glob("*.py")}


def test_the_limits_of_the_soak() -> None:
    assert f"| descriptors | {soak.DESCRIPTORS_SLACK} more |" in PAGE
    assert f"| threads | {soak.THREADS_SLACK} more" in PAGE
    growth = f"{soak.RSS_GROWTH_MIB_MAX:.0f} MiB or {100 * soak.RSS_GROWTH_SHARE_MAX:.0f} % more"
    assert growth in PAGE
    assert f"{soak.RSS_GROWTH_SHORT_MIB_MAX:.0f} MiB in a run below {soak.RSS_SECONDS_MIN:.0f} s" in PAGE
    assert f"| peak | {soak.PEAK_MIB_MAX:.0f} MiB" in PAGE
    warm_up = f"({100 * soak.WARM_UP_SHARE:.0f} % of the time, {soak.WARM_UP_SECONDS_MAX:.0f} s at most)"
    assert warm_up in PAGE

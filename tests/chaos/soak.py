"""Soak: relays that stay up under a mix of load and faults for as long as one likes, and must be level at the end.

    make soak                                        15 minutes; SOAK_SECONDS=3600 SOAK_SEED=7 make soak
    .venv/bin/python -m tests.chaos.soak --seconds 900 --seed 7 --json FILE

Two daemons and an ad hoc pair serve one act after another on each of several routes (soak_acts.py), drawn from the
seed. It fails at once on a wrong byte, an early end, or an exit code that nothing explains; and at the end if any relay
process holds more descriptors or threads than after the warm-up, or its memory grew.
"""

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import uvloop

from crypto.identity import Identity
from crypto.tls import PeerRules, TlsConfig, TlsRole
from proxy.limits import LANE_ATTEMPTS_MAX, LANE_HELLO_SECONDS_MAX
from tests.chaos.load import KIB, MIB, WrongBytes, eventually
from tests.chaos.relays import Usage
from tests.chaos.soak_acts import Actor, Tally
from tests.chaos.soak_rig import Rig, rig

SECONDS_DEFAULT: Final = 900.0
WAYS: Final = 2  # of the daemons; the ad hoc pair is a third route
PATIENCE_SECONDS: Final = 30  # --resume-timeout
WARM_UP_SHARE, WARM_UP_SECONDS_MIN, WARM_UP_SECONDS_MAX = 0.15, 2.0, 90.0
"""Of the time: until each kind of act has most likely been played, and pools and threads have reached their size."""
SAMPLE_SECONDS: Final = 2.0
ACT_SECONDS_MAX: Final = 180.0  # an act that takes longer hangs
REST_SECONDS_MAX: Final = 20.0  # for what was in use to be given back
ABANDONED_SECONDS_MAX = LANE_HELLO_SECONDS_MAX * (LANE_ATTEMPTS_MAX + 1) + 10.0  # see DestinationRunner
REST_POLL_SECONDS: Final = 0.25
RESTING_LOOKS: Final = 4  # so many looks alike are rest

DESCRIPTORS_SLACK: Final = 4
THREADS_SLACK: Final = 6  # an executor's last threads may come late
RSS_GROWTH_MIB_MAX: Final = 24.0  # of medians, from the second quarter to the last
RSS_GROWTH_SHARE_MAX: Final = 0.15  # or this, if it is more
RSS_SECONDS_MIN: Final = 120.0  # in a shorter run a quarter is a handful of acts, and pools are still filling:
RSS_GROWTH_SHORT_MIB_MAX: Final = 80.0  # then only this is asked of it
PEAK_MIB_MAX: Final = 320.0  # of any process: 256 MiB for one session, 64 for a further one


@dataclass(eq=False)
class Soak:
    """One run: what it is told, and what it found."""

    seconds: float
    seed: int
    patience: int = PATIENCE_SECONDS
    began: float = 0.0
    samples: list[tuple[float, dict[str, Usage]]] = field(default_factory=list)
    warm: dict[str, Usage] = field(default_factory=dict)
    end: dict[str, Usage] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    did: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._going = asyncio.Event()
        self._over = False
        self._busy = 0

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    # ---- the run

    async def run(self, folder: Path) -> None:
        """All of it; what is wrong stands in `failures` afterwards."""
        async with rig(folder, ways=WAYS, seed=self.seed, patience=self.patience) as made:
            stranger = TlsConfig(
                Identity.load(folder / "alpha.pair", now=datetime.now(UTC)), TlsRole.CLIENT, PeerRules()
            )
            actors = [Actor(made, route, self.seed, self.tallies, stranger) for route in made.routes]
            self.began = time.monotonic()
            warm_up = min(max(WARM_UP_SHARE * self.seconds, WARM_UP_SECONDS_MIN), WARM_UP_SECONDS_MAX)
            tasks = [asyncio.ensure_future(self._act(actor)) for actor in actors]
            tasks.append(asyncio.ensure_future(self._sample(made)))
            try:
                await self._go_on(warm_up)
                self.warm = await self._rest(made)
                await self._go_on(self.seconds)
                self.end = await self._rest(made)
            finally:
                self._over = True
                self._going.set()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for line in made.lines:
                for name, number in (await line.proxy.order("tell")).items():
                    self.did[name] = self.did.get(name, 0) + number
        self.judge()

    async def _go_on(self, until: float) -> None:
        """Let the actors play until so many seconds of the run are over, or something has failed."""
        self._going.set()
        while self.age < until and not self.failures:  # noqa: ASYNC110 - the clock tells nobody
            await asyncio.sleep(0.05)
        self._going.clear()

    async def _act(self, actor: Actor) -> None:
        number = 0
        while not self._over:
            await self._going.wait()
            number += 1
            self._busy += 1
            try:
                async with asyncio.timeout(ACT_SECONDS_MAX):
                    await actor.play()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the soak was for
                what = f"{type(error).__name__}: {error}"
                self.failures.append(f"{actor.route.name}, act {number} ({actor.act}) at {self.age:.1f} s: {what}")
                return
            finally:
                self._busy -= 1

    async def _sample(self, made: Rig) -> None:
        while True:
            try:
                self.samples.append((self.age, made.usages))
            except (OSError, KeyError) as error:
                self.failures.append(f"a process has gone: {error}")
            if ended := made.ended:
                self.failures.append(ended)
            if self.failures:
                return
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _rest(self, made: Rig) -> dict[str, Usage]:
        """Let every act end, and everything be given back; what each process holds then."""
        await eventually(lambda: not self._busy or self.failures, ACT_SECONDS_MAX)
        usages = made.usages
        alike, end = 0, time.monotonic() + REST_SECONDS_MAX
        while alike < RESTING_LOOKS and time.monotonic() < end and not self.failures:
            await asyncio.sleep(REST_POLL_SECONDS)
            last, usages = usages, made.usages
            same = all(name in last and usages[name].descriptors == last[name].descriptors for name in usages)
            alike = alike + 1 if same else 0
        # A source that was cut off before it heard ACCEPT never comes again: its session, and what of the store it
        # holds open, ends when the destination's patience does.
        end = time.monotonic() + ABANDONED_SECONDS_MAX
        while self._holds_more(usages) and time.monotonic() < end and not self.failures:
            await asyncio.sleep(REST_POLL_SECONDS)
            usages = made.usages
        return usages

    def _holds_more(self, usages: dict[str, Usage]) -> bool:
        """Whether any process holds more descriptors than after the warm-up."""
        return any(
            name in usages and usages[name].descriptors > warm.descriptors + DESCRIPTORS_SLACK
            for name, warm in self.warm.items()
        )

    # ---- the verdict

    def rss_mib(self, name: str, start: float, end: float) -> float:
        """Median memory of a process in a part of the run, by shares of its time."""
        span = self.seconds
        found = [use[name].rss_kib for age, use in self.samples if name in use and start <= age / span < end]
        return statistics.median(found) / KIB if found else 0.0

    def judge(self) -> None:
        """Hold what was measured against the limits."""
        if self.failures:
            return
        if not sum(tally.sessions for tally in self.tallies.values()):
            self.failures.append("no session was carried at all")
        for name, warm in self.warm.items():
            now = self.end.get(name)
            if now is None:
                self.failures.append(f"{name} has gone")
                continue
            if now.descriptors > warm.descriptors + DESCRIPTORS_SLACK:
                self.failures.append(f"{name}: descriptors {warm.descriptors} → {now.descriptors}")
            if now.threads > warm.threads + THREADS_SLACK:
                self.failures.append(f"{name}: threads {warm.threads} → {now.threads}")
            before, after = self.rss_mib(name, 0.25, 0.5), self.rss_mib(name, 0.75, 1.01)
            growth = RSS_GROWTH_MIB_MAX if self.seconds >= RSS_SECONDS_MIN else RSS_GROWTH_SHORT_MIB_MAX
            if now.peak_kib > PEAK_MIB_MAX * KIB:
                self.failures.append(f"{name}: {now.peak_kib / KIB:.1f} MiB at its peak")
            if after - before > max(growth, RSS_GROWTH_SHARE_MAX * before):
                self.failures.append(f"{name}: memory {before:.1f} → {after:.1f} MiB (medians of quarters 2 and 4)")

    # ---- what it says

    def table(self) -> str:
        """For people."""
        head = f"{'process':<18}{'descriptors':>14}{'threads':>10}{'MiB, quarters 2 and 4':>24}{'peak MiB':>10}"
        lines = [f"soak: {self.seconds:.0f} s, seed {self.seed}, resume-timeout {self.patience} s", "", head]
        for name, warm in self.warm.items():
            now = self.end.get(name, warm)
            quarters = f"{self.rss_mib(name, 0.25, 0.5):.1f} → {self.rss_mib(name, 0.75, 1.01):.1f}"
            descriptors, threads = (f"{getattr(warm, key)} → {getattr(now, key)}" for key in ("descriptors", "threads"))
            lines.append(f"{name:<18}{descriptors:>14}{threads:>10}{quarters:>24}{now.peak_kib / KIB:>10.1f}")
        lines += ["", f"{'act':<18}{'times':>7}{'sessions':>10}{'MiB':>10}  codes, source/destination"]
        for name, tally in sorted(self.tallies.items()):
            codes = ", ".join(f"{pair} ×{number}" for pair, number in sorted(tally.codes.items()))
            lines.append(f"{name:<18}{tally.acts:>7}{tally.sessions:>10}{tally.bytes / MIB:>10.0f}  {codes}")
        lines += ["", "the lines: " + ", ".join(f"{name} {number}" for name, number in self.did.items() if number), ""]
        lines += [f"FAILED: {failure}" for failure in self.failures] or ["level, and every byte as it was sent"]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For machines: everything that was measured."""
        return {
            "seconds": self.seconds,
            "seed": self.seed,
            "resume_timeout": self.patience,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "limits": {
                "descriptors": DESCRIPTORS_SLACK,
                "threads": THREADS_SLACK,
                "rss_mib": RSS_GROWTH_MIB_MAX,
                "rss_share": RSS_GROWTH_SHARE_MAX,
            },
            "warm": {name: asdict(usage) for name, usage in self.warm.items()},
            "end": {name: asdict(usage) for name, usage in self.end.items()},
            "samples": [
                {"seconds": round(age, 2), "processes": {name: asdict(usage) for name, usage in usages.items()}}
                for age, usages in self.samples
            ],
            "acts": {name: asdict(tally) for name, tally in self.tallies.items()},
            "lines": self.did,
            "failures": self.failures,
        }


def soak(seconds: float, seed: int, *, patience: int = PATIENCE_SECONDS) -> Soak:
    """Run one, in a folder of its own."""

    async def whole() -> Soak:
        made = Soak(seconds, seed, patience)
        with tempfile.TemporaryDirectory(prefix="korora-soak-") as folder:
            try:
                await made.run(Path(folder))
            except WrongBytes as error:  # told once more as the backends close
                if not made.failures:
                    made.failures.append(f"WrongBytes: {error}")
        return made

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one, say how it went; 0 if all was level."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak")
    parser.add_argument("--seconds", type=float, default=SECONDS_DEFAULT)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and said, if none is given")
    parser.add_argument("--resume-timeout", type=int, default=PATIENCE_SECONDS, metavar="SECONDS")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"soak: {options.seconds:.0f} s from seed {seed}", flush=True)
    done = soak(options.seconds, seed, patience=options.resume_timeout)
    print(done.table(), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(done.as_json(), indent=1) + "\n")
    return 1 if done.failures else 0


if __name__ == "__main__":
    sys.exit(main())

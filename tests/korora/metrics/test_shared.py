"""Metrics of several processes: sums are right, the dead keep their counts and lose their present, nothing falls."""

import errno
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, values
from prometheus_client.openmetrics import exposition, parser

from korora.metrics import families as f
from korora.metrics import shared as shared_module
from korora.metrics.family import Side
from korora.metrics.instruments import Instruments, shared_registry
from korora.metrics.observer import Observer
from korora.metrics.shared import FILE_BYTES, FILE_KINDS, SharedDirectory, allocate
from proxy.errors import ConfigurationError
from tests.korora.metrics.support import NO_USAGE, NOW, report, samples, status, value

ROOT = Path(__file__).parents[3]
THREADS = 8
COUNTS = 500  # of each
SECONDS_MAX = 30


class Worker:
    """A process of tests/korora/metrics/worker.py."""

    def __init__(self, directory: Path, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.korora.metrics.worker", str(directory), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear("ready")

    def _hear(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == word + "\n"

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        self._hear("done")

    def sample(self, *statuses: dict[str, object]) -> None:
        self.tell("sample", json.dumps(statuses))

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)


@contextmanager
def workers(directory: Path, *names: str) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        for name in names:
            started.append(Worker(directory, name))  # noqa: PERF401 - those that have started must be ended
        yield started
    finally:
        for worker in started:
            worker.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[SharedDirectory]:
    made = SharedDirectory.prepare(tmp_path)
    yield made
    made.close()


def falls(before: dict[object, float], after: dict[object, float]) -> list[object]:
    """Counters, and the counts of histograms, that are lower than they were or gone."""
    counting = ("_total", "_count", "_bucket", "_sum")
    return [key for key, count in before.items() if key[0].endswith(counting) and after.get(key, -1) < count]  # type: ignore[index]


def test_receipts_are_counted_from_many_threads_and_none_is_lost(directory: SharedDirectory) -> None:
    """They are made in threads, and a worker's observer is called there."""
    observer = Observer(Instruments.shared(directory.path, "0"), Side.WORKER, "0")

    def log() -> None:
        for _ in range(COUNTS):
            observer.receipt_logged("source", "offer", both=True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads do meet
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(log) for _ in range(THREADS)]:
                done.result(SECONDS_MAX)
    finally:
        sys.setswitchinterval(interval)
    assert value(shared_registry(directory.path), f.RECEIPTS, "source", "offer", "both") == THREADS * COUNTS


def test_three_processes_one_killed_and_started_again(directory: SharedDirectory) -> None:
    registry = shared_registry(directory.path)
    supervisor = Observer(
        Instruments.shared(directory.path, "supervisor"), Side.SUPERVISOR, "supervisor", usage=lambda: NO_USAGE
    )
    supervisor.workers(3)
    with workers(directory.path, "0", "1", "2") as running:
        for number, worker in enumerate(running):
            worker.tell("begin", "source")
            worker.sample(
                {"number": number, "bytes_in": 100 + number, "lanes": 2, "queue_frames": 1, "delay_seconds": number}
            )
        assert value(registry, f.SESSIONS, "source", "open") == 3
        assert value(registry, f.LANES, "source") == 6
        assert value(registry, f.LINK_DELAY, "source") == 2
        assert value(registry, f.STREAM_BYTES, "source", "in") == 303
        assert value(registry, f.SESSIONS_BEGUN, "source") == 3
        assert value(registry, f.WORKERS) == 3
        assert registry.get_sample_value("korora_event_loop_lag_seconds_count") == 3
        running[2].tell("end", "source", 2, 0, json.dumps({"bytes_in": 202}))
        assert value(registry, f.STREAM_BYTES, "source", "in") == 403
        assert value(registry, f.SESSIONS_ENDED, "source", "done") == 1
        assert value(registry, f.SESSION_SECONDS, "source", suffix="_sum") == 3.0

        before = samples(registry)
        running[2].kill()
        directory.forget("2")
        supervisor.workers(2)
        after = samples(registry)
        assert falls(before, after) == []
        assert value(registry, f.SESSIONS, "source", "open") == 2, "what the dead one said of the present is void"
        assert value(registry, f.LANES, "source") == 4
        assert value(registry, f.LINK_DELAY, "source") == 1
        assert value(registry, f.WORKER_SAMPLED, "2") is None
        assert value(registry, f.WORKER_SAMPLED, "1") is not None
        assert value(registry, f.LAST_ENDED, "source", "done") is not None, "a past event stays one"

        with workers(directory.path, "2") as (again,):
            supervisor.worker_restarted()
            assert falls(after, samples(registry)) == []
            again.sample({"number": 9, "bytes_in": 1000})
            assert value(registry, f.STREAM_BYTES, "source", "in") == 1403
            assert value(registry, f.SESSIONS, "source", "open") == 3
            assert value(registry, f.WORKER_RESTARTS) == 1
            assert falls(after, samples(registry)) == []
    names = {path.name for path in directory.path.glob("*.db")}
    assert names == {f"{kind}_{who}.db" for kind in FILE_KINDS for who in ("0", "1", "2", "supervisor")}


def test_a_worker_killed_without_forget_starts_with_no_sessions(directory: SharedDirectory) -> None:
    registry = shared_registry(directory.path)
    with workers(directory.path, "0") as (worker,):
        worker.sample({"number": 1, "lanes": 2})
    assert value(registry, f.LANES, "source") == 2
    with workers(directory.path, "0"):
        assert value(registry, f.LANES, "source") == 0
        assert value(registry, f.SESSIONS, "source", "open") == 0


def test_killed_in_the_middle_of_counting_again_and_again(directory: SharedDirectory) -> None:
    """Whenever the kernel ends a worker, its files can be read, and the next one goes on from where they stand."""
    registry = shared_registry(directory.path)
    seen = 0.0
    for _ in range(5):
        with workers(directory.path, "0") as (worker,):
            worker.tell("spin")
            for _ in range(3):
                goal = seen + 100
                while seen < goal:  # it is counting: this ends, or the test's own time does
                    counted = value(registry, f.SESSIONS_BEGUN, "source")
                    assert counted is not None
                    assert counted >= seen
                    seen = counted
        directory.forget("0")
        assert (value(registry, f.SESSIONS_BEGUN, "source") or 0) >= seen


def busy(observer: Observer, side: Side) -> None:
    """Use every metric of a side."""
    if Side.WORKER in side:
        for role in ("source", "destination"):
            observer.session_begun(role)
            for number, code in enumerate((0, 2, 3, 4, 5, 6, 7, 70, 143)):
                ended = report(number, role, code)
                observer.session_ended(ended, status(number, role))
    observer.sample([status(99)], 0.01)


def test_one_process_and_shared_ones_say_the_same(directory: SharedDirectory) -> None:
    alone = Instruments.alone()
    together = Instruments.shared(directory.path, "0")
    for instruments in (alone, together):
        busy(Observer(instruments, clock=lambda: NOW, usage=lambda: NO_USAGE), Side.BOTH)

    def told(registry: CollectorRegistry) -> object:
        return [(metric.name, metric.type, metric.unit, metric.documentation) for metric in registry.collect()]

    assert told(alone.registry()) == told(shared_registry(directory.path))
    assert samples(alone.registry()) == samples(shared_registry(directory.path))
    text = exposition.generate_latest(shared_registry(directory.path)).decode()
    assert [metric.name for metric in parser.text_string_to_metric_families(text)]


def test_no_file_grows_and_none_can_be_read_by_others(directory: SharedDirectory) -> None:
    """A mapped file that must grow where the disk is full kills its process."""
    busy(Observer(Instruments.shared(directory.path, "0"), usage=lambda: NO_USAGE), Side.BOTH)
    for path in directory.path.glob("*_0.db"):
        assert path.stat().st_size == FILE_BYTES
        assert path.stat().st_blocks * 512 >= FILE_BYTES, "its room is taken"
        (used,) = struct.unpack_from("i", path.read_bytes())
        assert used < FILE_BYTES / 2
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_a_full_disk_is_said_and_nothing_is_mapped(directory: SharedDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared_module.os, "posix_fallocate", full)
    with pytest.raises(ConfigurationError, match="No space left") as caught:
        Instruments.shared(directory.path, "0")
    assert caught.value.remedy


def test_a_file_that_is_just_being_made_is_passed_over(directory: SharedDirectory) -> None:
    observer = Observer(Instruments.shared(directory.path, "0"), usage=lambda: NO_USAGE)
    observer.session_begun("source")
    (directory.path / "counter_1.db").touch()
    (directory.path / "gauge_livesum_1.db").write_bytes(bytes(FILE_BYTES))
    assert value(shared_registry(directory.path), f.SESSIONS_BEGUN, "source") == 1


def test_nothing_is_left_behind_for_others(directory: SharedDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """prometheus-client's two process-wide settings are as they were, and what they were does not matter."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")
    before = values.ValueClass
    alone, together = Instruments.alone(), Instruments.shared(directory.path, "0")
    for instruments in (alone, together, alone):
        Observer(instruments, usage=lambda: NO_USAGE).session_begun("source")
    assert values.ValueClass is before
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == "/nowhere"
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")
    together.counter(f.RELOADS, "done").inc()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert value(alone.registry(), f.SESSIONS_BEGUN, "source") == 2
    assert value(shared_registry(directory.path), f.SESSIONS_BEGUN, "source") == 1


def test_metrics_made_before_a_fork_are_refused_after_it(directory: SharedDirectory) -> None:
    """Two processes that map one file would each write over what the other counts."""
    instruments = Instruments.shared(directory.path, "0")
    counter = instruments.counter(f.RELOADS, "done")
    child = os.fork()
    if child == 0:
        try:
            counter.inc()
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    counter.inc()
    assert value(shared_registry(directory.path), f.RELOADS, "done") == 1


@pytest.mark.parametrize("name", ["", "a_b", "../x", "A", "x" * 33, "0\n"])
def test_names_that_no_worker_can_have(directory: SharedDirectory, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        allocate(directory.path, name)


# ---- the directory


def test_an_earlier_run_s_numbers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    first = SharedDirectory.prepare(tmp_path)
    busy(Observer(Instruments.shared(first.path, "0"), usage=lambda: NO_USAGE), Side.BOTH)
    (first.path / "notes").write_text("not ours")
    first.close()
    second = SharedDirectory.prepare(tmp_path)
    assert samples(shared_registry(second.path)) == {}
    assert {path.name for path in second.path.iterdir()} == {"lock", "notes"}
    second.close()


def test_two_daemons_do_not_share_a_directory(directory: SharedDirectory, tmp_path: Path) -> None:
    allocate(directory.path, "0")
    with pytest.raises(ConfigurationError, match="another process") as caught:
        SharedDirectory.prepare(tmp_path)
    assert caught.value.remedy
    assert list(directory.path.glob("*.db")), "the other one's numbers are still there"


def test_a_directory_that_others_may_enter_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir(mode=0o755)
    made = SharedDirectory.prepare(tmp_path)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    made.close()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.db").touch()
    state = tmp_path / "state"
    state.mkdir()
    (state / "metrics").symlink_to(elsewhere)
    with pytest.raises(ConfigurationError):
        SharedDirectory.prepare(state)
    assert (elsewhere / "precious.db").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_another_user_s_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    os.chown(tmp_path / "metrics", 12345, -1)
    with pytest.raises(ConfigurationError, match="another user"):
        SharedDirectory.prepare(tmp_path)


def test_no_parent(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        SharedDirectory.prepare(tmp_path / "absent")


def test_a_temporary_directory_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = SharedDirectory.prepare()
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    allocate(made.path, "0")
    made.close()
    assert list(tmp_path.iterdir()) == []

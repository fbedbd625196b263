"""The harness itself, on streams far too small to time anything by."""

import shutil
from pathlib import Path

import pytest

from bench import peers
from bench.measure import Plan, measure, measure_stream
from bench.peers import PEERS, Peer, Target
from bench.processes import BenchError, ProcessTree, free_ports

MiB = 1024 * 1024
PLAN = Plan(stream_bytes=3 * MiB + 5, pings=10, setups=2)

needs_socat = pytest.mark.skipif(shutil.which("socat") is None, reason="socat is not installed")


@pytest.mark.parametrize("name", ["direct", pytest.param("socat", marks=needs_socat)])
def test_a_round_has_every_figure(name: str, tmp_path: Path) -> None:
    sample = measure(PEERS[name], 1, PLAN, tmp_path)
    assert (sample.peer, sample.round, sample.bytes) == (name, 1, PLAN.stream_bytes)
    assert sample.gib_per_s > 0
    assert len(sample.ping_ns) == PLAN.pings
    assert len(sample.setup_ns) == PLAN.setups
    assert all(nanoseconds > 0 for nanoseconds in sample.ping_ns + sample.setup_ns)
    if name == "direct":
        assert sample.cpu_s_per_gib is None
        assert sample.memory_kib == {}
    else:
        assert sample.cpu_s_per_gib is not None
        assert sample.cpu_s_per_gib > 0
        assert len(sample.memory_kib) == 2  # the listener and the child that serves the connection
    assert list(tmp_path.iterdir()) == []


def start_cutter(tree: ProcessTree, target: Target) -> int:
    """A relay that passes the first mebibyte on and ends."""
    [port] = free_ports(1)
    tree.spawn([
        peers.program("socat"), "-u", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr",
        f"SYSTEM:head -c {MiB} | socat -u - TCP\\:127.0.0.1\\:{target.sink_port}",
    ])  # fmt: skip
    tree.await_listening(port, 10)
    return port


@needs_socat
def test_a_relay_that_loses_bytes_is_no_sample(tmp_path: Path) -> None:
    peer = Peer("cutter", encrypted=False, programs=(), package="", start=start_cutter)
    with pytest.raises(BenchError):
        measure_stream(peer, 1, 64 * MiB, tmp_path)


def test_a_missing_program_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_program", lambda name: None)
    assert PEERS["stunnel"].missing() == "stunnel4 not found; Debian: apt-get install stunnel4"
    assert PEERS["direct"].missing() == ""

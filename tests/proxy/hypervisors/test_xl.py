"""xl as the hand-over's hypervisor: whatever state a copy was left in, and whatever xl claims to have done."""

import asyncio
import os
import re
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.errors import HypervisorFailed
from proxy.handover.table import Side
from proxy.hypervisors import xl
from proxy.hypervisors.base import CopyState, Fate, Hypervisor, Vm
from proxy.hypervisors.xl import XlToolstack
from tests.proxy.support import run, until
from tests.standins.xen_host import UUID, XenHost, guest_stream
from tests.standins.xl import GO

OTHER = "11111111-2222-4333-8444-555555555555"
VM = Vm("g1", UUID)
SECONDS_MAX = 20.0
ACTING = {"rename", "pause", "unpause", "destroy", "migrate"}


@pytest.fixture
def host(tmp_path: Path) -> XenHost:
    return XenHost(tmp_path / "host")


@pytest.fixture
def toolstack(host: XenHost) -> XlToolstack:
    return XlToolstack(str(host.program))


def acted(host: XenHost) -> list[str]:
    """Commands that change something, in order."""
    return [line for line in host.log if line.split()[0] in ACTING]


def refused(work: Coroutine[Any, Any, Any]) -> str:
    """What it says; every refusal says what to do or why."""
    with pytest.raises(HypervisorFailed) as error:
        run(work)
    return str(error.value)


def a_pin(number: int) -> Vm:
    """The machine, pinned to a domain."""
    return Vm("g1", UUID, f"{number}@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}")


def test_it_is_a_hypervisor(toolstack: XlToolstack) -> None:
    hypervisor: Hypervisor = toolstack
    assert hypervisor.kind == "xl"


# ------------------------------------------------------------------ how things stand


@pytest.mark.parametrize(
    ("name", "how", "arriving", "departing"),
    [
        ("g1--incoming", {"paused": True}, CopyState.INCOMING, CopyState.ABSENT),
        ("g1", {"paused": True}, CopyState.PAUSED, CopyState.PAUSED),
        ("g1", {}, CopyState.RUNNING, CopyState.RUNNING),
        ("g1", {"shutdown": "crash"}, CopyState.RUNNING, CopyState.RUNNING),
        ("g1", {"shutdown": "poweroff"}, CopyState.RUNNING, CopyState.RUNNING),
        ("g1", {"paused": True, "shutdown": "reboot"}, CopyState.RUNNING, CopyState.RUNNING),
        ("g1", {"shutdown": "suspend"}, CopyState.ABSENT, CopyState.SUSPENDED),
        ("g1", {"shutdown": "suspend", "paused": True}, CopyState.ABSENT, CopyState.SUSPENDED),
        ("g1--migratedaway", {"shutdown": "suspend"}, CopyState.ABSENT, CopyState.SUSPENDED),
        ("g1--migratedaway", {}, CopyState.ABSENT, CopyState.RUNNING),
        ("g2", {}, CopyState.ABSENT, CopyState.ABSENT),
        ("g1--incoming--incoming", {"paused": True}, CopyState.ABSENT, CopyState.ABSENT),
    ],
)
def test_one_copy(
    host: XenHost, toolstack: XlToolstack, *, name: str, how: dict[str, Any], arriving: CopyState, departing: CopyState
) -> None:
    host.create(name, **how)
    assert run(toolstack.arriving(VM)) is arriving
    assert run(toolstack.departing(VM)) is departing
    assert acted(host) == []


def test_no_copy(toolstack: XlToolstack) -> None:
    assert run(toolstack.arriving(VM)) is CopyState.ABSENT
    assert run(toolstack.departing(VM)) is CopyState.ABSENT


def test_what_became_of_a_copy_that_is_gone(host: XenHost, toolstack: XlToolstack) -> None:
    number = host.create("g1")
    pinned = a_pin(number)
    an_earlier_boot = Vm("g1", UUID, f"{number}@another-run-of-the-host")
    host.power_off("g1")
    for _ in range(2):
        assert run(toolstack.fate(pinned)) is Fate.ENDED
        assert run(toolstack.fate(an_earlier_boot)) is Fate.LOST
        assert "no copy of g1 here" in refused(toolstack.revive(pinned))
        # Neither another machine of its name is it, nor a copy that was given up or is to arrive.
        for name, how in (
            ("g1", {"uuid": OTHER}),
            ("g1--incoming", {"paused": True}),
            ("g1--migratedaway", {"shutdown": "suspend"}),
        ):
            host.create(name, **how)
    for how in ({"paused": True}, {"shutdown": "suspend"}, {"shutdown": "crash"}):
        host.lose_all()
        host.create("g1", **how)
        assert run(toolstack.fate(pinned)) is Fate.ENDED
    assert acted(host) == []


def test_a_guest_that_has_rebooted_runs_and_is_left_alone(host: XenHost, toolstack: XlToolstack) -> None:
    """By a new domain of its name and UUID; likewise after a crash of the host that has started its machines."""
    pinned = a_pin(host.create("g1"))
    host.reboot("g1")
    assert run(toolstack.departing(pinned)) is CopyState.ABSENT
    for vm in (pinned, Vm("g1", UUID, "1@another-run-of-the-host")):
        assert run(toolstack.fate(vm)) is Fate.AGAIN
        run(toolstack.revive(vm))
    assert acted(host) == []
    assert host.states == {"g1": "running"}


def test_a_stream_that_tells_no_uuid(host: XenHost, toolstack: XlToolstack) -> None:
    host.create("g1--incoming", paused=True)
    assert run(toolstack.arriving(Vm("g1", ""))) is CopyState.INCOMING


@pytest.mark.parametrize("name", ["g1", "g1--incoming", "g1--migratedaway"])
@pytest.mark.parametrize("how", [{"paused": True}, {"shutdown": "suspend"}, {}])
def test_a_domain_with_the_name_and_another_uuid_is_never_touched(
    host: XenHost, toolstack: XlToolstack, name: str, how: dict[str, Any]
) -> None:
    host.create(name, uuid=OTHER, **how)
    before = host.states
    assert run(toolstack.arriving(VM)) is CopyState.ABSENT
    assert run(toolstack.departing(VM)) is CopyState.ABSENT
    run(toolstack.destroy(VM))
    run(toolstack.remove(VM))
    for work in (toolstack.take(VM), toolstack.start(VM), toolstack.revive(VM), toolstack.pin(VM, Side.SOURCE)):
        refused(work)
    assert host.states == before
    assert acted(host) == []


def test_dom0_is_nobody_s_copy(host: XenHost, toolstack: XlToolstack) -> None:
    assert run(toolstack.departing(Vm("Domain-0", ""))) is CopyState.ABSENT


@pytest.mark.parametrize("name", ["", "-f", "a\nb", "a\x1b[2J", " g1", "g1 ", "x" * 256])
def test_names_that_are_not_handled(host: XenHost, toolstack: XlToolstack, name: str) -> None:
    for work in (toolstack.arriving(Vm(name, UUID)), toolstack.take(Vm(name, UUID)), toolstack.revive(Vm(name, ""))):
        assert "name" in refused(work)
    assert host.log == []


def test_a_name_of_digits_is_not_taken_for_an_id(host: XenHost, toolstack: XlToolstack) -> None:
    """`xl destroy 1` means the id 1, whatever is called 1."""
    bystander = host.create("bystander", uuid=OTHER)
    host.create(f"{bystander}--incoming", paused=True)
    run(toolstack.destroy(Vm(f"{bystander}", UUID)))
    assert host.states == {"bystander": "running"}


# ------------------------------------------------------------------ destination


def test_take_start_and_their_repetition(host: XenHost, toolstack: XlToolstack) -> None:
    number = host.create("g1--incoming", paused=True)
    assert "has not got the machine's name" in refused(toolstack.start(VM))
    run(toolstack.take(VM))
    assert host.states == {"g1": "paused"}
    run(toolstack.take(VM))
    run(toolstack.start(VM))
    assert host.states == {"g1": "running"}
    run(toolstack.start(VM))
    run(toolstack.take(VM))
    assert acted(host) == [f"rename {number} g1", f"unpause {number}"]


def test_a_name_that_is_taken(host: XenHost, toolstack: XlToolstack) -> None:
    host.create("g1--incoming", paused=True)
    host.create("g1", uuid=OTHER)
    assert "another domain of that name" in refused(toolstack.take(VM))
    assert host.states == {"g1--incoming": "paused", "g1": "running"}


def test_what_is_not_there_cannot_be_taken_or_started(toolstack: XlToolstack) -> None:
    assert "no copy of g1" in refused(toolstack.take(VM))
    assert "no copy of g1" in refused(toolstack.start(VM))


@pytest.mark.parametrize("name", ["g1", "g1--incoming"])
def test_destroy(host: XenHost, toolstack: XlToolstack, name: str) -> None:
    pinned = a_pin(host.create(name, paused=True))
    run(toolstack.destroy(pinned))
    assert host.states == {}
    run(toolstack.destroy(pinned))
    assert len(acted(host)) == 1


def test_without_a_pin_only_what_arrives_is_destroyed(host: XenHost, toolstack: XlToolstack) -> None:
    """A migration within the host fails early: the copy that leaves, which its operator paused, is all there is."""
    host.create("g1", paused=True)
    run(toolstack.destroy(VM))
    assert acted(host) == []
    host.create("g1--incoming", paused=True)
    run(toolstack.destroy(VM))
    assert host.states == {"g1": "paused"}


def test_without_a_pin_a_copy_that_runs_is_not_what_arrives(host: XenHost, toolstack: XlToolstack) -> None:
    """There is nothing to be destroyed then, and nothing to be said of it for ever."""
    host.create("g1")
    run(toolstack.destroy(VM))
    assert host.states == {"g1": "running"}


def test_a_pinned_copy_that_was_renamed_is_there(host: XenHost, toolstack: XlToolstack) -> None:
    """Called gone, it would let the source run its own, and be one `xl unpause` away from a second that runs."""
    number = host.create("my g1", paused=True)
    assert run(toolstack.arriving(a_pin(number))) is CopyState.INCOMING
    refused(toolstack.start(a_pin(number)))
    run(toolstack.take(a_pin(number)))
    run(toolstack.start(a_pin(number)))
    assert host.states == {"g1": "running"}


def test_a_copy_that_left_under_another_name_is_there(host: XenHost, toolstack: XlToolstack) -> None:
    """Called gone, it would let the destination's run beside it."""
    number = host.create("my g1")
    assert run(toolstack.departing(a_pin(number))) is CopyState.RUNNING


@pytest.mark.parametrize("shutdown", [None, "crash", "poweroff", "reboot"])
def test_what_runs_or_has_run_is_never_destroyed(host: XenHost, toolstack: XlToolstack, shutdown: str | None) -> None:
    pinned = a_pin(host.create("g1", shutdown=shutdown))
    for work in (toolstack.destroy(pinned), toolstack.remove(pinned)):
        assert "not destroyed" in refused(work)
    assert acted(host) == []


def test_no_copy_is_started_beside_one_that_runs(host: XenHost, toolstack: XlToolstack) -> None:
    host.create("g1", paused=True)
    host.create("renamed by its operator")
    assert "is the same machine, and runs" in refused(toolstack.start(VM))
    assert acted(host) == []


@pytest.mark.parametrize("action", ["lie", "fail"])
@pytest.mark.parametrize(
    ("command", "name", "work"),
    [
        ("rename", "g1--incoming", lambda toolstack: toolstack.take(VM)),
        ("unpause", "g1", lambda toolstack: toolstack.start(VM)),
        ("destroy", "g1--incoming", lambda toolstack: toolstack.destroy(VM)),
    ],
)
def test_an_exit_code_is_not_believed(
    host: XenHost,
    toolstack: XlToolstack,
    *,
    command: str,
    name: str,
    action: str,
    work: Callable[[XlToolstack], Coroutine[Any, Any, None]],
) -> None:
    host.create(name, paused=True)
    host.fault(command, action)
    words = refused(work(toolstack))
    assert "g1" in words
    assert ("xl said" in words) == (action == "fail")
    # The next attempt finds things as they are.
    run(work(toolstack))


def test_a_command_that_failed_after_it_had_worked(host: XenHost, toolstack: XlToolstack) -> None:
    """xl migrate-receive may have destroyed the copy between the list and our `xl destroy`."""
    number = host.create("g1--incoming", paused=True)
    host.fault("destroy", "hold")

    async def story() -> None:
        task = asyncio.create_task(toolstack.destroy(VM))
        await until(lambda: host.reached("destroy"))
        host.lose_all()
        host.heal("destroy")
        await task

    run(story())
    assert host.states == {}
    assert acted(host) == [f"destroy {number}"]


# ------------------------------------------------------------------ source


@pytest.mark.parametrize("name", ["g1", "g1--migratedaway"])
def test_revive(host: XenHost, toolstack: XlToolstack, name: str) -> None:
    number = host.create(name, shutdown="suspend")
    run(toolstack.revive(VM))
    assert host.states == {"g1": "running"}
    assert host.domains["g1"].id == number
    run(toolstack.revive(VM))
    assert [line.split()[0] for line in acted(host)] == ["migrate", *(["rename"] if name != "g1" else [])]


def test_a_pretended_migration_sends_next_to_nothing(host: XenHost, toolstack: XlToolstack) -> None:
    """It is a real migration to a script, and must break before the domain could be given up."""
    host.create("g1--migratedaway", shutdown="suspend", pages=2048)
    run(toolstack.revive(VM))
    assert not host.reached("migrate:ready")
    assert not host.reached("migrate:renamed")


def test_revive_gives_a_running_copy_its_name_back(host: XenHost, toolstack: XlToolstack) -> None:
    """A revival that was cut off between its two steps."""
    host.create("g1--migratedaway")
    run(toolstack.revive(VM))
    assert host.states == {"g1": "running"}
    assert not host.reached("migrate:banner")


def test_an_operator_s_pause_stays(host: XenHost, toolstack: XlToolstack) -> None:
    host.create("g1--migratedaway", shutdown="suspend", paused=True)
    run(toolstack.revive(VM))
    assert host.states == {"g1": "paused"}
    assert run(toolstack.departing(VM)) is CopyState.PAUSED


def test_what_is_not_there_cannot_be_revived(toolstack: XlToolstack) -> None:
    assert "no copy of g1" in refused(toolstack.revive(VM))


def test_no_copy_is_revived_beside_one_that_runs(host: XenHost, toolstack: XlToolstack) -> None:
    """Migrated within the host, and the other copy was started by somebody."""
    pinned = run_pinned(host, toolstack, "g1--migratedaway")
    host.create("g1")
    assert "is the same machine, and runs" in refused(toolstack.revive(pinned))
    assert acted(host) == []


def run_pinned(host: XenHost, toolstack: XlToolstack, name: str) -> Vm:
    host.create(name, shutdown="suspend")
    return run(toolstack.pin(VM, Side.SOURCE))


@pytest.mark.parametrize("step", ["migrate:banner", "migrate:resume", "rename"])
def test_a_revival_that_is_cut_off_is_done_again(host: XenHost, toolstack: XlToolstack, step: str) -> None:
    host.create("g1--migratedaway", shutdown="suspend", pages=2048)
    host.fault(step, "die")
    words = refused(toolstack.revive(VM))
    # What an operator types if it keeps failing.
    assert ("xl rename" if step == "rename" else 'xl migrate -s ""') in words
    run(toolstack.revive(VM))
    assert host.states == {"g1": "running"}


def test_remove(host: XenHost, toolstack: XlToolstack) -> None:
    host.create("g1--migratedaway", shutdown="suspend")
    run(toolstack.remove(VM))
    assert host.states == {}
    run(toolstack.remove(VM))
    host.create("g1", paused=True)
    assert "not suspended" in refused(toolstack.remove(VM))
    assert host.states == {"g1": "paused"}


def test_xl_died_at_every_step_of_the_source(host: XenHost, toolstack: XlToolstack) -> None:
    """Wherever `xl migrate` is killed, its copy runs again under its name, and with its memory."""
    channel = "echo 'xl migration receiver ready, send binary domain data.'; head -c {} >/dev/null; printf '{}\\0'; cat"
    command = channel.format(len(guest_stream("g1")), "domain received, ready to unpause")
    for step in ("banner", "stream", "suspended", "ready", "renamed", "go"):
        number = host.create("g1")
        host.fault(f"migrate:{step}", "die")
        subprocess.run(
            [host.program, "migrate", "-s", "", "g1", command], check=False, timeout=SECONDS_MAX, capture_output=True
        )
        assert list(host.states) == ["g1--migratedaway" if step in {"renamed", "go"} else "g1"]
        run(toolstack.revive(VM))
        assert host.states == {"g1": "running"}, step
        assert host.domains["g1"].id == number
        subprocess.run([host.program, "destroy", "g1"], check=True, timeout=SECONDS_MAX)


def test_xl_died_at_every_step_of_the_destination(host: XenHost, toolstack: XlToolstack) -> None:
    for step in ("stream", "ready", "go", "renamed", "report"):
        for finish in (True, False):
            host.fault(f"receive:{step}", "die")
            subprocess.run(
                [host.program, "migrate-receive", "-p"],
                input=guest_stream("g1") + GO,
                check=False,
                timeout=SECONDS_MAX,
                capture_output=True,
            )
            if finish and step != "stream":
                run(toolstack.take(VM))
                run(toolstack.start(VM))
                assert host.states == {"g1": "running"}, step
                subprocess.run([host.program, "destroy", "g1"], check=True, timeout=SECONDS_MAX)
            else:
                copies = [a_pin(domain.id) for domain in host.domains.values()]
                run(toolstack.destroy(copies[0] if copies else VM))
            assert host.states == {}, step


# ------------------------------------------------------------------ both copies on one host


def test_a_migration_within_the_host_never_mixes_its_copies_up(host: XenHost, toolstack: XlToolstack) -> None:
    leaves = host.create("g1")
    source = run(toolstack.pin(VM, Side.SOURCE))
    comes = host.create("g1--incoming", paused=True)
    destination = run(toolstack.pin(VM, Side.DESTINATION))
    assert run(toolstack.departing(source)) is CopyState.RUNNING
    assert run(toolstack.arriving(destination)) is CopyState.INCOMING
    host.alter(leaves, name="g1--migratedaway", shutdown="suspend")
    run(toolstack.take(destination))
    assert run(toolstack.departing(source)) is CopyState.SUSPENDED
    assert run(toolstack.arriving(destination)) is CopyState.PAUSED
    run(toolstack.start(destination))
    run(toolstack.remove(source))
    assert host.states == {"g1": "running"}
    assert host.domains["g1"].id == comes
    # The one that is left is not taken for the one that left.
    assert run(toolstack.departing(source)) is CopyState.ABSENT
    run(toolstack.remove(source))
    assert host.running() == 1


@pytest.mark.parametrize("how", [{}, {"paused": True}, {"shutdown": "suspend"}])
def test_turning_back_within_the_host_destroys_the_right_copy(
    host: XenHost, toolstack: XlToolstack, how: dict[str, Any]
) -> None:
    """The source's may be paused by its operator, or suspended: it looks like one that arrived."""
    leaves = host.create("g1", **how)
    comes = host.create("g1--incoming", paused=True)
    destination = run(toolstack.pin(VM, Side.DESTINATION))
    run(toolstack.destroy(destination))
    assert [domain.id for domain in host.domains.values()] == [leaves]
    run(toolstack.destroy(destination))
    assert run(toolstack.arriving(destination)) is CopyState.ABSENT
    assert [domain.id for domain in host.domains.values()] == [leaves]
    assert acted(host) == [f"destroy {comes}"]


def test_after_go_within_the_host_the_older_copy_comes_back(host: XenHost, toolstack: XlToolstack) -> None:
    leaves = host.create("g1")
    source = run(toolstack.pin(VM, Side.SOURCE))
    host.alter(leaves, name="g1--migratedaway", shutdown="suspend")
    comes = host.create("g1", paused=True)
    destination = Vm("g1", UUID, source.copy.replace(f"{leaves}@", f"{comes}@"))
    # Its name is taken as long as the other copy has it.
    assert "cannot get its name back" in refused(toolstack.revive(source))
    run(toolstack.destroy(destination))
    run(toolstack.revive(source))
    assert host.states == {"g1": "running"}
    assert host.domains["g1"].id == leaves


def test_a_leftover_of_an_earlier_migration_is_not_revived_in_its_place(host: XenHost, toolstack: XlToolstack) -> None:
    """The guest went away, came back, and is to leave again; what was left of its first stay is older than its disk."""
    host.create("g1--migratedaway", shutdown="suspend")
    now = host.create("g1")
    # Not written down which, it is asked about.
    for work in (toolstack.departing(VM), toolstack.revive(VM), toolstack.remove(VM)):
        assert re.search(rf"two copies of g1 here.*\(id {now}\)", refused(work))
    pinned = Vm("g1", UUID, f"{now}@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}")
    assert run(toolstack.departing(pinned)) is CopyState.RUNNING
    host.alter(now, shutdown="suspend")
    run(toolstack.revive(pinned))
    assert host.states == {"g1--migratedaway": "suspend", "g1": "running"}


def test_after_a_restart_of_the_host_a_pinned_copy_is_gone(host: XenHost, toolstack: XlToolstack) -> None:
    """The same guest may have been started anew, with the same name, UUID and even id: it is not that copy."""
    number = host.create("g1", paused=True)
    earlier = Vm("g1", UUID, f"{number}@00000000-0000-0000-0000-000000000000")
    assert run(toolstack.departing(earlier)) is CopyState.ABSENT
    assert run(toolstack.arriving(earlier)) is CopyState.ABSENT
    run(toolstack.destroy(earlier))
    assert host.states == {"g1": "paused"}


def test_without_a_pin_a_suspended_copy_has_not_arrived(host: XenHost, toolstack: XlToolstack) -> None:
    host.create("g1", shutdown="suspend")
    run(toolstack.destroy(VM))
    assert host.states == {"g1": "suspend"}


# ------------------------------------------------------------------ xl itself


def test_no_xl_here() -> None:
    assert "is this Xen's dom0" in refused(XlToolstack("/nonexistent/xl").arriving(VM))


def test_xl_cannot_list(host: XenHost, toolstack: XlToolstack) -> None:
    host.fault("list", "fail")
    assert "libxl_list_domain failed" in refused(toolstack.arriving(VM))


def test_xl_that_hangs_is_ended(host: XenHost, toolstack: XlToolstack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(XlToolstack._run, "__kwdefaults__", {"seconds": 0.3})
    host.fault("list", "hang")
    began = time.monotonic()
    assert "did not end in" in refused(toolstack.arriving(VM))
    assert time.monotonic() - began < SECONDS_MAX / 2
    for pid in host.processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_pretended_migration_that_hangs_is_ended_with_its_transport(
    host: XenHost, toolstack: XlToolstack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(xl, "XL_REVIVE_SECONDS_MAX", 0.5)
    pid = tmp_path / "pid"
    monkeypatch.setattr(xl, "_PRETENCE", f"echo $$ > {pid}; exec sleep 600")
    host.create("g1", shutdown="suspend")
    assert "did not end in" in refused(toolstack.revive(VM))
    state = Path(f"/proc/{pid.read_text().strip()}/stat")

    def ended() -> bool:
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"

    deadline = time.monotonic() + 10.0
    while not ended() and time.monotonic() < deadline:  # it was killed, and has to come to that
        time.sleep(0.01)
    assert ended()


def test_xl_that_says_too_much(tmp_path: Path) -> None:
    program = tmp_path / "xl"
    program.write_text("#!/bin/sh\nexec cat /dev/zero\n")
    program.chmod(0o755)
    assert "says more than" in refused(XlToolstack(str(program)).arriving(VM))


def test_xl_gets_no_standard_input(tmp_path: Path) -> None:
    program = tmp_path / "xl"
    program.write_text(f"#!/bin/sh\nreadlink /proc/self/fd/0 > {tmp_path}/input\nexit 1\n")
    program.chmod(0o755)
    ours, (there, here) = os.dup(0), os.pipe()
    os.dup2(there, 0)
    try:
        refused(XlToolstack(str(program)).arriving(VM))
    finally:
        os.dup2(ours, 0)
        for fd in (ours, there, here):
            os.close(fd)
    assert (tmp_path / "input").read_text() == "/dev/null\n"


def test_what_xl_says_is_made_safe_for_a_log(tmp_path: Path) -> None:
    program = tmp_path / "xl"
    program.write_text("#!/bin/sh\nprintf 'a\\033[2Jb\\n' >&2\nexit 1\n")
    program.chmod(0o755)
    assert refused(XlToolstack(str(program)).arriving(VM)).endswith("xl said: a?[2Jb")


# ------------------------------------------------------------------ its monitor


class Tended:
    """Monitors that can be lost, and made unless `trouble` says why not."""

    def __init__(self, *alive: int, trouble: str | None = None) -> None:
        self.alive, self.trouble = set(alive), trouble
        self.made: list[int] = []

    def tends(self, domid: int) -> bool:
        return domid in self.alive

    def tend(self, domid: int) -> str | None:
        self.made.append(domid)
        if self.trouble is None:
            self.alive.add(domid)
        return self.trouble


def test_who_was_revived_is_tended(host: XenHost) -> None:
    monitors = Tended()
    toolstack = XlToolstack(str(host.program), monitors)
    number = host.create("g1--migratedaway", shutdown="suspend")
    run(toolstack.revive(VM))
    assert monitors.made == [number]
    # Resumed by xl itself, it has lost its monitor all the same.
    monitors.alive.clear()
    run(toolstack.revive(VM))
    run(toolstack.revive(VM))
    assert monitors.made == [number, number]


def test_a_monitor_that_is_about_to_end_is_none(host: XenHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has seen the domain suspended, which runs again by now."""
    monkeypatch.setattr(xl, "XL_MONITOR_SECONDS", 0.0)

    class Ending(Tended):
        def tends(self, domid: int) -> bool:
            before = super().tends(domid)
            self.alive.discard(domid)
            return before

    number = host.create("g1", shutdown="suspend")
    monitors = Ending(number)
    run(XlToolstack(str(host.program), monitors).revive(VM))
    assert monitors.made == [number]


def test_a_domain_that_had_no_monitor_gets_none(host: XenHost) -> None:
    """Made by xl create -e: whoever manages it sees to its end."""
    monitors = Tended()
    toolstack = XlToolstack(str(host.program), monitors)
    host.create("g1")
    alone = run(toolstack.pin(VM, Side.SOURCE))
    host.create("g2", uuid=OTHER)
    monitors.alive.add(2)
    tended = run(toolstack.pin(Vm("g2", OTHER), Side.SOURCE))
    monitors.alive.clear()
    for number in (1, 2):
        host.alter(number, shutdown="suspend")
    run(toolstack.revive(alone))
    run(toolstack.revive(tended))
    assert host.states == {"g1": "running", "g2": "running"}
    assert monitors.made == [2]


def test_a_domain_that_is_suspended_by_now_had_one(host: XenHost) -> None:
    """A small machine's memory is over before anybody asks: xl's monitor has seen it suspended, and has ended."""

    class Quick(Tended):
        def tends(self, domid: int) -> bool:
            host.alter(domid, shutdown="suspend")
            return super().tends(domid)

    monitors = Quick()
    toolstack = XlToolstack(str(host.program), monitors)
    number = host.create("g1")
    run(toolstack.revive(run(toolstack.pin(VM, Side.SOURCE))))
    assert monitors.made == [number]


def test_nobody_looks_for_the_monitor_of_what_arrives(host: XenHost) -> None:
    """The machine stands still meanwhile, and has not got one yet."""

    class Unasked(Tended):
        def tends(self, domid: int) -> bool:
            pytest.fail(f"asked about {domid}")

    number = host.create("g1--incoming", paused=True)
    pinned = run(XlToolstack(str(host.program), Unasked()).pin(VM, Side.DESTINATION))
    assert pinned.copy.startswith(f"{number}@")
    assert not pinned.copy.endswith("+alone")


def test_a_lost_monitor_is_a_warning_and_no_failure(host: XenHost) -> None:
    host.create("g1", shutdown="suspend")
    with capture_logs() as logs:
        run(XlToolstack(str(host.program), Tended(trouble="do this")).revive(VM))
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("a domain has no monitor", "do this")]
    assert host.states == {"g1": "running"}

"""The daemon's metrics: what its processes have counted, on one page, through deaths, reloads and drains."""

import asyncio
import os
import signal
import urllib.error
import urllib.request

from proxy.handover.record import Entry, Head
from proxy.handover.table import State
from proxy.hypervisors.base import Vm
from proxy.shell.journal import FOLDER, Journal, now
from tests.korora.daemon.support import SECONDS_MAX, Host, Site, echo, exchange, in_thread, until
from tests.korora.daemon.test_sessions import pair
from tests.proxy.shell.test_processes import free_port
from tests.proxy.support import run

POLICY = """
[[rule]]
name = "plain"
effect = "allow"
egress = ["vm0"]
[[rule]]
name = "people"
effect = "allow"
egress = ["vm2"]
approvals = 1
approvers = [4242]
"""


def page(host: Host, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host.metrics}{path}", timeout=SECONDS_MAX) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def value(host: Host, series: str) -> float:
    status, text = page(host, "/metrics")
    assert status == 200
    (line,) = [line for line in text.splitlines() if line.rpartition(" ")[0] == series]
    return float(line.rpartition(" ")[2])


def test_what_all_processes_count_is_on_one_page(site: Site) -> None:
    hosts = pair(site, 2, workers=2)
    alpha = hosts.alpha
    alpha.metrics = f"127.0.0.1:{free_port()}"
    hosts.start()
    assert page(alpha, "/healthz") == page(alpha, "/readyz") == (200, "ok\n")

    async def story() -> None:
        def of(series: str, wanted: float) -> "asyncio.Future[float]":
            return in_thread(until, lambda: value(alpha, series) == wanted, f"{series} {wanted}")

        one, two = [await machine.channel() for machine in hosts.machines]  # one to each worker
        for ends in (one, two):
            await echo(*ends)
        await of('korora_sessions{role="source",state="open"}', 2)
        await of("korora_workers", 2)
        assert await in_thread(value, alpha, 'korora_sessions_begun_total{role="source"}') == 2
        await exchange(*one, bytes(999), b"")
        await of('korora_sessions_ended_total{outcome="done",role="source"}', 1)
        assert await in_thread(value, alpha, 'korora_stream_bytes_total{role="source",way="in"}') == 1001
        # The other's worker is killed: what it counted stays, what it said of the present goes.
        (session,) = await in_thread(alpha.sessions)
        os.kill((await in_thread(alpha.status))["workers"][session["worker"]]["pid"], signal.SIGKILL)
        await of('korora_sessions_ended_total{outcome="died",role="source"}', 1)
        await of('korora_sessions{role="source",state="open"}', 0)
        await of("korora_worker_restarts_total", 1)
        assert await in_thread(value, alpha, 'korora_sessions_begun_total{role="source"}') == 2
        alpha.config.write_text("x")
        await in_thread(alpha.ask, "reload")
        await of('korora_reloads_total{result="failed"}', 1)
        await of("korora_last_reload_successful", 0)
        assert await in_thread(value, alpha, 'korora_certificate_expiry_timestamp_seconds{certificate="host"}') > 1e9
        status, body = await in_thread(page, alpha, "/status")
        assert (status, '"name": "alpha"' in body) == (200, True)
        await in_thread(until, lambda: alpha.status()["workers"][session["worker"]]["ready"])
        ends = await hosts.machines[0].channel()
        await echo(*ends)
        alpha.signal(signal.SIGTERM)
        await in_thread(until, lambda: page(alpha, "/readyz") == (503, "draining\n"))
        await of("korora_draining", 1)
        await of("korora_ready", 0)
        await exchange(*ends, b"", b"")
        assert await in_thread(alpha.wait) == 0

    try:
        run(story(), SECONDS_MAX)
        assert "Traceback" not in alpha.log()
    finally:
        hosts.close()


def test_what_hand_overs_became_and_what_is_left_of_them(site: Site) -> None:
    hosts = pair(site, 1)
    alpha = hosts.alpha
    alpha.metrics = f"127.0.0.1:{free_port()}"
    journal = Journal(alpha.state)
    vm = Vm("web-1", "6f2fb9a1-0d3e-4a4c-9c0c-5f1f6a2b7c8d", "5@boot")
    for number, state in enumerate((State.DOUBT, State.PREPARED, State.OPEN, State.COMMITTED)):
        file = journal.begin(Head(f"{number:032x}", "destination", "xl", "beta", now()), Entry("open", now()))
        file.write(state, "", vm, settled=number == 3)
        file.close()
    broken = alpha.state / FOLDER / f"{9:032x}-source.journal"
    broken.write_text("not a journal\n")
    running = journal.begin(Head(f"{10:032x}", "source", "xl", "beta", now()), Entry("open", now()))  # by a command
    hosts.beta.start()
    alpha.start(env={"PATH": ""})  # there is no xl to finish anything with

    def unsettled(role: str, state: str) -> float:
        return value(alpha, f'korora_handovers_unsettled{{role="{role}",state="{state}"}}')

    async def story() -> None:
        await in_thread(until, lambda: unsettled("destination", "doubt") == 1)
        assert await in_thread(unsettled, "source", "unreadable") == 1
        assert await in_thread(unsettled, "destination", "prepared") == 1
        assert await in_thread(unsettled, "destination", "open") == 1
        assert await in_thread(unsettled, "destination", "committed") == 0, "that one is settled"
        assert await in_thread(unsettled, "source", "open") == 0, "that one is under way"
        ends = await hosts.machines[0].channel()
        await echo(*ends)
        await exchange(*ends, bytes(9), b"")
        of_ours = 'korora_handovers_total{kind="none",outcome="unguarded",role="source"}'
        await in_thread(until, lambda: value(alpha, of_ours) == 1)
        assert await in_thread(value, alpha, 'korora_handover_seconds_count{role="source"}') == 0

    try:
        run(story(), SECONDS_MAX)
        assert "Traceback" not in alpha.log()
    finally:
        running.close()
        hosts.close()


def test_what_a_policy_answers_and_what_is_logged_of_it(site: Site) -> None:
    """One session is allowed, one is refused at its offer and never is one, one waits for people and is cancelled."""
    hosts = pair(site, 3)
    for host in (hosts.alpha, hosts.beta):
        host.metrics = f"127.0.0.1:{free_port()}"
    alpha, beta = hosts.alpha, hosts.beta
    policy = site.folder / "policy.toml"
    policy.write_text(POLICY)
    policy.chmod(0o600)
    beta.settings = f'policy = "{policy}"\napprovals = "{site.folder}/approve.sock"\n'
    hosts.start()

    def decisions(host: Host, role: str, point: str, answer: str) -> float:
        return value(host, f'korora_decisions_total{{answer="{answer}",point="{point}",role="{role}"}}')

    def receipts(host: Host, role: str) -> dict[tuple[str, str], float]:
        series = {
            (stage, signed): f'korora_receipts_total{{role="{role}",signed="{signed}",stage="{stage}"}}'
            for stage in ("offer", "transfer", "outcome")
            for signed in ("both", "alone")
        }
        return {key: number for key, one in series.items() if (number := value(host, one))}

    async def logged(wanted: dict[tuple[str, str], float]) -> None:
        for host, role in ((alpha, "source"), (beta, "destination")):
            await in_thread(until, lambda host=host, role=role: receipts(host, role) == wanted, f"{host.name} {wanted}")

    async def story() -> None:
        allowed, refused, waits = hosts.machines
        await exchange(*await allowed.channel(), bytes(999), b"")
        whole = {(stage, "both"): 1.0 for stage in ("offer", "transfer", "outcome")}
        await logged(whole)
        assert await in_thread(decisions, beta, "destination", "handover", "allowed") == 1
        assert await in_thread(decisions, alpha, "source", "handover", "allowed") == 1
        near = await refused.connect()
        await in_thread(until, lambda: decisions(beta, "destination", "offer", "refused") == 1)
        await logged(whole | {("outcome", "alone"): 1.0})
        near.close()
        assert await in_thread(decisions, beta, "destination", "offer", "allowed") == 1
        assert await in_thread(decisions, alpha, "source", "offer", "allowed") == 2, "alpha did not mind"
        assert await in_thread(value, beta, 'korora_sessions_begun_total{role="destination"}') == 1
        assert await in_thread(value, beta, 'korora_peers_refused_total{reason="policy"}') == 1
        near = await waits.connect()
        await near.send(bytes(9))
        people = 'korora_approvals_waiting{role="destination"}'
        await in_thread(until, lambda: value(beta, people) == 1)
        (session,) = await in_thread(beta.sessions)
        await in_thread(lambda: beta.ask("cancel", session=session["session_id"]))
        await in_thread(until, lambda: value(beta, people) == 0)
        assert await in_thread(decisions, beta, "destination", "identity", "refused") == 0, "nobody has answered"
        for host in (alpha, beta):
            assert await in_thread(value, host, "korora_receipts_failed_total") == 0
            for kind in ("truncated", "forked", "malformed"):
                assert await in_thread(value, host, f'korora_log_disputes_total{{kind="{kind}"}}') == 0

    try:
        run(story(), SECONDS_MAX)
        for host in (alpha, beta):
            assert "Traceback" not in host.log()
    finally:
        hosts.close()


def test_a_peer_whose_log_was_cut_and_a_disk_that_takes_no_receipts(site: Site) -> None:
    hosts = pair(site, 2)
    for host in (hosts.alpha, hosts.beta):
        host.metrics = f"127.0.0.1:{free_port()}"
    alpha, beta = hosts.alpha, hosts.beta
    hosts.start()

    def seen(host: Host, series: str, wanted: float) -> None:
        until(lambda: value(host, series) == wanted, f"{host.name}: {series} {wanted}")

    async def story() -> None:
        one, two = hosts.machines
        for number in (1, 2):  # alpha then knows a head of more entries than a new log's first session has
            await exchange(*await one.channel(), bytes(999), b"")
            await in_thread(
                seen, beta, 'korora_receipts_total{role="destination",signed="both",stage="outcome"}', number
            )
            await in_thread(seen, alpha, 'korora_sessions_ended_total{outcome="done",role="source"}', number)
        log = beta.state / "receipts"
        for path in log.iterdir():
            if path.is_file():
                path.unlink()
        near = await one.connect()
        await in_thread(seen, alpha, 'korora_log_disputes_total{kind="truncated"}', 1)
        await in_thread(seen, alpha, 'korora_integrity_failures_total{cause="receipt",role="source"}', 1)
        near.close()
        log = alpha.state / "receipts"
        (log / "entries").unlink()
        (log / "entries").mkdir()
        near = await two.connect()
        await in_thread(until, lambda: value(alpha, "korora_receipts_failed_total") >= 1)
        near.close()

    try:
        run(story(), SECONDS_MAX)
        for host in (alpha, beta):
            assert "Traceback" not in host.log()
        assert alpha.events("a session's outcome cannot be logged")
    finally:
        hosts.close()


def test_a_metrics_port_that_is_taken(site: Site) -> None:
    hosts = pair(site, 1)
    hosts.close()
    alpha = hosts.alpha
    alpha.metrics = hosts.beta.address
    hosts.beta.start()
    alpha.start(ready=False)
    assert alpha.wait() == 2
    assert f"cannot listen on {hosts.beta.address}: Address already in use" in alpha.log()


def test_two_daemons_with_one_state_directory(site: Site) -> None:
    hosts = pair(site, 1, 1)
    for host in (hosts.alpha, hosts.beta):
        host.metrics = f"127.0.0.1:{free_port()}"
    hosts.beta.start()
    hosts.alpha.state.symlink_to(hosts.beta.state)
    hosts.alpha.start(ready=False)
    assert hosts.alpha.wait() == 2
    assert "another process keeps its metrics in" in hosts.alpha.log()
    hosts.close()

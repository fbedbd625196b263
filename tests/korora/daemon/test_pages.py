"""A guest between two daemons: what their files say of pages counts, and operators see what became of them."""

import asyncio
from typing import Any

from tests.korora.daemon.support import SECONDS_MAX, Site, exchange, in_thread, until
from tests.korora.daemon.test_metrics import page, value
from tests.korora.daemon.test_sessions import pair
from tests.proxy.guest import Guest
from tests.proxy.shell.test_processes import free_port
from tests.proxy.support import run

ENCODE = 'encode = "pages"\n'


def test_what_became_of_pages_is_seen_and_a_reload_counts_for_the_next_session(site: Site) -> None:
    hosts = pair(site, 1)
    alpha, beta = hosts.alpha, hosts.beta
    for host in (alpha, beta):
        host.metrics = f"127.0.0.1:{free_port()}"
        host.settings = "[pages]\ncache_bytes = 67108864\nchains = 1\n"
    alpha.tables = [table + (ENCODE if table.startswith("[[ingress]]") else "") for table in alpha.tables]
    hosts.start()
    stream = Guest(21, 1500).stream(rounds=3)

    async def story() -> None:
        near, far = await hosts.machines[0].channel()
        heard = asyncio.create_task(far.exactly(len(stream)))
        await near.send(stream)
        assert await heard == stream

        def seen() -> dict[str, Any]:
            return next((found for found in alpha.sessions() if found["rounds"] == 3), {})

        view = await in_thread(until, seen)
        assert view["regime"] in {"fast", "light", "firm", "best"}
        assert view["bytes_saved"] > len(stream) / 2
        assert view["dirty_pages"] > 0
        await exchange(near, far, b"", b"")
        for host, role in ((alpha, "source"), (beta, "destination")):
            done = f'korora_sessions_ended_total{{outcome="done",role="{role}"}}'
            await in_thread(until, lambda host=host, done=done: value(host, done) == 1)
            (report,) = await in_thread(until, host.reports)
            for kind, number in report["pages"].items():
                assert await in_thread(value, host, f'korora_pages_total{{kind="{kind}",role="{role}"}}') == number
            plain, encoded = [
                await in_thread(value, host, f'korora_paged_bytes_total{{form="{form}",role="{role}"}}')
                for form in ("plain", "encoded")
            ]
            assert plain - encoded == report["bytes_saved"] > len(stream) / 2
        assert await in_thread(value, alpha, 'korora_rounds_total{role="source"}') == 3

        alpha.tables = [table.replace(ENCODE, 'encode = "opaque"\n') for table in alpha.tables]
        alpha.write()
        assert (await in_thread(alpha.ask, "reload"))["ok"]
        await exchange(*await hosts.machines[0].channel(), stream, b"")
        await in_thread(until, lambda: len(alpha.reports()) == 2)
        assert sorted(report["encode"] for report in await in_thread(alpha.reports)) == ["opaque", "pages"]
        assert (await in_thread(page, alpha, "/healthz"))[0] == 200

    try:
        run(story(), SECONDS_MAX)
        assert "Traceback" not in alpha.log() + beta.log()
    finally:
        hosts.close()

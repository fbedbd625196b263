"""`korora serve`: read, check, run."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from korora.daemon import config, notify
from korora.daemon.checks import check
from korora.daemon.config import Config
from korora.daemon.supervisor import Supervisor
from korora.log import LogFormat, LogLevel
from proxy.errors import EXIT_DONE


def serve(path: Path, log_format: LogFormat, log_level: LogLevel) -> int:
    """Run the daemon until it ends; its exit code.

    Raises:
        ConfigurationError, CryptoError: it could not begin.
    """
    notifier = notify.Notifier(os.environ)
    inherited = notify.inherited(os.environ)
    first = config.read(path)

    async def work() -> int:
        supervisor = Supervisor(
            path,
            first,
            inherited=inherited,
            notifier=notifier,
            log_format=log_format,
            log_level=log_level,
        )
        return await supervisor.run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


def check_only(path: Path, *, as_json: bool) -> int:
    """Check a configuration and all it names, and say what would be served.

    Raises:
        ConfigurationError, CryptoError: something is wrong.
    """
    wanted = config.read(path)
    name = asyncio.run(check(wanted))
    shown = msgspec.json.encode(_plan(wanted, name)) if as_json else "\n".join(_lines(wanted, name)).encode()
    sys.stdout.write(shown.decode() + "\n")
    return EXIT_DONE


def _plan(wanted: Config, name: str) -> dict[str, Any]:
    full = {field: getattr(wanted, field) for field in wanted.__struct_fields__}
    for table in ("peer", "ingress", "egress"):
        full[table] = [_full(entry) for entry in full[table]]
    for table in ("listen", "limits", "metrics", "xl"):
        full[table] = _full(full[table])
    return {"name": name} | full


def _full(entry: msgspec.Struct) -> dict[str, Any]:
    """With the keys that have their default values, too."""
    names = zip(entry.__struct_fields__, entry.__struct_encode_fields__, strict=True)
    return {encoded: getattr(entry, field) for field, encoded in names}


def _lines(wanted: Config, name: str) -> list[str]:
    lines = [f"this host is {name}, by {wanted.identity}"]
    if wanted.egress:
        lines.append(f"listens for relays on {wanted.listen.address}")
    everybody = ", ".join(peer.name for peer in wanted.peer)
    lines += [f"egress {each.name}: to {each.to}, from {', '.join(each.peers) or everybody}" for each in wanted.egress]
    lines += [
        f"ingress {each.name}: from {each.source} to {each.peer} ({wanted.peer_named(each.peer).address}), "
        f"egress {each.egress}, priority {each.priority}"
        for each in wanted.ingress
    ]
    if wanted.xl.socket:
        names = ", ".join(f"{peer.name} ({peer.address or 'no address'})" for peer in wanted.xl_peers())
        lines.append(
            f"korora xl: at {wanted.xl.socket}, to {names}{', at any address' if wanted.xl.any_address else ''}, "
            f"egress {wanted.xl.egress}, priority {wanted.xl.priority}"
        )
    return lines

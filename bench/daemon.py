"""A `korora serve` at each end, for as many sessions at once as are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.peers import LOOPBACK, Target, await_ready, make_identities
from bench.processes import ProcessTree, free_ports

KORORA: Final = (sys.executable, "-m", "korora")


def start_daemons(tree: ProcessTree, target: Target, sessions: int, folder: Path) -> list[int]:
    """A daemon at the destination and one at the source with so many ingresses; the port of each ingress.

    They have their default number of workers. Their files go into `folder`.
    """
    source, destination = make_identities(target.directory)
    listening, unused, *ports = free_ports(sessions + 2)
    sink = f"tcp:{LOOPBACK}:{target.sink_port}"
    arriving = [
        _table("peer", name=source.name),
        _table("egress", name="default", to=sink),
    ]
    leaving = [
        _table("peer", name=destination.name, address=f"{LOOPBACK}:{listening}"),
        *(
            _table("ingress", **{"name": f"vm{number}", "from": f"tcp:{LOOPBACK}:{port}", "peer": destination.name})
            for number, port in enumerate(ports)
        ),
    ]
    _serve(tree, folder, destination, listening, arriving)
    _serve(tree, folder, source, unused, leaving)
    return ports


def _serve(tree: ProcessTree, folder: Path, identity: Path, port: int, tables: list[str]) -> None:
    """Write one daemon's configuration, start it, and wait until it is ready."""
    name = identity.name
    head = [
        f'identity = "{identity}"',
        f'state = "{folder / f"{name}.state"}"',
        f'control = "{folder / f"{name}.sock"}"',
        f'[listen]\naddress = "{LOOPBACK}:{port}"',
        '[metrics]\naddress = ""',
    ]
    config = folder / f"{name}.toml"
    config.write_text("\n".join([*head, *tables]) + "\n")
    daemon = tree.spawn([*KORORA, "serve", "--config", str(config), "--log-level", "warning"], stdout=subprocess.PIPE)
    await_ready(daemon, tree, f"serve ({name})")


def _table(kind: str, **fields: str) -> str:
    """One entry of an array of tables; none of our values needs escaping."""
    return "\n".join([f"[[{kind}]]", *(f'{key} = "{value}"' for key, value in fields.items())])

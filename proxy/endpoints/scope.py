"""Processes that have to outlive the relay which starts them, although systemd empties its unit when that ends."""

import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_SYSTEMD: Final = Path("/run/systemd/system")  # there if systemd is the init system, sd_booted(3)


def scope(unit: str, environ: Mapping[str, str]) -> list[str]:
    """What to put before a command that has to outlive this process; nothing where systemd has not started it.

    The command takes systemd-run's place: the same process, the same pipes.

    Args:
        unit: what the scope's name begins with.
        environ: of this process.
    """
    if not environ.get("INVOCATION_ID") or not _SYSTEMD.is_dir():
        return []
    run = shutil.which("systemd-run", path=environ.get("PATH"))
    if run is None:
        return []
    return [run, "--scope", "--collect", "--quiet", f"--unit={unit}-{uuid.uuid4().hex[:12]}", "--"]

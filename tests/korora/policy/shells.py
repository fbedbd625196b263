"""Commands of other users of this host, each in a process of its own. Needs root."""

import asyncio
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


SHELL = """
import contextlib, io, os, sys
from korora.cli.main import main
uid = int(sys.argv.pop(1))
own, sys.argv = sys.argv, ["korora", "approve", "--list", "--socket", "/nowhere"]
with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
    main()  # all it needs is imported before it becomes another user, who may not read this checkout
os.setgroups([]), os.setgid(uid), os.setuid(uid)
sys.argv = own
main()
"""


async def as_user(uid: int, *arguments: str | Path) -> Ended:
    """A command of some user's, in a process of its own, as from a shell that is no terminal."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SHELL, str(uid), *map(str, arguments)),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 50)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Ended(process.returncode or 0, out.decode(), err.decode())

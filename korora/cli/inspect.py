"""`korora inspect`: what is in a captured or saved stream, and what each technique would make of it."""

from pathlib import Path
from typing import Annotated

import typer

INSPECT_EPILOG = "Exit codes: 0 described, however far the stream goes; 2 it cannot be read, or an option is wrong."
SHORT = "Say what a captured or saved stream holds."
_CACHE_MIB_MAX = 65536


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The stream, also compressed (.zst); -: standard input.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", metavar="OUT", help="Draw it too: pages by kind, and where they come again (.png, .svg)."
        ),
    ] = None,
    cache: Annotated[
        int, typer.Option("--cache", min=1, max=_CACHE_MIB_MAX, metavar="MIB", help="Page cache of the session.")
    ] = 512,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out `best`, which takes longest.")] = False,
) -> None:
    """Say what a captured or saved migration stream holds, and what it would cost to send."""
    import json

    from korora.inspect import show
    from korora.inspect.inspection import inspect as look
    from korora.inspect.limits import MIB
    from korora.inspect.source import opened

    if plot is not None:
        from korora.inspect.plot import require

        require()
    with opened(file) as source, show.progress(show.console_for(to_stderr=True), source) as progress:
        found = look(source, cache_bytes=cache * MIB, best=not quick, progress=progress)
    if plot is not None:
        from korora.inspect.plot import draw

        draw(found, plot)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        show.report(found)

"""`korora approve`: the word of people that a policy wants before a machine migrates."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from korora.policy.board import Listed

APPROVE_EPILOG = """
Whoever you are is asked of the kernel. You are shown what you approve of, and your word counts for exactly that.

Exit codes: 0 your word counts; 2 usage, or no relay there; 3 it does not count, or you thought better of it.
"""
EXIT_REFUSED = 3


def approve(
    session: Annotated[
        str | None, typer.Argument(metavar="SESSION", help="Its id, or the first digits of it.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only show what waits.")] = False,
    deny: Annotated[bool, typer.Option("--deny", help="Say no: the migration is refused at once.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask again on a terminal.")] = False,
    side: Annotated[
        str | None,
        typer.Option("--side", metavar="source|destination", help="Which, where it migrates within this host."),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", metavar="PATH", help="The relay's socket for it [default: /run/korora/approve.sock]."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Approve of a migration that waits for you, or deny it."""
    import json
    import sys

    import msgspec

    from korora.policy.desk import SOCKET_DEFAULT, connected
    from proxy.errors import ConfigurationError

    if (session is None) != list_ or (list_ and deny):
        raise ConfigurationError("nothing says what is to be done", "give a SESSION, or --list alone")
    path = socket or SOCKET_DEFAULT
    with connected(path) as client:
        waiting = client.waiting()
    if session is None:
        if as_json:
            typer.echo(json.dumps({"waiting": msgspec.to_builtins(waiting)}))
        else:
            typer.echo("\n".join(map(_described, waiting)) or "nothing waits for you")
        return
    chosen = _one(waiting, session, side)
    if not as_json:
        typer.echo(_described(chosen))
    if sys.stdin is not None and sys.stdin.isatty() and not yes and not _sure(deny=deny):
        typer.echo("nothing was said", err=True)
        raise typer.Exit(EXIT_REFUSED)
    with connected(path) as client:  # anew: people think longer than a relay waits for a line
        after = client.say(chosen, approved=not deny)
    if as_json:
        typer.echo(json.dumps(msgspec.to_builtins(after)))
    elif deny:
        typer.echo("denied")
    else:
        typer.echo(f"approved: {len(after.approvers)} of {after.request.count}")


def _sure(*, deny: bool) -> bool:
    return typer.confirm("Deny it?" if deny else "Approve of it?", err=True)


def _one(waiting: "tuple[Listed, ...]", session: str, side: str | None) -> "Listed":
    from proxy.errors import ConfigurationError

    found = [
        each
        for each in waiting
        if session and each.request.session.startswith(session.lower()) and side in {None, each.request.facts.side}
    ]
    if not found:
        raise ConfigurationError(f"no session {session!r} waits for you", "see korora approve --list")
    if len({each.request.session for each in found}) > 1:
        raise ConfigurationError(f"{session!r} means {len(found)} sessions", "give more digits of its id")
    if len(found) > 1:
        raise ConfigurationError(
            f"{session!r} leaves this host and arrives at it", "say which: --side source or --side destination"
        )
    return found[0]


def _described(listed: "Listed") -> str:
    """All that is approved of, in ASCII: whatever a name holds, it moves no cursor and looks like nothing else."""
    import time

    from korora.policy.file import login_of

    request, facts = listed.request, listed.request.facts
    left = max(0, round(request.since + request.seconds - time.time()))
    begun = "not told" if request.initiator is None else login_of(request.initiator)
    approvers = ", ".join(map(login_of, listed.approvers)) or "nobody"
    lines = (
        f"session {request.session}",
        f"  machine   {facts.vm or 'its stream does not tell its name'}",
        f"  uuid      {facts.uuid or 'not told'}",
        f"  from      {facts.source}",
        f"  to        {facts.destination}, egress {facts.egress}",
        f"  tenant    {facts.tenant or 'nobody'}",
        f"  begun by  {begun}" + ("" if facts.side == "source" else ", on the other host"),
        f"  rule      {facts.rule} wants {request.count} to approve; {approvers} did; {left} seconds are left",
    )
    return "\n".join(lines)

"""`korora policy`: whether a policy's file is right, and what it says to a migration. It asks no relay."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from korora.cli.options import TENANT, help_without_command

if TYPE_CHECKING:
    from datetime import datetime

    from korora.policy.explain import Explanation
    from korora.policy.file import Policy
    from proxy.authority import Question

EXIT_REFUSED = 3
EXPLAIN_EPILOG = """
Without --vm and --uuid it is the offer's question, before the machine is known; with one of them it is the one that
follows, where whatever of the two is left away counts as not told.

Exit codes: 0 allowed; 2 usage, or the file is wrong; 3 refused.
"""
_COLUMNS = ("LINE", "RULE", "EFFECT", "IT", "WHY")

app = typer.Typer(
    name="policy",
    help="Who may migrate what, and where to.",
    invoke_without_command=True,
    add_completion=False,
)

_File = Annotated[Path, typer.Argument(metavar="FILE", help="The policy, TOML.", show_default=False)]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.callback()
def root(context: typer.Context) -> None:
    """Who may migrate what, and where to."""
    from korora.log import LogFormat, LogLevel, configure

    help_without_command(context)
    configure(LogFormat.CONSOLE, LogLevel.ERROR)  # to standard error: the other one may be somebody's JSON


@app.command()
def check(file: _File, as_json: _AsJson = False) -> None:
    """Check a file, and warn of rules that hardly anybody means."""
    import json
    from dataclasses import asdict
    from datetime import UTC, datetime

    from korora.errors import complain, remedy_of
    from korora.policy.explain import warnings
    from korora.policy.file import Policy
    from proxy.errors import ConfigurationError

    try:
        policy = Policy.read(file)
    except ConfigurationError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": str(error), "remedy": remedy_of(error)}))
        raise typer.Exit(complain(error)) from None
    lines = _lines(file, policy)
    found = warnings(policy, datetime.now(UTC))
    if as_json:
        told = [{**asdict(each), "line": None if each.number is None else lines[each.number]} for each in found]
        typer.echo(json.dumps({"ok": True, "policy": policy.digest, "rules": len(policy.rules), "warnings": told}))
        return
    for each in found:
        at = "" if each.number is None else f":{lines[each.number]}" * (lines[each.number] is not None)
        rule = "" if each.number is None else f"rule {each.rule}: "
        typer.echo(f"{file}{at}: warning: {rule}{each.words}")
    typer.echo(f"{file}: {len(policy.rules)} {'rule' if len(policy.rules) == 1 else 'rules'}, policy {policy.digest}")


@app.command(epilog=EXPLAIN_EPILOG, short_help="Say which rule decides about a migration.")
def explain(
    file: _File,
    peer: Annotated[str, typer.Option("--peer", metavar="NAME", help="The other host.", show_default=False)],
    vm: Annotated[
        str | None, typer.Option("--vm", metavar="NAME", help="The machine's name.", show_default=False)
    ] = None,
    uuid: Annotated[
        str | None, typer.Option("--uuid", metavar="UUID", help="The machine's UUID.", show_default=False)
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose machine it is.")] = TENANT,
    user: Annotated[
        str | None,
        typer.Option(
            "--user", metavar="USER", help="Who begins it: uid or login [default: not told].", show_default=False
        ),
    ] = None,
    direction: Annotated[
        str, typer.Option("--direction", metavar="in|out", help="Whether it arrives or leaves.")
    ] = "out",
    egress: Annotated[
        str, typer.Option("--egress", metavar="NAME", help="What the destination calls where it arrives.")
    ] = "default",
    pin: Annotated[
        str, typer.Option("--pin", metavar="SHA256", help="The other host's public key.", show_default=False)
    ] = "",
    guarded: Annotated[bool, typer.Option("--guarded", help="The relays guard its hand-over.")] = False,
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="TIME", help="When, ISO 8601, UTC without a zone [default: now].", show_default=False
        ),
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Say whether a migration would be allowed, which rule decides, and how each rule stands to it."""
    from korora.policy.explain import explain as explained
    from korora.policy.file import Policy
    from korora.policy.ledger import Usage
    from proxy.authority import Point, Question
    from proxy.hypervisors.base import Vm
    from proxy.session import Role

    policy = Policy.read(file)
    known = vm is not None or uuid is not None
    question = Question(
        point=Point.IDENTITY if known else Point.OFFER,
        role=_role(direction, Role),
        session="",
        peer=peer,
        pin=pin.lower().removeprefix("sha256:"),
        egress=egress,
        tenant=tenant,
        user=_uid(user),
        vm=Vm(vm or "", (uuid or "").lower()) if known else None,
        guarded=guarded,
    )
    now = _time(at)
    answer = explained(policy, question, now, Usage())
    if as_json:
        _echo_json(question, now, answer)
    else:
        _say(file, policy, question, now, answer)
    raise typer.Exit(0 if answer.allowed else EXIT_REFUSED)


def _say(file: Path, policy: "Policy", question: "Question", now: "datetime", answer: "Explanation") -> None:
    from korora.policy.names import spelled

    arrow = "to" if question.role.value == "source" else "from"
    machine = "a machine not known yet"
    if question.vm is not None:
        name, uuid = spelled(question.vm.name) or "of a name not told", question.vm.uuid or "no uuid"
        machine = f"machine {name} ({spelled(uuid)})"
    typer.echo(f"{machine} {arrow} {spelled(question.peer)}, {question.point} on {now:%a %Y-%m-%d %H:%M:%S %Z}:")
    typer.echo(f"  {'allowed' if answer.allowed else 'refused'} by {answer.rule}: {answer.reason}")
    if answer.rate_limit is not None:
        typer.echo(f"  at most {answer.rate_limit} bytes a second")
    if answer.approvals:
        typer.echo(f"  once {answer.approvals} of the users {', '.join(map(str, answer.approvers))} approve")
    lines = _lines(file, policy)
    rows = [_COLUMNS] + [
        (str(line or ""), f"{'>' if each.decided else ' '} {each.rule}", each.effect, each.holds, each.why)
        for line, each in zip(lines, answer.rules, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if policy.rules else []:
        typer.echo("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _echo_json(question: "Question", now: "datetime", answer: "Explanation") -> None:
    import json
    from dataclasses import asdict

    typer.echo(json.dumps({**asdict(answer), "point": question.point, "at": now.isoformat()}))


def _lines(file: Path, policy: "Policy") -> list[int | None]:
    """The line of each rule; None where that is not certain."""
    from korora.policy.file import lines_of

    try:
        found: list[int] = lines_of(file.read_bytes(), "rule")
    except OSError:
        found = []
    return list(found) if len(found) == len(policy.rules) else [None] * len(policy.rules)


def _role(direction: str, roles: Any) -> Any:
    from proxy.errors import ConfigurationError

    if direction not in {"in", "out"}:
        raise ConfigurationError(f"--direction {direction!r} is neither in nor out", "give one of the two")
    return roles.SOURCE if direction == "out" else roles.DESTINATION


def _uid(user: str | None) -> int | None:
    from korora.policy.file import uid_of
    from proxy.errors import ConfigurationError

    if user is None:
        return None
    uid = int(user) if user.isascii() and user.isdecimal() else uid_of(user)
    if uid is None:
        raise ConfigurationError(f"this host has no user {user!r}", "give a uid, or a login name that it has")
    return uid


def _time(at: str | None) -> "datetime":
    from datetime import UTC, datetime

    from proxy.errors import ConfigurationError

    if at is None:
        return datetime.now(UTC)
    try:
        time = datetime.fromisoformat(at)
    except ValueError:
        raise ConfigurationError(
            f"--at {at!r} is no time", "write it as 2026-12-24T18:00 or 2026-12-24T18:00+13:00"
        ) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)

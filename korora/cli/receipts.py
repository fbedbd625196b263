"""`korora receipts`: what sessions did, as both hosts signed it; and whether a log of that is what was written.

It works on the state directory itself, whether a relay runs or not; `verify FILE` needs none.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crypto.receipts.audit import Audit
    from crypto.receipts.bundle import Verified
    from crypto.receipts.receipt import Receipt
    from korora.receipts import Logged, Receipts

STATE_DEFAULT: Final = Path("/var/lib/korora")  # the daemon's, as in its configuration
EXIT_INTEGRITY: Final = 5  # proxy.errors.EXIT_INTEGRITY, not imported before it is needed
LISTED: Final = 50  # entries, unless more are asked for
_COLUMNS: Final = ("ENTRY", "SESSION", "STAGE", "VM", "FROM", "TO", "WHEN", "OUTCOME", "SIGNED BY")

app = typer.Typer(
    name="receipts",
    help="Receipts of sessions: who signed what, and the log of them.",
    invoke_without_command=True,
    add_completion=False,
)

_State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help=f"The relay's state directory [default: {STATE_DEFAULT}]."),
]
_Identity = Annotated[
    Path | None,
    typer.Option(
        "--identity",
        metavar="DIR",
        help="This host's identity: its own signatures are believed; without --state, its DIR/state is meant.",
    ),
]
_Signer = Annotated[
    list[str] | None,
    typer.Option("--signer", metavar="NAME=FILE", help="A host's signing certificate, to be believed; repeat."),
]
_Session = Annotated[str, typer.Argument(metavar="SESSION", help="Its id, or the first digits of it; or #ENTRY.")]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]


@app.callback()
def root(context: typer.Context) -> None:
    """Receipts of sessions: who signed what, and the log of them."""
    help_without_command(context)


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help=f"All of them, not the last {LISTED}.")] = False,
    state: _State = None,
    identity: _Identity = None,
    signer: _Signer = None,
    as_json: _AsJson = False,
) -> None:
    """List receipts, the oldest first."""
    import json

    receipts = _receipts(state, identity, signer)
    shown = list(receipts.listed(0 if everything else LISTED))
    _say_crash(receipts)
    if as_json:
        typer.echo(json.dumps({"receipts": [_as_dict(one) for one in shown]}))
        return
    if not shown:
        typer.echo("no receipt is logged")
        return
    rows = [_COLUMNS, *(_row(one) for one in shown)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(
    session: _Session,
    state: _State = None,
    identity: _Identity = None,
    signer: _Signer = None,
    as_json: _AsJson = False,
) -> None:
    """Show all that is signed about a session."""
    import json

    import msgspec

    receipts = _receipts(state, identity, signer)
    found = receipts.found(session)
    _say_crash(receipts)
    if as_json:
        full = [
            _as_dict(one) | {"statement": json.loads(one.envelope.payload), "trouble": one.trouble or None}
            for one in found
        ]
        typer.echo(json.dumps({"receipts": full}))
        return
    for one in found:
        typer.echo(f"entry {one.index}: {_signed(one)}")
        _tell(msgspec.to_builtins(one.predicate), "  ")


@app.command()
def verify(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="A bundle or an envelope; without it the log is read through.", show_default=False
        ),
    ] = None,
    ca: Annotated[Path | None, typer.Option("--ca", metavar="FILE", help="The CA's certificate.")] = None,
    crl: Annotated[Path | None, typer.Option("--crl", metavar="FILE", help="The CA's revocation list.")] = None,
    signer: _Signer = None,
    state: _State = None,
    identity: _Identity = None,
    as_json: _AsJson = False,
) -> None:
    """Verify a file by public keys alone, or the whole log.

    A file is a bundle that export wrote, or a single envelope. Its signers are believed by
    --ca or --signer, and nobody else is. Without a file this host's log is read through.
    """
    import json

    from crypto.receipts.bundle import Verified
    from korora.receipts import Given, verify_file

    if file is None:
        found = _receipts(state, identity, signer).audit()
        typer.echo(json.dumps(_audit_as_dict(found)) if as_json else _audit_in_words(found))
        raise typer.Exit(EXIT_INTEGRITY if found.findings else 0)
    verified = verify_file(file, Given.read(ca, crl, signer or []))
    if as_json:
        typer.echo(json.dumps(_verified_as_dict(verified)))
    elif isinstance(verified, Verified):
        for index, receipt in verified.receipts:
            typer.echo(f"entry {index}: {_verified_in_words(receipt)}")
        head = verified.head
        typer.echo(f"all stand in the log {head.origin} of {head.size} entries, root {head.root.hex()}")
    else:
        typer.echo(_verified_in_words(verified))


@app.command()
def prove(
    entry: Annotated[str, typer.Argument(metavar="ENTRY", help="Which: 0 is the first.")],
    size: Annotated[int | None, typer.Option("--size", min=1, metavar="N", help="In the log of N entries.")] = None,
    state: _State = None,
    identity: _Identity = None,
    as_json: _AsJson = False,
) -> None:
    """Prove that an entry stands in the log.

    The proof is that of RFC 9162, section 2.1.3.
    """
    from crypto.receipts.dsse import encode
    from crypto.receipts.merkle import leaf_hash
    from proxy.errors import ConfigurationError

    receipts = _receipts(state, identity, None)
    index = receipts.index(entry)
    size = size or receipts.log.head()[0]
    try:
        path = receipts.log.inclusion(index, size)
        root = receipts.log.root(size)
    except ValueError as error:
        raise ConfigurationError(str(error), "see korora receipts list --all") from None
    leaf = leaf_hash(encode(receipts.log.entry(index)))
    _say_proof({"index": index, "leaf": leaf.hex(), "size": size, "root": root.hex()}, path, as_json=as_json)


@app.command()
def consistency(
    old: Annotated[int, typer.Argument(metavar="OLD", min=0, help="Entries of the earlier log.")],
    new: Annotated[
        int | None, typer.Argument(metavar="NEW", min=0, help="Of the later one [default: now].", show_default=False)
    ] = None,
    state: _State = None,
    identity: _Identity = None,
    as_json: _AsJson = False,
) -> None:
    """Prove that the log has only grown.

    The proof is that of RFC 9162, section 2.1.4.
    """
    from proxy.errors import ConfigurationError

    log = _receipts(state, identity, None).log
    new = log.head()[0] if new is None else new
    try:
        told = {"old": old, "old_root": log.root(old).hex(), "new": new, "new_root": log.root(new).hex()}
        path = log.consistency(old, new)
    except ValueError as error:
        raise ConfigurationError(str(error), "see korora receipts list --all") from None
    _say_proof(told, path, as_json=as_json)


@app.command()
def export(
    sessions: Annotated[
        list[str] | None,
        typer.Argument(metavar="SESSION", help="Which, as for show; without any, all.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to [default: standard output].")
    ] = None,
    state: _State = None,
    identity: _Identity = None,
    signer: _Signer = None,
    as_json: _AsJson = False,
) -> None:
    """Write receipts with all that verifying them takes.

    The log's head is the one signed last; with --identity it is signed anew.
    """
    import json
    import sys

    from korora.receipts import load_identity

    receipts = _receipts(state, identity, signer)
    chosen = {one.index: one for session in sessions or [] for one in receipts.found(session)}
    if not sessions:
        chosen = {one.index: one for one in receipts.listed(0)}
    content = receipts.export(
        [chosen[index] for index in sorted(chosen)], None if identity is None else load_identity(identity)
    )
    _say_crash(receipts)
    if out is None:
        sys.stdout.buffer.write(content + b"\n")
        sys.stdout.buffer.flush()
        return
    _write(out, content + b"\n")
    told = {"file": str(out), "receipts": len(chosen)}
    typer.echo(json.dumps(told) if as_json else f"{len(chosen)} receipts in {out}")


def _receipts(state: Path | None, identity: Path | None, signers: list[str] | None) -> "Receipts":
    from korora.receipts import Given, Receipts, own_signer
    from proxy.errors import ConfigurationError

    directory = state or (identity / "state" if identity is not None else STATE_DEFAULT)
    if not directory.is_dir():
        raise ConfigurationError(f"there is no state directory {directory}", "name it by --state or --identity")
    own = () if identity is None else (own_signer(identity),)
    return Receipts(directory, (*Given.read(None, None, signers or []).signers, *own))


def _write(path: Path, content: bytes) -> None:
    from crypto.files import write_private
    from proxy.errors import ConfigurationError

    try:
        write_private(path.absolute(), content)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}", "check the path, its permissions and the free space"
        ) from None


def _say_crash(receipts: "Receipts") -> None:
    for words in receipts.said:
        typer.echo(words, err=True)


def _say_proof(told: dict[str, object], path: "Sequence[bytes]", *, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(told | {"proof": [one.hex() for one in path]}))
        return
    for name, value in told.items():
        typer.echo(f"{name.replace('_', ' '):<9}{value}")
    typer.echo("proof" if path else "proof    none is needed")
    for one in path:
        typer.echo(f"  {one.hex()}")


def _row(one: "Logged") -> tuple[str, ...]:
    from proxy.control import printable

    told = one.predicate
    return (
        str(one.index),
        told.session[:8],
        told.stage.value,
        printable(told.vm.name if told.vm is not None else "") or "—",
        printable(told.source.name),
        printable(told.destination.name),
        (told.ended or told.started)[:19],
        told.outcome or "—",
        _signed(one),
    )


def _signed(one: "Logged") -> str:
    from proxy.control import printable

    return (
        ", ".join(sorted(one.receipt.signed)) if one.receipt is not None else f"NOT VERIFIED: {printable(one.trouble)}"
    )


def _as_dict(one: "Logged") -> dict[str, object]:
    told = one.predicate
    return {
        "index": one.index,
        "session": told.session,
        "stage": told.stage.value,
        "vm": told.vm.name if told.vm is not None else None,
        "uuid": told.vm.uuid if told.vm is not None else None,
        "source": told.source.name,
        "destination": told.destination.name,
        "started": told.started,
        "ended": told.ended,
        "outcome": told.outcome or None,
        "verified": one.receipt is not None,
        "signed": sorted(one.receipt.signed) if one.receipt is not None else [],
        "missing": list(one.receipt.missing) if one.receipt is not None else [],
    }


def _tell(value: object, indent: str) -> None:
    """A statement in lines: what is empty is left out."""
    from proxy.control import printable

    if not isinstance(value, dict):
        return
    for name, part in value.items():
        if _is_empty(part):
            continue
        if isinstance(part, dict):
            typer.echo(f"{indent}{printable(str(name))}")
            _tell(part, indent + "  ")
        elif isinstance(part, tuple) and isinstance(part[0], dict):
            typer.echo(f"{indent}{printable(str(name))}")
            for one in part:
                told = "  ".join(f"{key}={_words(item)}" for key, item in one.items() if not _is_empty(item))
                typer.echo(f"{indent}  {told}")
        else:
            typer.echo(f"{indent}{printable(str(name)):<12} {_words(part)}")


def _is_empty(part: object) -> bool:
    """Whether there is nothing in it to be told."""
    return part in ("", None, ()) or (isinstance(part, dict) and all(map(_is_empty, part.values())))


def _words(part: object) -> str:
    from proxy.control import printable

    text = ", ".join(map(str, part)) if isinstance(part, tuple) else str(part)
    return printable(" ".join(text.split()))


def _verified_in_words(receipt: "Receipt") -> str:
    from proxy.control import printable

    told = receipt.statement.predicate
    vm = printable(told.vm.name if told.vm is not None else "") or "a machine"
    words = f"session {told.session[:8]}, {told.stage.value}: {vm} from {told.source.name} to {told.destination.name}"
    if told.outcome:
        words += f", {told.outcome}"
    words += f"; signed by {' and '.join(sorted(receipt.signed))}"
    if receipt.missing:
        words += f", not by {' and '.join(receipt.missing)}"
    return printable(words)


def _verified_as_dict(verified: "Verified | Receipt") -> dict[str, object]:
    from crypto.receipts.bundle import Verified

    if not isinstance(verified, Verified):
        return {"kind": "envelope", "receipts": [_receipt_as_dict(verified)]}
    return {
        "kind": "bundle",
        "origin": verified.head.origin,
        "size": verified.head.size,
        "root": verified.head.root.hex(),
        "receipts": [{"index": index} | _receipt_as_dict(receipt) for index, receipt in verified.receipts],
    }


def _receipt_as_dict(receipt: "Receipt") -> dict[str, object]:
    told = receipt.statement.predicate
    return {
        "session": told.session,
        "stage": told.stage.value,
        "outcome": told.outcome or None,
        "signed": sorted(receipt.signed),
        "missing": list(receipt.missing),
        "unknown_keys": list(receipt.unknown),
    }


def _audit_as_dict(found: "Audit") -> dict[str, object]:
    return {
        "ok": not found.findings,
        "entries": found.entries,
        "root": found.root.hex(),
        "signed_head": found.head.size if found.head is not None else None,
        "unindexed": found.unindexed,
        "torn_bytes": found.torn,
        "findings": [{"kind": one.kind, "entry": one.index, "what": one.what} for one in found.findings],
    }


def _audit_in_words(found: "Audit") -> str:
    lines = [one.what for one in found.findings]
    if found.unindexed or found.torn:
        lines.append(
            f"a crash left {found.unindexed} entries out of the index and {found.torn} bytes of one that was never "
            f"logged: the next append puts that in order"
        )
    head = f"its head over {found.head.size} is signed" if found.head is not None else "no head of it was signed"
    if found.findings:
        lines.append("the log is NOT what was written: keep it as evidence")
    else:
        lines.append(f"the log is in order: {found.entries} entries, {head}, root {found.root.hex()}")
    return "\n".join(lines)

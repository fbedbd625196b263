"""`korora pki`: a private CA in a directory, for people and for scripts.

Results go to standard output, errors as one line to standard error with exit code 2. The work is done in crypto.pki;
this module reads the clock and finds the words.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from crypto.pki import Published
    from crypto.pki_index import Entry

EXIT_USAGE: Final = 2  # usage or configuration
_DAYS_MAX: Final = 36_500  # crypto.certificates.DAYS_MAX, not imported: `korora --help` must not load OpenSSL

app = typer.Typer(
    name="pki",
    help="A private CA: identities for the hosts, revocation, the CRL.",
    invoke_without_command=True,
    add_completion=False,
)

_Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The CA's directory.", show_default=False)]
_Name = Annotated[str, typer.Argument(metavar="NAME", help="The host's name.", show_default=False)]


@app.callback()
def root(context: typer.Context) -> None:
    """A private CA: identities for the hosts, revocation, the CRL."""
    help_without_command(context)


@app.command()
def init(
    directory: _Directory,
    name: Annotated[str, typer.Option("--name", metavar="CN", help="The CA's common name.")] = "Korora CA",
    days: Annotated[int, typer.Option(min=1, max=_DAYS_MAX, help="Validity of the CA in days.")] = 3650,
) -> None:
    """Make a CA in DIR."""
    with _one_line_errors():
        from crypto.pki import Authority

        authority = Authority.create(directory, now=datetime.now(UTC), name=name, days=days)
        typer.echo(
            f"CA {name!r} in {authority.directory}, valid until {_day(authority.certificate.not_valid_after_utc)}"
        )
        typer.echo(f"next: korora pki issue {directory} NAME")


@app.command()
def issue(
    directory: _Directory,
    name: _Name,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="D", help="Where to write the identity [default: DIR/hosts/NAME].")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=_DAYS_MAX, help="Validity of the certificates in days.")] = 397,
    force: Annotated[bool, typer.Option("--force", help="Replace an identity that stands there.")] = False,
) -> None:
    """Issue a complete identity: certificates, keys, CA and CRL."""
    with _one_line_errors():
        from crypto.pki import Authority

        issued = Authority.open(directory).issue(name, now=datetime.now(UTC), out=out, days=days, force=force)
        typer.echo(f"identity of {name} in {issued.directory}, valid until {_day(issued.not_after)}")


@app.command()
def revoke(directory: _Directory, name: _Name) -> None:
    """Revoke all certificates of NAME and publish the CRL."""
    with _one_line_errors():
        from crypto.pki import Authority

        revocation = Authority.open(directory).revoke(name, now=datetime.now(UTC))
        if revocation.serials:
            typer.echo(f"revoked {len(revocation.serials)} certificates of {name}")
        else:
            typer.echo(f"{name} has no valid certificate left; the CRL is published again")
        _say_published(revocation.published)


@app.command()
def crl(
    directory: _Directory,
    days: Annotated[int, typer.Option(min=1, max=_DAYS_MAX, help="Validity of the CRL in days.")] = 30,
) -> None:
    """Renew the CRL; relays do not start with an expired one."""
    with _one_line_errors():
        from crypto.pki import Authority

        _say_published(Authority.open(directory).publish_crl(now=datetime.now(UTC), days=days))


@app.command(name="list")
def list_(
    directory: _Directory,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
) -> None:
    """List every certificate that the CA has issued."""
    with _one_line_errors():
        from crypto.pki import Authority

        entries = Authority.open(directory).entries(now=datetime.now(UTC))
        if as_json:
            import json

            typer.echo(json.dumps([_as_json(entry) for entry in entries], indent=2))
            return
        rows = [("NAME", "USAGE", "STATUS", "UNTIL", "SERIAL", "WRITTEN TO")]
        rows += [
            (e.name, e.usage.value, e.status.value, _day(e.not_after), f"{e.serial:x}", str(e.directory))
            for e in entries
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _as_json(entry: "Entry") -> dict[str, str | None]:
    return {
        "name": entry.name,
        "usage": entry.usage.value,
        "status": entry.status.value,
        "serial": f"{entry.serial:x}",
        "not_before": entry.not_before.isoformat(),
        "not_after": entry.not_after.isoformat(),
        "revoked_at": entry.revoked_at.isoformat() if entry.revoked_at else None,
        "directory": str(entry.directory),
    }


def _say_published(published: "Published") -> None:
    typer.echo(f"CRL {published.number} in {published.path}, valid until {_day(published.next_update)}")
    for directory in published.refreshed:
        typer.echo(f"refreshed: {directory}")
    for directory, reason in published.failed:
        typer.echo(f"NOT refreshed: {directory} ({reason})")
    if published.elsewhere:
        typer.echo(f"not on this machine: {', '.join(published.elsewhere)}")
    typer.echo(f"copy {published.path} by hand over crl.pem of every identity that stands elsewhere")


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a person can put right becomes one line with its remedy, and exit code 2; a bug of ours passes through."""
    from crypto.errors import PkiError

    try:
        yield
    except PkiError as error:
        message = f"{error}; {error.remedy}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        message = f"{where}{error.strerror or error}; check the path, its permissions and the free space"
    else:
        return
    typer.echo(f"korora: error: {message}", err=True)
    raise typer.Exit(EXIT_USAGE)

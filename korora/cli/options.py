"""Options that several commands share."""

import re
from enum import StrEnum, unique
from pathlib import Path
from typing import Annotated

import typer

from korora.log import LogFormat, LogLevel

TENANT_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
PIN_PATTERN = re.compile(r"^(?:sha256:)?([0-9A-Fa-f]{64})$")

Identity = Annotated[
    Path, typer.Option("--identity", metavar="DIR", help="This host's identity (korora pki issue).", show_default=False)
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="PEER", help="Accept only this peer; repeat for several [default: any of the CA]."),
]
Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", metavar="SHA256", help="Accept only this public key of a peer, on top of the CA; repeat."),
]
Once = Annotated[bool, typer.Option("--once", help="End with the first accepted session.")]
Report = Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write the session's report as JSON.")]
ResumeTimeout = Annotated[
    int,
    typer.Option(
        "--resume-timeout",
        min=0,
        max=3600,
        metavar="SECONDS",
        help="How long to wait for a peer that was lost, or that failed to authenticate; 0: not at all.",
    ),
]
Lanes = Annotated[
    int, typer.Option("--lanes", min=1, max=16, metavar="N", help="TCP connections that carry a session, at least.")
]
RateLimit = Annotated[
    int | None,
    typer.Option(
        "--rate-limit",
        min=1024,
        metavar="BYTES_PER_SECOND",
        help="Read the hypervisor no faster than this.",
        show_default=False,
    ),
]
XlFlags = Annotated[
    str | None,
    typer.Option(
        "--xl-flags",
        metavar="FLAGS",
        help="What connects is xl, a migration each; its receiver gets these of -e -d -p, or none of them: ''.",
        show_default=False,
    ),
]


Qmp = Annotated[
    str | None,
    typer.Option(
        "--qmp",
        metavar="unix:PATH",
        help="The local QEMU's monitor, for this relay alone: its hand-over is guarded then.",
        show_default=False,
    ),
]
Guarded = Annotated[
    bool, typer.Option("--guarded", help="Refuse sessions whose hand-over is not guarded at both ends.")
]


@unique
class Encoding(StrEnum):
    """As proxy/paging.py has them, which is not imported before the command line has been checked."""

    AUTO = "auto"
    OPAQUE = "opaque"
    PAGES = "pages"
    BEST = "best"


Encode = Annotated[
    Encoding,
    typer.Option(
        "--encode",
        help="auto: what pays on this network; opaque: the bytes as they are; pages: pages deduplicated and compressed;"
        " best: the fewest bytes.",
    ),
]
PageCache = Annotated[
    int,
    typer.Option(
        "--page-cache",
        min=0,
        metavar="BYTES",
        help="Memory for pages of a session, the smaller of both sides counts; 0: no pages, only opaque bytes.",
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="Who may migrate what (korora policy); read again on SIGHUP [default: whoever authenticates, everything].",
        show_default=False,
    ),
]
Approvals = Annotated[
    str | None,
    typer.Option(
        "--approvals",
        metavar="PATH",
        help="The socket by which people approve of migrations (korora approve), where the policy wants them to.",
        show_default=False,
    ),
]
Attestation = Annotated[
    Path | None,
    typer.Option(
        "--attestation",
        metavar="DIR",
        help="What peers' platforms may be, a file each (korora attest); each has to prove it [default: nothing].",
        show_default=False,
    ),
]
Tpm = Annotated[
    str | None,
    typer.Option(
        "--tpm",
        metavar="TCTI",
        help="This host's TPM 2.0, for peers that want it attested: device:/dev/tpmrm0.",
        show_default=False,
    ),
]


@unique
class Preflight(StrEnum):
    """As korora/preflight/agent.py has them."""

    ON = "on"
    OFF = "off"
    STRICT = "strict"


PreflightMode = Annotated[
    Preflight,
    typer.Option(
        "--preflight",
        help="Look at both hosts before a session (korora preflight): on refuses what cannot go well, strict also what"
        " is doubtful.",
    ),
]
State = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="What is kept between sessions [default: IDENTITY/state]."),
]
Tenant = Annotated[
    str,
    typer.Option(
        "--tenant",
        metavar="NAME",
        help="Whose stored pages a session may use, and leaves its own to; the same at both ends, or none are.",
    ),
]
TENANT = "default"
StoreBytes = Annotated[
    int | None,
    typer.Option(
        "--store-bytes",
        min=0,
        metavar="BYTES",
        help="Disk for pages of earlier sessions; 0: none are kept [default: 20 GiB].",
        show_default=False,
    ),
]
PAGE_CACHE_BYTES = 512 * 1024 * 1024
AllowClassical = Annotated[
    bool, typer.Option("--allow-classical", help="Accept key exchanges without ML-KEM. Not advised.")
]
Format = Annotated[LogFormat, typer.Option("--log-format", help="How log lines look.")]
Level = Annotated[LogLevel, typer.Option("--log-level", help="Which log lines are written.")]


def help_without_command(context: typer.Context) -> None:
    """Where a command is wanted and none is given: the help, on standard error, and exit code 2."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def digests(pins: list[str] | None) -> tuple[bytes, ...]:
    """The digests that --pin names, of 32 bytes.

    Raises:
        ConfigurationError: one is none.
    """
    from proxy.errors import ConfigurationError

    digests = []
    for pin in pins or []:
        match = PIN_PATTERN.match(pin)
        if match is None:
            raise ConfigurationError(
                f"--pin {pin!r} is no SHA-256",
                "give the 64 hexadecimal digits that docs/operations.md shows how to get",
            )
        digests.append(bytes.fromhex(match[1]))
    return tuple(digests)

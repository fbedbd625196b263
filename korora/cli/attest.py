"""`korora attest`: what hosts' platforms may be, and how a host is enrolled by its TPM."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from korora.agents.vtpm.tcti import Tpm

_Tpm = Annotated[str, typer.Option("--tpm", metavar="TCTI", help="The host's TPM 2.0, as tpm2-tss names it.")]
_MaybeTpm = Annotated[
    str | None,
    typer.Option("--tpm", metavar="TCTI", help="The TPM of HOST, where this command reaches it.", show_default=False),
]
_Folder = Annotated[
    Path, typer.Option("--attestation", metavar="DIR", help="What hosts may be, a file each.", show_default=False)
]
_Host = Annotated[str, typer.Argument(metavar="HOST", help="NAME of its certificate.", show_default=False)]
_Pcrs = Annotated[str, typer.Option("--pcrs", metavar="BANK:N,…", help="The PCRs it is held to.")]
_Authorities = Annotated[
    Path | None,
    typer.Option("--ek-ca", metavar="DIR", help="TPM manufacturers' certificates: one must certify the TPM."),
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
_DEVICE = "device:/dev/tpmrm0"
_PCRS = "sha256:0,1,2,3,4,5,6,7"

app = typer.Typer(
    name="attest",
    help="Hosts that prove by their TPM what they run.",
    invoke_without_command=True,
    add_completion=False,
)


@app.callback()
def root(context: typer.Context) -> None:
    """Hosts that prove by their TPM what they run."""
    help_without_command(context)


def _tpm(tcti: str) -> "Tpm":
    from korora.agents.vtpm.tcti import Tpm

    return Tpm(tcti)


def _say(text: str) -> None:
    typer.echo(text, err=True)


@app.command()
def show(
    tpm: _Tpm = _DEVICE,
    request: Annotated[
        Path | None, typer.Option("--request", metavar="FILE", help="Write what this host is enrolled by.")
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Show this host's keys, and leave one in its TPM.

    The attestation key is left there because deriving it anew takes a TPM long.
    """
    import json

    from crypto.attestation.structures import Public
    from crypto.errors import TpmUnusable
    from korora import enrolment

    opened = _tpm(tpm)
    try:
        opened.keep()
    except TpmUnusable as error:  # its owner has a password: it will be derived, then, which is slower
        _say(f"the attestation key is not left in the TPM: {error}")
    shown = enrolment.request(opened)
    if request is not None:
        enrolment.write(request, shown)
    facts = {
        "ak": Public.parse(bytes.fromhex(shown.ak)).name.hex(),
        "endorsement": Public.parse(bytes.fromhex(shown.endorsement)).name.hex(),
        "certified": bool(shown.certificate),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"attestation key  {facts['ak']}")
    typer.echo(f"endorsement key  {facts['endorsement']}")
    typer.echo(
        f"certificate      {'in the TPM' if facts['certified'] else 'none: compare the endorsement key by hand'}"
    )


@app.command()
def challenge(
    host: _Host,
    request: Annotated[Path, typer.Option("--request", metavar="FILE", help="What HOST has shown.")],
    attestation: _Folder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The challenge, for HOST to answer.")],
    pcrs: _Pcrs = _PCRS,
    ek_ca: _Authorities = None,
) -> None:
    """Challenge a host that has shown its keys."""
    from datetime import UTC, datetime

    from korora import enrolment

    shown = enrolment.read(request, enrolment.Request)
    roots = None if ek_ca is None else enrolment.certificates(ek_ca)
    asked, pending = enrolment.ask(shown, pcrs, roots, datetime.now(UTC))
    enrolment.write(attestation / f"{host}{enrolment.PENDING}", pending, 0o600)
    enrolment.write(out, asked)
    if roots is None:
        _say("no manufacturer is asked: compare the endorsement key with what that host shows, or give --ek-ca")


@app.command()
def answer(
    challenge: Annotated[Path, typer.Option("--challenge", metavar="FILE", help="Of the host that will judge.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The answer, for it.")],
    tpm: _Tpm = _DEVICE,
) -> None:
    """Answer a challenge on the host that is enrolled."""
    from korora import enrolment

    asked = enrolment.read(challenge, enrolment.Asked)
    enrolment.write(out, enrolment.answer(_tpm(tpm), asked), 0o600)


@app.command()
def enrol(
    host: _Host,
    attestation: _Folder,
    given: Annotated[
        Path | None, typer.Option("--answer", metavar="FILE", help="What HOST has answered to its challenge.")
    ] = None,
    tpm: _MaybeTpm = None,
    pcrs: _Pcrs = _PCRS,
    ek_ca: _Authorities = None,
) -> None:
    """Enrol a host: by its answer, or at once.

    At once goes where its TPM can be reached from here.
    """
    from datetime import UTC, datetime

    from crypto.attestation import reference
    from crypto.errors import TpmUnusable
    from korora import enrolment
    from proxy.errors import ConfigurationError

    now = datetime.now(UTC)
    path = attestation / f"{host}{enrolment.PENDING}"
    if (given is None) == (tpm is None):
        raise ConfigurationError("enrol wants --answer or --tpm", "give one of them")
    if tpm is not None:
        opened = _tpm(tpm)
        try:
            opened.keep()
        except TpmUnusable as error:
            _say(f"the attestation key is not left in the TPM: {error}")
        roots = None if ek_ca is None else enrolment.certificates(ek_ca)
        asked, pending = enrolment.ask(enrolment.request(opened), pcrs, roots, now)
        answered = enrolment.answer(opened, asked)
    else:
        pending = enrolment.read(path, enrolment.Pending)
        answered = enrolment.read(given or path, enrolment.Answer)
    made = enrolment.conclude(host, pending, answered, now)
    text = reference.render(made)
    reference.parse(text, host)  # what is written is what can be read, a host's name included
    enrolment.put(attestation / f"{host}{reference.SUFFIX}", text.encode())
    path.unlink(missing_ok=True)
    if not made.endorsed_by:
        _say(f"nobody certifies the TPM of {host}: its endorsement key is taken as it was shown")
    typer.echo(f"enrolled {host}: {attestation / f'{host}{reference.SUFFIX}'}")


@app.command()
def golden(
    tpm: _Tpm = _DEVICE,
    pcrs: _Pcrs = _PCRS,
    events: Annotated[
        bool, typer.Option("--events", help="Hold PCRs to the events of the firmware's log, not to values.")
    ] = False,
    files: Annotated[
        bool, typer.Option("--files", help="Hold the host to the files it has measured until now.")
    ] = False,
) -> None:
    """Print what this host is now, for its file elsewhere."""
    from korora import enrolment

    shown = _tpm(tpm).attest(bytes(32), enrolment.selection_of(pcrs), event_log=events, ima=files)
    typer.echo(enrolment.tables(enrolment.golden(shown, events=events, files=files)), nl=False)


@app.command()
def verify(host: _Host, attestation: _Folder, tpm: _Tpm = _DEVICE, as_json: _AsJson = False) -> None:
    """Judge a host by its TPM, as a session would."""
    import json
    import os

    from crypto.attestation.binding import Binding, Side
    from crypto.attestation.reference import appraise, load
    from crypto.keys import SessionId

    reference = load(attestation, host)
    binding = Binding(os.urandom(32), SessionId(os.urandom(16)), Side.SOURCE, os.urandom(32))
    shown = _tpm(tpm).attest(
        binding.qualifying(), reference.selection, event_log=bool(reference.events), ima=reference.files is not None
    )
    found = appraise(shown, expected=reference, binding=binding)
    clock = found.quoted.clock
    if as_json:
        typer.echo(
            json.dumps({"host": host, "proved": found.proved, "resets": clock.resets, "restarts": clock.restarts})
        )
    else:
        typer.echo(f"{host} is what it may be: {found.proved}")

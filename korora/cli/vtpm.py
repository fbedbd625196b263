"""`korora vtpm`: whose the machines' virtual TPMs are, as this host knows it; and one moves in a file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from korora.cli import options as opt
from korora.cli.options import help_without_command

if TYPE_CHECKING:
    from korora.agents.vtpm.carrier import Agent
    from korora.agents.vtpm.courier import Courier
    from proxy.attestation import Platform
    from proxy.control import Wanted

STATE_DEFAULT: Final = Path("/var/lib/korora")  # the daemon's, as in its configuration
IDENTITY_DEFAULT: Final = Path("/etc/korora/identity")
_COLUMNS: Final = ("VM", "EPOCH", "HERE", "PEER", "SINCE", "EMULATOR", "IDENTITY")

app = typer.Typer(name="vtpm", help="Virtual TPMs.", invoke_without_command=True, add_completion=False)

_State = Annotated[
    Path, typer.Option("--state", metavar="DIR", help="The relay's state directory, with its vtpm.toml.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
_Uuid = Annotated[str, typer.Argument(metavar="UUID", help="The machine's.")]
_Identity = Annotated[
    Path, typer.Option("--identity", envvar="KORORA_IDENTITY", metavar="DIR", help="This host's identity.")
]
_Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="What the other host is to get.")]
_Pins = Annotated[
    list[str] | None,
    typer.Option("--pin", metavar="SHA256", help="Believe only this signing key, on top of the CA; repeat."),
]


@app.callback()
def root(context: typer.Context) -> None:
    """Virtual TPMs that move with their machines: who has them, and since which epoch."""
    from korora.log import LogFormat, LogLevel, configure

    help_without_command(context)
    configure(LogFormat.CONSOLE, LogLevel.WARNING)


@app.command()
def status(
    uuid: Annotated[str | None, typer.Argument(metavar="UUID", help="Only that machine's.")] = None,
    state: _State = STATE_DEFAULT,
    as_json: _AsJson = False,
) -> None:
    """List the vTPMs that this host has had a part in."""
    import json

    agent = _agent(state)
    found = [_look(agent, one) for one in ([_checked(uuid)] if uuid else agent.ledgers.names())]
    if as_json:
        typer.echo(json.dumps({"vtpms": found}))
        return
    if not found:
        typer.echo("no vTPM has come or gone yet")
        return
    rows = [_COLUMNS, *(tuple(str(value) for value in look.values()) for look in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def epochs(uuid: _Uuid, state: _State = STATE_DEFAULT, as_json: _AsJson = False) -> None:
    """Show the ledger of one vTPM: each time it came, went, or stayed."""
    import json

    import msgspec

    from korora.agents.vtpm.ledger import Ledgers

    ledger = Ledgers(state).read(_checked(uuid))
    if as_json:
        typer.echo(json.dumps({"uuid": uuid, "entries": [msgspec.to_builtins(entry) for entry in ledger.entries]}))
        return
    if not ledger.entries:
        typer.echo("this host has had no part in it")
    for entry in ledger.entries:
        typer.echo(
            f"{entry.at}  epoch {entry.epoch:<4} {entry.holding:<9} {entry.peer:<20} session {entry.session[:8]}  "
            f"state {entry.digest[:16]}"
        )


@app.command()
def request(
    uuid: _Uuid,
    source: Annotated[str, typer.Option("--from", metavar="HOST", help="NAME of the host that has the vTPM.")],
    out: _Out,
    hours: Annotated[
        int, typer.Option("--hours", min=1, max=168, help="How long the key is kept that the vTPM is wrapped for.")
    ] = 24,
    tpm: opt.Tpm = None,
    pcrs: Annotated[
        str | None, typer.Option("--pcrs", metavar="BANK:N,…", help="Which PCRs that host demands.")
    ] = None,
    identity: _Identity = IDENTITY_DEFAULT,
    state: _State = STATE_DEFAULT,
) -> None:
    """Ask another host for a vTPM, in a file."""
    courier = _courier(state, identity, platform=_platform(tpm, None, state))
    _write(out, courier.ask(_checked(uuid), source, hours, _wanted(pcrs) if tpm else None))
    _say(f"take {out} to {source}; there: korora vtpm export {uuid} --request … --to THIS-HOST --out …")


@app.command()
def export(
    uuid: _Uuid,
    request: Annotated[Path, typer.Option("--request", metavar="FILE", help="What the other host asks by.")],
    to: Annotated[str, typer.Option("--to", metavar="HOST", help="NAME of the host that has to have asked.")],
    out: _Out,
    certain: Annotated[
        bool, typer.Option("--certain", help="You have looked: the machine does not run here. Where no xl can tell.")
    ] = False,
    pin: _Pins = None,
    attestation: opt.Attestation = None,
    identity: _Identity = IDENTITY_DEFAULT,
    state: _State = STATE_DEFAULT,
) -> None:
    """Give a vTPM away in a file, without its machine.

    This host cannot use it from then on. Asked again, it writes the same file again, until the answer is settled.
    """
    name = _checked(uuid)
    courier = _courier(state, identity, pin, _platform(None, attestation, state))
    _write(out, courier.leave(name, _content(request), to, _require_absent(name, certain=certain)))
    _say(f"take {out} to {to}, and settle its answer here: korora vtpm settle FILE")


@app.command(name="import")
def import_(
    parcel: Annotated[Path, typer.Argument(metavar="FILE", help="What the other host has exported.")],
    out: _Out,
    pin: _Pins = None,
    identity: _Identity = IDENTITY_DEFAULT,
    state: _State = STATE_DEFAULT,
) -> None:
    """Take a vTPM from a file; once."""
    _write(out, _courier(state, identity, pin).receive(_content(parcel)))
    _say(f"the vTPM is here; take {out} back, for the other host to settle")


@app.command()
def withdraw(
    request: Annotated[Path, typer.Option("--request", metavar="FILE", help="What this host had asked by.")],
    out: _Out,
    identity: _Identity = IDENTITY_DEFAULT,
    state: _State = STATE_DEFAULT,
) -> None:
    """Say that a vTPM asked for has not come, and never will."""
    _write(out, _courier(state, identity).withdraw(_content(request)))
    _say(f"its key is gone; take {out} to the other host, for it to settle")


@app.command()
def settle(
    answer: Annotated[Path | None, typer.Argument(metavar="FILE", help="What the other host has answered.")] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="UUID", help="There is no answer: that machine's vTPM stays here.")
    ] = None,
    certain: Annotated[
        bool, typer.Option("--certain", help="You know that it never came, and that no file of it is left.")
    ] = False,
    pin: _Pins = None,
    identity: _Identity = IDENTITY_DEFAULT,
    state: _State = STATE_DEFAULT,
) -> None:
    """End what export has begun: it has come there, or stays here."""
    from proxy.errors import ConfigurationError

    if (answer is None) == (keep is None):
        raise ConfigurationError("settle wants an answer, or --keep", "give one of them")
    courier = _courier(state, identity, pin)
    if answer is not None:
        uuid = courier.settle(_content(answer))
    else:
        uuid = _checked(keep or "")
        if not certain:
            raise ConfigurationError(
                "where the other host has it, there would be two of that vTPM",
                "withdraw the request there; if that host is lost, say it again with --certain",
            )
        courier.keep_here(uuid)
    _say(f"the vTPM is {_agent(state).ledgers.read(uuid).holding.value}")


@app.command()
def forget(
    uuid: _Uuid,
    certain: Annotated[
        bool, typer.Option("--certain", help="You have looked: no hand-over of that machine is under way.")
    ] = False,
    state: _State = STATE_DEFAULT,
) -> None:
    """Put the ledger of one vTPM aside.

    For a machine whose vTPM was made anew, or that came or went by another way than a relay's.
    """
    from korora.agents.vtpm.ledger import Ledgers

    kept = Ledgers(state).forget(_checked(uuid), certain=certain)
    typer.echo("this host has had no part in it" if kept is None else f"kept as {kept}; do the same on its other hosts")


def _agent(state: Path) -> "Agent":
    from korora.agents.vtpm.host import open_agent

    return open_agent(state)


def _wanted(pcrs: str | None) -> "Wanted":
    from korora.enrolment import PCRS_DEFAULT, selection_of
    from proxy.control import Bank, Wanted

    banks = selection_of(pcrs or PCRS_DEFAULT).banks
    return Wanted(tuple(Bank(bank, indices) for bank, indices in banks))  # type: ignore[arg-type]  # names it knows


def _platform(tpm: str | None, references: Path | None, state: Path) -> "Platform | None":
    if not tpm and references is None:
        return None
    from crypto.attestation.evidence import NoAttester
    from korora.agents.vtpm.tcti import Tpm
    from korora.platform import HostPlatform

    return HostPlatform(Tpm(tpm) if tpm else NoAttester(), references, state=state)


def _courier(
    state: Path, identity: Path, pins: list[str] | None = None, platform: "Platform | None" = None
) -> "Courier":
    import os
    from datetime import UTC, datetime

    from crypto.at_rest import HostKeys
    from crypto.host_key import HOST_KEY_FILE, host_key
    from crypto.identity import Identity
    from korora.agents.vtpm.courier import Courier
    from proxy.errors import ConfigurationError

    agent = _agent(state)  # first: where no vTPMs are moved, nothing is made
    if state.stat().st_uid != os.geteuid():  # a ledger that is ours would stop the relay
        raise ConfigurationError(f"{state} is another user's", "be the relay's user")
    ours = Identity.load(identity, now=datetime.now(UTC))
    keys = HostKeys(host_key(state / HOST_KEY_FILE))
    return Courier(agent, ours, keys, frozenset(opt.digests(pins)), platform=platform)


def _require_absent(uuid: str, *, certain: bool) -> Callable[[], None]:
    """What raises where xl has the machine, or cannot tell."""
    import asyncio

    from proxy.errors import HypervisorFailed, VtpmFailed
    from proxy.hypervisors.xl import XlToolstack

    def look() -> None:
        try:
            here = asyncio.run(XlToolstack().knows(uuid))
        except HypervisorFailed as error:
            if certain:
                return
            raise VtpmFailed(
                f"whether the machine runs here cannot be told: {error}", "if it does not, say it again with --certain"
            ) from None
        if here:
            raise VtpmFailed(
                f"the machine {uuid} is here", "migrate it, and its vTPM goes along; or shut it down, or save it, first"
            )

    return look


def _content(path: Path) -> bytes:
    from crypto.files import read_bounded
    from korora.agents.vtpm.letters import LETTER_BYTES_MAX
    from proxy.errors import ConfigurationError

    try:
        return read_bounded(path, LETTER_BYTES_MAX)[0]
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}", "see that it was copied here whole") from None


def _write(path: Path, content: bytes) -> None:
    from crypto.files import write_private
    from proxy.errors import ConfigurationError

    try:
        write_private(path, content)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {path}: {error.strerror}",
            "give another --out: what export and import have made is written again",
        ) from None


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _look(agent: "Agent", uuid: str) -> dict[str, object]:
    from proxy.control import printable
    from proxy.errors import VtpmFailed

    ledger = agent.ledgers.read(uuid)
    last = ledger.entries[-1] if ledger.entries else None
    emulator = agent.places.emulator(uuid) if agent.places is not None else None
    try:
        if emulator is None:
            stands = "qemu's"
        else:
            stands = "absent" if not emulator.listens else "running" if emulator.running() else "idle"
    except VtpmFailed:
        stands = "busy"  # a QEMU has its control channel
    return {
        "uuid": uuid,
        "epoch": ledger.epoch,
        "holding": ledger.holding.value,
        "peer": printable(last.peer) if last else "",
        "since": last.at if last else "",
        "emulator": stands,
        "identity": ledger.identity[-16:],
    }


def _checked(uuid: str) -> str:
    """A machine's UUID as a file's name.

    Raises:
        ConfigurationError: it is none.
    """
    from uuid import UUID

    from proxy.errors import ConfigurationError

    try:
        return str(UUID(uuid))
    except ValueError:
        raise ConfigurationError(
            f"{uuid!r} is no UUID", "name the machine by its UUID, as xl list -v shows it"
        ) from None

"""`korora preflight`: each step towards a peer and each check as a finding, and the sheet that shows them."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from crypto.errors import AttestationError, AuthenticationError, CryptoError, ReferenceInvalid, TpmError
from korora.errors import remedy_of
from korora.preflight import checks
from korora.preflight.agent import HostSurveyor
from proxy.attestation import Platform
from proxy.control import printable
from proxy.errors import EXIT_DONE, EXIT_POLICY, ConfigurationError, RelayError, exit_code_of
from proxy.limits import KIB, REASON_CHARACTERS_MAX, XL_OUTPUT_BYTES_MAX, XL_SECONDS_MAX
from proxy.preflight import CHECKS, Finding, HostFacts
from proxy.shell.contact import Contact

STEPS: Final = ("connection", "authentication", "attestation", "survey")
_CELL: Final = 30  # characters of what a host has, in the sheet
_MEMORY: Final = re.compile(r"(?P<number>[0-9]{1,12})(?P<unit>[kMGT]?)(?:i?B)?", re.ASCII)
_UNITS: Final = {"": 1, "k": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Came = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Sheet:
    """What was found.

    Attributes:
        own: this host.
        theirs: the peer; None where there is none, or it has said nothing.
        peer: its name, or its address as long as that is all there is; empty where there is none.
        findings: steps first.
        code: exit code.
    """

    own: HostFacts
    theirs: HostFacts | None
    peer: str
    findings: tuple[Finding, ...]
    code: int


def open_platform(tcti: str, references: Path | None) -> tuple[Platform | None, tuple[Finding, ...]]:
    """What this host shows of itself and demands of others, or why it cannot."""
    if not tcti and references is None:
        return None, ()
    from korora.platform import open_platform

    try:
        return open_platform(tcti, references), ()
    except (TpmError, ReferenceInvalid) as error:
        return None, (_failed("attestation", error),)


def look(surveyor: HostSurveyor, need_bytes: int, troubles: tuple[Finding, ...] = ()) -> Sheet:
    """This host alone.

    Args:
        surveyor: of this host.
        need_bytes: memory of a machine that is to come; -1 where that is not known.
        troubles: what was found before.
    """
    own = surveyor.facts(thorough=True)
    found = (*troubles, *checks.alone(own, need_bytes=need_bytes, attests=bool(surveyor.tcti)))
    return Sheet(own, None, "", found, _code(found))


async def compare(
    contact: Contact,
    surveyor: HostSurveyor,
    need_bytes: int,
    *,
    troubles: tuple[Finding, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Sheet:
    """This host and a destination. What fails on the way is a finding, and what can be checked without it is.

    Args:
        contact: of the destination.
        surveyor: of this host.
        need_bytes: memory of the machine that is to go; -1 where that is not known.
        troubles: what was found before.
        progress: hears what is being done.
    """
    came: dict[str, str] = {}
    progress("connecting")

    def step(name: str, words: str) -> None:
        came[name] = words
        progress(f"{name} done")

    try:
        own, answer, waited = await contact.survey(surveyor, need_bytes, step)
    except (RelayError, CryptoError) as error:
        sheet = await asyncio.to_thread(look, surveyor, need_bytes, troubles)
        failed = _step(error, came)
        before = [one for one in _steps(came) if STEPS.index(one.check) < STEPS.index(failed)]
        found = (*before, _failed(failed, error), *sheet.findings)
        return replace(
            sheet,
            peer=came.get("authentication", contact.where.address),
            findings=found,
            code=exit_code_of(error),
        )
    peer = came["authentication"]
    local = surveyor.survey(own, answer.host, departing=True, need_bytes=need_bytes, waited_seconds=waited)
    known = {finding.check for finding in troubles}
    steps = (one for one in _steps(came) if one.check not in known)
    found = (*troubles, *steps, *_merged(local, answer.findings, peer))
    return Sheet(own, answer.host, peer, found, _code(found))


def _code(found: tuple[Finding, ...]) -> int:
    return EXIT_POLICY if any(finding.grade == "failed" for finding in found) else EXIT_DONE


def _steps(came: dict[str, str]) -> Iterator[Finding]:
    words = {
        "connection": "{} answers",
        "authentication": "it is {}",
        "attestation": "it has proved {}" if came.get("attestation") else "this host demands nothing",
    }
    for name, found in came.items():
        yield Finding(name, "ok", printable(words[name].format(found)))


def _step(error: Exception, came: dict[str, str]) -> str:
    """Which step an error is of: TLS tells this side late that the other one does not accept its certificate."""
    if isinstance(error, AttestationError | TpmError):
        return "attestation"
    if isinstance(error, AuthenticationError):
        return "authentication"
    return next(name for name in STEPS if name not in came)


def _failed(check: str, error: Exception) -> Finding:
    words = str(getattr(error, "told", "")) or str(error) or type(error).__name__
    return Finding(check, "failed", printable(words), printable(remedy_of(error)))


def _merged(local: tuple[Finding, ...], theirs: tuple[Finding, ...], peer: str) -> Iterator[Finding]:
    """One finding a check, the worse of both; what only the peer has comes last."""
    said = {finding.check: finding for finding in theirs}
    for finding in local:
        other = said.pop(finding.check, finding)
        yield _of_peer(other, peer) if checks.worse(other.grade, finding.grade) else finding
    for finding in said.values():
        if finding.check not in STEPS:  # of the steps this host knows more than the peer does
            yield _of_peer(finding, peer)


def _of_peer(finding: Finding, peer: str) -> Finding:
    says = printable(f"{peer} says: {finding.says}")[:REASON_CHARACTERS_MAX]
    return Finding(finding.check, finding.grade, says, printable(finding.remedy))


# ---------------------------------------------------------------- memory of a machine


def parse_memory(text: str) -> int:
    """Bytes: a number and its unit, `4G`; units are powers of 1024.

    Raises:
        ConfigurationError: it is none.
    """
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"--memory {text!r} is no size", "give a number and a unit: 4G, 512M")
    return int(match["number"]) * _UNITS[match["unit"]]


def memory_of(name: str) -> int:
    """What a domain of this host's Xen takes, in bytes, as `xl list -l` has it.

    Raises:
        ConfigurationError: there is no such domain, or no xl.
    """
    import subprocess

    remedy = "see xl list, or say what it needs by --memory"
    try:
        done = subprocess.run(
            ["xl", "list", "-l", name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=XL_SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigurationError(f"xl cannot be asked about {name!r}: {error}", remedy) from None
    need_bytes = read_memory(done.stdout[:XL_OUTPUT_BYTES_MAX])
    if done.returncode or need_bytes < 0:
        raise ConfigurationError(f"xl does not tell the memory of {name!r}", remedy)
    return need_bytes


def read_memory(text: bytes) -> int:
    """What libxl frees before it makes the one domain that `xl list -l NAME` shows; -1 where it does not tell."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
    if isinstance(found, list):
        found = found[0] if len(found) == 1 else None
    for key in ("config", "b_info"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return -1
    memory, shadow = found.get("target_memkb") or found.get("max_memkb"), found.get("shadow_memkb") or 0
    if not isinstance(memory, int) or not isinstance(shadow, int) or memory <= 0 or shadow < 0:
        return -1
    return (memory + shadow) * KIB


# ---------------------------------------------------------------- the sheet


def as_dict(sheet: Sheet) -> dict[str, Any]:
    """As JSON's types."""
    return {
        "peer": sheet.peer or None,
        "this_host": msgspec.to_builtins(sheet.own),
        "peer_host": msgspec.to_builtins(sheet.theirs),
        "findings": msgspec.to_builtins(sheet.findings),
        "exit_code": sheet.code,
    }


def lines(sheet: Sheet) -> Iterator[str]:
    """As people read it: a line a check, and under it what is not in order, and what to do."""
    here = checks.columns(sheet.own)
    there = checks.columns(sheet.theirs) if sheet.theirs is not None else {}
    head = ("CHECK", "THIS HOST", printable(sheet.peer).upper() if sheet.peer else "", "GRADE")
    found = {finding.check: finding for finding in sheet.findings}
    checked = [name for name in found if name not in CHECKS]
    checked += [name for name in CHECKS if name in found or here[name]]
    rows = [head, *((name, _cell(here, name), _cell(there, name), _grade(found.get(name))) for name in checked)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width]
        yield "  ".join(cells).rstrip()
        finding = found.get(row[0])
        if finding is not None and finding.grade in {"failed", "warning"}:
            yield f"    {finding.says}"
            if finding.remedy:
                yield f"    → {finding.remedy}"


def _cell(columns: dict[str, str], name: str) -> str:
    text = columns.get(name, "")
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _grade(finding: Finding | None) -> str:
    return "" if finding is None else finding.grade

"""The surveyor of a process: this host's facts, the checks, and how strict it is about them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import msgspec

from korora.preflight import checks
from korora.preflight.gather import Gatherer
from korora.watched import Unwatched, Watch
from proxy.errors import PreflightFailed
from proxy.preflight import Finding, HostFacts

Mode = Literal["on", "off", "strict"]
_DEVICE: Final = "device"


@dataclass(frozen=True, slots=True)
class HostSurveyor:
    """See ``proxy.preflight.Surveyor``.

    Attributes:
        gatherer: reads this host.
        strict: whether a warning refuses, too.
        tcti: of the TPM by which this host is set up to attest; empty for none.
        watch: counts.
    """

    gatherer: Gatherer
    strict: bool = False
    tcti: str = ""
    watch: Watch = field(default_factory=Unwatched)

    def facts(self, *, thorough: bool = False) -> HostFacts:
        """See ``Surveyor.facts``."""
        facts = self.gatherer.facts(thorough=thorough)
        kind, _, where = self.tcti.partition(":")
        if self.tcti and not facts.tpm and (kind != _DEVICE or Path(where or "/dev/tpmrm0").exists()):
            return msgspec.structs.replace(facts, tpm="2.0")  # nothing else is spoken to by a TCTI
        return facts

    def stamped(self, facts: HostFacts) -> HostFacts:
        """See ``Surveyor.stamped``."""
        return msgspec.structs.replace(facts, clock_ms=self.gatherer.now_ms())

    def judge(
        self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, waited_seconds: float = 0.0
    ) -> tuple[Finding, ...]:
        """See ``Surveyor.judge``."""
        found = checks.findings(self._case(own, theirs, departing=departing, waited_seconds=waited_seconds))
        for finding in found:
            self.watch.surveyed(finding.check, finding.grade)
        told = tuple(finding for finding in found if finding.grade in {"failed", "warning"})
        against = [finding for finding in told if self.strict or finding.grade == "failed"]
        if against:
            first = min(against, key=lambda finding: finding.grade != "failed")
            raise PreflightFailed(f"preflight: {first.check}: {first.says}", first.remedy, told)
        return told

    def survey(
        self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, need_bytes: int, waited_seconds: float = 0.0
    ) -> tuple[Finding, ...]:
        """See ``Surveyor.survey``."""
        case = self._case(own, theirs, departing=departing, waited_seconds=waited_seconds)
        return checks.findings(replace(case, need_bytes=need_bytes, thorough=True))

    def _case(self, own: HostFacts, theirs: HostFacts | None, *, departing: bool, waited_seconds: float) -> checks.Case:
        other = theirs or HostFacts()
        return checks.Case(
            source=own if departing else other,
            destination=other if departing else own,
            waited_seconds=waited_seconds,
            own=own,
            attests=bool(self.tcti),
        )


def open_surveyor(mode: Mode, state: Path, tcti: str = "", watch: Watch | None = None) -> HostSurveyor | None:
    """The surveyor of a process.

    Args:
        mode: `off` for none; `strict` lets warnings refuse, too.
        state: the folder where the relay keeps its state.
        tcti: of this host's TPM; empty for none.
        watch: counts.
    """
    if mode == "off":
        return None
    return HostSurveyor(Gatherer(state), strict=mode == "strict", tcti=tcti, watch=watch or Unwatched())

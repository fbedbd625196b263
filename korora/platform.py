"""This host's platform, as sessions see it: a TPM that attests, and a folder of what other hosts may be."""

import time
from pathlib import Path

import structlog

from crypto.attestation import evidence as messages
from crypto.attestation.binding import Binding
from crypto.attestation.evidence import Attester, NoAttester
from crypto.attestation.reference import Appraisal, Reference, appraise, load
from crypto.attestation.structures import Public, Selection
from crypto.errors import AttestationError, ReferenceInvalid
from korora.agents.vtpm.tcti import Tpm
from korora.clocks import Clocks
from korora.watched import Unwatched, Watch
from proxy.attestation import Demand, Proved
from proxy.control import Bank, Wanted

log = structlog.get_logger("korora.attestation")


class HostPlatform:
    """See ``proxy.attestation.Platform``.

    Args:
        attester: shows what this host is.
        references: the folder of what other hosts may be; None: nothing is demanded of them.
        watch: counts.
        state: the relay's state directory; None: what peers' TPMs say of their clocks is remembered here alone.
    """

    def __init__(
        self, attester: Attester, references: Path | None, watch: Watch | None = None, state: Path | None = None
    ) -> None:
        self._attester, self._references = attester, references
        self._watch = watch or Unwatched()
        self._clocks = Clocks(state)

    def demands(self, peer: str) -> Demand | None:
        """See ``Platform.demands``."""
        if self._references is None:
            return None
        reference = load(self._references, peer)
        # A selection has only banks that a message may name; mypy sees text.
        banks = tuple(Bank(bank, indices) for bank, indices in reference.selection.banks)  # type: ignore[arg-type]
        wanted = Wanted(banks, event_log=bool(reference.events), ima=reference.files is not None)
        return Demand(wanted, self._clocks.known(peer, _ak(reference)))

    def attest(self, binding: Binding, wanted: Wanted) -> bytes:
        """See ``Platform.attest``."""
        began = time.perf_counter()
        shown = self._attester.attest(
            binding.qualifying(),
            Selection.of({bank.bank: bank.pcrs for bank in wanted.banks}),
            event_log=wanted.event_log,
            ima=wanted.ima,
            hpke_public=binding.hpke_public,
        )
        self._watch.attested(time.perf_counter() - began)
        return messages.encode(shown)

    def appraise(self, peer: str, evidence: bytes, binding: Binding, demand: Demand) -> Proved:
        """See ``Platform.appraise``."""
        if self._references is None:
            return Proved()
        try:
            found = self._appraised(load(self._references, peer), evidence, binding, demand)
        except AttestationError as error:
            self._watch.appraised(error.reason)
            raise
        self._watch.appraised("proved")
        return Proved(found.proved, found.hpke_public)

    def _appraised(self, reference: Reference, evidence: bytes, binding: Binding, demand: Demand) -> Appraisal:
        found = appraise(messages.decode(evidence), expected=reference, binding=binding, earlier=demand.since)
        self._clocks.saw(reference.host, _ak(reference), found.quoted.clock)
        return found


def _ak(reference: Reference) -> str:
    """The name of its attestation key, in hexadecimal."""
    return Public.parse(reference.ak).name.hex()


def open_platform(
    tpm: str, references: Path | None, watch: Watch | None = None, state: Path | None = None
) -> HostPlatform:
    """The platform of a process.

    Args:
        tpm: TCTI of this host's TPM; empty for none.
        references: the folder of what other hosts may be; None: nothing is demanded of them.
        watch: counts.
        state: the relay's state directory.

    Raises:
        ReferenceInvalid: there is no such folder.
        TpmUnusable: the bindings to TPMs are not installed.
    """
    if references is not None and not references.is_dir():
        raise ReferenceInvalid(f"{references} is no folder of reference values", "make it by korora attest enrol")
    if references is None:
        log.warning("this host attests, and demands nothing of its peers: give --attestation for that")
    if not tpm:
        log.warning("this host has no TPM to attest by, and peers that demand it will refuse: give --tpm for that")
        return HostPlatform(NoAttester(), references, watch, state)
    attester = Tpm(tpm)
    attester.prepare()
    return HostPlatform(attester, references, watch, state)

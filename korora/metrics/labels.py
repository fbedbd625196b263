"""What the labels of metrics may say: all of it is listed here, and nothing else ever gets into one."""

from typing import Final, get_args

from chunking.regime import Regime
from crypto.receipts.statement import Stage
from proxy.authority import Point
from proxy.errors import OUTCOMES
from proxy.handover.record import UNREADABLE
from proxy.handover.record import Kind as Hypervisor
from proxy.handover.table import WRITTEN
from proxy.handover.table import State as Standing
from proxy.session import Role, State
from proxy.tally import PageCounts

ROLE: Final = ("role", tuple(role.value for role in Role))
STATES: Final = (*(state.value for state in State), "resuming")
DIED: Final = "died"  # with its worker: there is no report to say more
OUTCOME: Final = ("outcome", (*OUTCOMES.values(), "interrupted", DIED))
WORKER: Final = ("worker", ())
PAGE_KINDS: Final = tuple(PageCounts.__slots__)
REGIMES: Final = tuple(regime.name.lower() for regime in Regime)
HANDOVER_KINDS: Final = get_args(Hypervisor)
NO_KIND: Final = "none"  # of a session that nobody guards
HANDOVER_OUTCOMES: Final = ("done", "aborted", "unguarded")
HANDOVER_STATES: Final = (*(state.value for state in Standing if state in WRITTEN), UNREADABLE)
# What an arriving record can have wrong; the classes are in crypto/errors.py, the names in korora/metrics/observer.py.
REFUSALS: Final = (
    "replayed",
    "gap",
    "out_of_order",
    "forged",
    "malformed",
    "too_large",
    "after_final",
    "epoch",
    "control",
    "lane_reused",
    "key_exhausted",
    "other",
)
CAUSES: Final = ("record", "stream", "vtpm", "receipt", "protocol", "peer", "unknown")
REASONS: Final = (
    "tls",
    "group",
    "no_certificate",
    "untrusted",
    "expired",
    "revoked",
    "malformed",
    "name",
    "resume",
    "attestation",
    "attestation_missing",
    "attestation_malformed",
    "attestation_quote",
    "attestation_unknown",
    "attestation_changed",
    "policy",
    "protocol",
    "record",
    "receipt",
    "other",
)
POINTS: Final = tuple(point.value for point in Point)
STAGES: Final = tuple(stage.value for stage in Stage)
DISPUTES: Final = ("truncated", "forked", "malformed")

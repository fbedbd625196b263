"""Every metric, defined once: name, kind, labels, help, unit. docs/metrics.md has the same table; a test holds both.

No label holds a name that comes from outside (a peer, a VM, an address, a session): every label has the values that
korora/metrics/labels.py lists and no others, so that nobody who connects can make the number of series grow. Nothing in
here needs prometheus-client, so that a page or a test may look at it without.
"""

from typing import Final

from korora.metrics.family import NEVER_BEFORE_A_VALUE, Family, Kind, Merge, Side
from korora.metrics.labels import (
    CAUSES,
    DISPUTES,
    HANDOVER_KINDS,
    HANDOVER_OUTCOMES,
    HANDOVER_STATES,
    NO_KIND,
    OUTCOME,
    PAGE_KINDS,
    POINTS,
    REASONS,
    REFUSALS,
    REGIMES,
    ROLE,
    STAGES,
    STATES,
    WORKER,
)
from proxy.preflight import CHECKS, GRADES
from proxy.session import Role

# ---- sessions

SESSIONS: Final = Family(
    "korora_sessions", Kind.GAUGE, "Sessions that run now, by their state", (ROLE, ("state", STATES))
)
SESSIONS_STALLED: Final = Family(
    "korora_sessions_stalled",
    Kind.GAUGE,
    "Sessions with frames in flight of which none was acknowledged for 30 s",
    (ROLE,),
)
SESSIONS_BEGUN: Final = Family(
    "korora_sessions_begun_total", Kind.COUNTER, "Sessions that were accepted, here or by the peer", (ROLE,)
)
SESSIONS_ENDED: Final = Family(
    "korora_sessions_ended_total", Kind.COUNTER, "Sessions that have ended, by outcome", (ROLE, OUTCOME)
)
SESSION_SECONDS: Final = Family(
    "korora_session_seconds",
    Kind.HISTOGRAM,
    "How long the sessions took that have ended",
    (ROLE,),
    unit="seconds",
    buckets=(1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400),
)
HANDSHAKE_SECONDS: Final = Family(
    "korora_handshake_seconds",
    Kind.HISTOGRAM,
    "From the connection of the two relays until the session was accepted; counted when the session ends",
    (ROLE,),
    unit="seconds",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
LAST_BEGUN: Final = Family(
    "korora_session_last_begun_timestamp_seconds",
    Kind.GAUGE,
    "When a session last began, in seconds since 1970",
    (ROLE,),
    unit="seconds",
    merge=Merge.LAST,
    side=NEVER_BEFORE_A_VALUE,
)
LAST_ENDED: Final = Family(
    "korora_session_last_ended_timestamp_seconds",
    Kind.GAUGE,
    "When a session last ended with this outcome, in seconds since 1970",
    (ROLE, OUTCOME),
    unit="seconds",
    merge=Merge.LAST,
    side=NEVER_BEFORE_A_VALUE,
)
HANDOVERS: Final = Family(
    "korora_handovers_total",
    Kind.COUNTER,
    "Hand-overs that have ended, by how, in their session or by recovery; and sessions that nobody guarded",
    (ROLE, ("kind", (*HANDOVER_KINDS, NO_KIND)), ("outcome", HANDOVER_OUTCOMES)),
)
HANDOVERS_UNSETTLED: Final = Family(
    "korora_handovers_unsettled",
    Kind.GAUGE,
    "Hand-overs in this host's journal with something left to be done, by where they stand",
    (ROLE, ("state", HANDOVER_STATES)),
)
HANDOVER_SECONDS: Final = Family(
    "korora_handover_seconds",
    Kind.HISTOGRAM,
    "From when the source's hypervisor had given the machine up until the destination had said that it runs",
    (("role", (Role.SOURCE.value,)),),
    unit="seconds",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
CHANNELS: Final = Family("korora_channels_total", Kind.COUNTER, "Connections of hypervisors that were carried", (ROLE,))

# ---- policy and receipts

DECISIONS: Final = Family(
    "korora_decisions_total",
    Kind.COUNTER,
    "Answers to sessions that asked whether they may begin or go on, by where they stood",
    (ROLE, ("point", POINTS), ("answer", ("allowed", "refused"))),
)
APPROVALS_WAITING: Final = Family(
    "korora_approvals_waiting", Kind.GAUGE, "Sessions that wait for people to approve of them", (ROLE,)
)
RECEIPTS: Final = Family(
    "korora_receipts_total",
    Kind.COUNTER,
    "Receipts that were logged here, by what they are of and who has signed them",
    (ROLE, ("stage", STAGES), ("signed", ("both", "alone"))),
)
RECEIPTS_FAILED: Final = Family(
    "korora_receipts_failed_total", Kind.COUNTER, "Sessions that are over and whose outcome could not be logged here"
)
RECEIPTS_SPARED: Final = Family(
    "korora_receipts_spared_total",
    Kind.COUNTER,
    "Refused offers that left no receipt, because their peers had left enough within the hour",
)
LOG_DISPUTES: Final = Family(
    "korora_log_disputes_total",
    Kind.COUNTER,
    "Peers' logs of receipts that were not what they had been, by what was wrong",
    (("kind", DISPUTES),),
)

ATTESTATIONS: Final = Family(
    "korora_attestations_total",
    Kind.COUNTER,
    "Peers' platforms that were judged here, by what was found",
    (("result", ("proved", "missing", "malformed", "quote", "unknown", "changed", "other")),),
)
ATTESTATION_SECONDS: Final = Family(
    "korora_attestation_seconds",
    Kind.HISTOGRAM,
    "How long this host's TPM took to show its platform",
    (),
    unit="seconds",
    buckets=(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
PREFLIGHT_FINDINGS: Final = Family(
    "korora_preflight_findings_total",
    Kind.COUNTER,
    "Checks of two hosts before a session, by what was found",
    (("check", CHECKS), ("grade", GRADES)),
)
VTPMS: Final = Family(
    "korora_vtpms_total",
    Kind.COUNTER,
    "Virtual TPMs that were given or taken in a session, by how the hand-over stood when that ended",
    (ROLE, ("vtpm", ("moved", "stayed", "undecided"))),
)

# ---- throughput

STREAM_BYTES: Final = Family(
    "korora_stream_bytes_total",
    Kind.COUNTER,
    "Stream bytes taken from the local hypervisor (in) and written to it (out)",
    (ROLE, ("way", ("in", "out"))),
    unit="bytes",
)
WIRE_BYTES: Final = Family(
    "korora_wire_bytes_total",
    Kind.COUNTER,
    "Bytes between the relays, TLS and lanes together",
    (ROLE, ("way", ("sent", "received"))),
    unit="bytes",
)
FRAMES: Final = Family(
    "korora_frames_total",
    Kind.COUNTER,
    "Frames made here (sent) and checked here (received); those that went twice count once",
    (ROLE, ("way", ("sent", "received"))),
)
RECORDS: Final = Family(
    "korora_records_total", Kind.COUNTER, "Records sealed and opened", (ROLE, ("way", ("sent", "received")))
)
REKEYS: Final = Family("korora_rekeys_total", Kind.COUNTER, "Key epochs begun after a lane's first", (ROLE,))
LINK_RATE: Final = Family(
    "korora_link_bytes_per_second",
    Kind.GAUGE,
    "Stream bytes acknowledged a second, each session's best of late, summed",
    (ROLE,),
    unit="bytes_per_second",
)
LINK_DELAY: Final = Family(
    "korora_link_delay_seconds",
    Kind.GAUGE,
    "From a frame's departure to its acknowledgement, each session's least of late, the greatest of them",
    (ROLE,),
    unit="seconds",
    merge=Merge.MAX,
)
QUEUE_FRAMES: Final = Family("korora_queue_frames", Kind.GAUGE, "Frames that wait for their acknowledgement", (ROLE,))
QUEUE_BYTES: Final = Family("korora_queue_bytes", Kind.GAUGE, "Stream bytes in those frames", (ROLE,), unit="bytes")
WINDOW_BYTES: Final = Family(
    "korora_window_bytes", Kind.GAUGE, "Stream bytes that may be in flight now, all sessions", (ROLE,), unit="bytes"
)
LANES: Final = Family("korora_lanes", Kind.GAUGE, "Lanes that carry sessions now", (ROLE,))

# ---- pages; a source encodes them, a destination decodes them

PAGES: Final = Family(
    "korora_pages_total",
    Kind.COUNTER,
    "Guest pages in frames that were encoded by pages, by what they were; duplicates are hits of the page cache",
    (ROLE, ("kind", PAGE_KINDS)),
)
PAGED_BYTES: Final = Family(
    "korora_paged_bytes_total",
    Kind.COUNTER,
    "Bytes of frames that were encoded by pages: of the stream (plain), and what became of them (encoded)",
    (ROLE, ("form", ("plain", "encoded"))),
    unit="bytes",
)
DELTA_BYTES: Final = Family(
    "korora_delta_bytes_total",
    Kind.COUNTER,
    "What pages took that went as differences, before compression; known to sources only",
    (ROLE,),
    unit="bytes",
)
CODEC_SECONDS: Final = Family(
    "korora_codec_seconds_total",
    Kind.COUNTER,
    "Time spent encoding (source) and decoding (destination) frames, all threads together",
    (ROLE,),
    unit="seconds",
)
SESSIONS_BY_REGIME: Final = Family(
    "korora_sessions_by_regime",
    Kind.GAUGE,
    "Departing sessions that may encode by pages, by how much work a frame gets now",
    (("regime", REGIMES),),
)
ROUNDS: Final = Family(
    "korora_rounds_total",
    Kind.COUNTER,
    "Rounds of hypervisors over their guests' memory that began",
    (ROLE,),
)
GUEST_PAGES: Final = Family(
    "korora_guest_pages_total",
    Kind.COUNTER,
    "Pages that streams brought or spoke of, each time one was",
    (ROLE,),
)
DIRTY_PAGES: Final = Family(
    "korora_dirty_pages_total",
    Kind.COUNTER,
    "Of these, pages that came again because the guest had changed them",
    (ROLE,),
)
ROUND_PAGES: Final = Family(
    "korora_round_pages",
    Kind.GAUGE,
    "Pages so far in the rounds under way, all sessions",
    (ROLE,),
)
PAGES_MISSING: Final = Family(
    "korora_stored_pages_missing_total",
    Kind.COUNTER,
    "Stored pages that could not be read, and were asked for; at destinations only",
    (ROLE,),
)

# ---- the content store

STORE_PAGES: Final = Family(
    "korora_store_pages_total",
    Kind.COUNTER,
    "Pages of the content store: kept or dropped because the disk or the queue was full; looked for and found or not;"
    " read for frames or found unreadable",
    (("kind", ("stored", "dropped", "found", "not_found", "read", "unreadable")),),
)
STORE_WRITTEN: Final = Family(
    "korora_store_written_bytes_total",
    Kind.COUNTER,
    "Bytes that the content store wrote to the disk, seals and tables included",
    unit="bytes",
)
STORE_SEGMENTS: Final = Family(
    "korora_store_segments_total",
    Kind.COUNTER,
    "Segments of the content store: written whole, given up, found damaged, or removed to make room",
    (("kind", ("finished", "abandoned", "damaged", "evicted")),),
)

# ---- faults

LANES_LOST: Final = Family(
    "korora_lanes_lost_total", Kind.COUNTER, "Lanes that broke and were replaced or done without", (ROLE,)
)
RESUMES: Final = Family(
    "korora_resumes_total", Kind.COUNTER, "Times a session went on over a new control connection", (ROLE,)
)
FRAMES_RESENT: Final = Family("korora_frames_resent_total", Kind.COUNTER, "Frames sent once more after a loss", (ROLE,))
INTEGRITY_FAILURES: Final = Family(
    "korora_integrity_failures_total",
    Kind.COUNTER,
    "Sessions that ended because something was not what was sent, by what showed it",
    (ROLE, ("cause", CAUSES)),
)
RECORD_REFUSALS: Final = Family(
    "korora_record_refusals_total",
    Kind.COUNTER,
    "Records that were refused, by what was wrong with them",
    (("kind", REFUSALS),),
)
PEERS_REFUSED: Final = Family(
    "korora_peers_refused_total",
    Kind.COUNTER,
    "TLS peers that were not let in, by reason",
    (("reason", REASONS),),
)

# ---- the processes

BUILD_INFO: Final = Family(
    "korora_build_info",
    Kind.GAUGE,
    "Always 1; the labels say what runs",
    (("version", ()), ("python", ())),
    merge=Merge.MAX,
    side=NEVER_BEFORE_A_VALUE,
)
WORKERS: Final = Family("korora_workers", Kind.GAUGE, "Worker processes that live", side=Side.SUPERVISOR)
WORKER_RESTARTS: Final = Family(
    "korora_worker_restarts_total",
    Kind.COUNTER,
    "Worker processes that were started again after they ended unasked",
    side=Side.SUPERVISOR,
)
READY: Final = Family(
    "korora_ready", Kind.GAUGE, "1 while new sessions are taken, as /readyz says", side=Side.SUPERVISOR
)
DRAINING: Final = Family(
    "korora_draining",
    Kind.GAUGE,
    "1 while no new session is taken and those that run are seen to their end",
    side=Side.SUPERVISOR,
)
RELOADS: Final = Family(
    "korora_reloads_total",
    Kind.COUNTER,
    "Reloads of configuration and identity, by result",
    (("result", ("done", "failed")),),
    side=Side.SUPERVISOR,
)
LAST_RELOAD: Final = Family(
    "korora_last_reload_successful",
    Kind.GAUGE,
    "1 if the last reload was carried out, 0 if it was refused and the old configuration kept",
    merge=Merge.MAX,
    side=NEVER_BEFORE_A_VALUE,
)
CERTIFICATE_EXPIRY: Final = Family(
    "korora_certificate_expiry_timestamp_seconds",
    Kind.GAUGE,
    "When a certificate of this host's identity expires, in seconds since 1970",
    (("certificate", ("host", "signing", "ca")),),
    unit="seconds",
    merge=Merge.EARLIEST,
    side=NEVER_BEFORE_A_VALUE,
)
CRL_EXPIRY: Final = Family(
    "korora_crl_expiry_timestamp_seconds",
    Kind.GAUGE,
    "When the CRL expires, in seconds since 1970; every peer is refused from then on",
    unit="seconds",
    merge=Merge.EARLIEST,
    side=NEVER_BEFORE_A_VALUE,
)
LOOP_LAG: Final = Family(
    "korora_event_loop_lag_seconds",
    Kind.HISTOGRAM,
    "How late an event loop woke: the worst of each second, in each process",
    unit="seconds",
    side=Side.BOTH,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
WORKER_SAMPLED: Final = Family(
    "korora_worker_sampled_timestamp_seconds",
    Kind.GAUGE,
    "When a process last brought its values up to date, in seconds since 1970; one that hangs falls behind",
    (WORKER,),
    unit="seconds",
    merge=Merge.MAX,
    side=NEVER_BEFORE_A_VALUE,
)
WORKER_CPU: Final = Family(
    "korora_worker_cpu_seconds_total",
    Kind.COUNTER,
    "CPU time of a process, user and system",
    (WORKER,),
    unit="seconds",
    side=NEVER_BEFORE_A_VALUE,
)
WORKER_MEMORY: Final = Family(
    "korora_worker_resident_memory_bytes",
    Kind.GAUGE,
    "Memory of a process, as it stands in RAM",
    (WORKER,),
    unit="bytes",
    merge=Merge.MAX,
    side=NEVER_BEFORE_A_VALUE,
)
WORKER_FILES: Final = Family(
    "korora_worker_open_files",
    Kind.GAUGE,
    "File descriptors that a process has open",
    (WORKER,),
    merge=Merge.MAX,
    side=NEVER_BEFORE_A_VALUE,
)

FAMILIES: Final = (
    SESSIONS,
    SESSIONS_STALLED,
    SESSIONS_BEGUN,
    SESSIONS_ENDED,
    SESSION_SECONDS,
    HANDSHAKE_SECONDS,
    LAST_BEGUN,
    LAST_ENDED,
    HANDOVERS,
    HANDOVERS_UNSETTLED,
    HANDOVER_SECONDS,
    CHANNELS,
    DECISIONS,
    APPROVALS_WAITING,
    RECEIPTS,
    RECEIPTS_FAILED,
    RECEIPTS_SPARED,
    LOG_DISPUTES,
    ATTESTATIONS,
    ATTESTATION_SECONDS,
    PREFLIGHT_FINDINGS,
    VTPMS,
    STREAM_BYTES,
    WIRE_BYTES,
    FRAMES,
    RECORDS,
    REKEYS,
    LINK_RATE,
    LINK_DELAY,
    QUEUE_FRAMES,
    QUEUE_BYTES,
    WINDOW_BYTES,
    LANES,
    PAGES,
    PAGED_BYTES,
    DELTA_BYTES,
    CODEC_SECONDS,
    SESSIONS_BY_REGIME,
    ROUNDS,
    GUEST_PAGES,
    DIRTY_PAGES,
    ROUND_PAGES,
    PAGES_MISSING,
    STORE_PAGES,
    STORE_WRITTEN,
    STORE_SEGMENTS,
    LANES_LOST,
    RESUMES,
    FRAMES_RESENT,
    INTEGRITY_FAILURES,
    RECORD_REFUSALS,
    PEERS_REFUSED,
    BUILD_INFO,
    WORKERS,
    WORKER_RESTARTS,
    READY,
    DRAINING,
    RELOADS,
    LAST_RELOAD,
    CERTIFICATE_EXPIRY,
    CRL_EXPIRY,
    LOOP_LAG,
    WORKER_SAMPLED,
    WORKER_CPU,
    WORKER_MEMORY,
    WORKER_FILES,
)

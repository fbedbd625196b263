"""Limits that only make sense together."""

import re
from pathlib import Path

from crypto.records import EPOCH_BYTES_HARD, EPOCH_BYTES_SOFT, PAYLOAD_BYTES_MAX
from crypto.tls import PRE_AUTHENTICATION_BYTES_MAX
from proxy import limits
from proxy.limits import (
    ACK_EAGER_BYTES,
    ACK_ENTRIES_MAX,
    CHANNEL_OPEN_SECONDS_MAX,
    CHANNELS_MAX,
    CONNECT_SECONDS_MAX,
    CONTROL_MESSAGE_BYTES_MAX,
    CREDIT_BYTES_MAX,
    CREDIT_BYTES_MIN,
    CREDIT_BYTES_SESSION,
    FRAME_BYTES_MAX,
    FRAME_EAGER_BYTES,
    HALF_OPEN_MAX,
    HALF_OPEN_PER_ADDRESS_MAX,
    HEARTBEAT_SECONDS,
    HEARTBEATS_MISSED_MAX,
    IN_FLIGHT_BYTES_MAX,
    IN_FLIGHT_BYTES_MIN,
    KIB,
    LISTEN_BACKLOG,
    MIB,
    OPAQUE_FRAME_BYTES,
    SESSIONS_MAX,
)
from proxy.wire import ACK_ENTRY, FRAME_HEADER_BYTES

RELAY_BYTES_MAX = 256 * MIB  # what a relay with one session may need in all, by docs/performance.md


def test_an_opaque_frame_fits_one_record() -> None:
    assert OPAQUE_FRAME_BYTES + FRAME_HEADER_BYTES <= PAYLOAD_BYTES_MAX
    assert OPAQUE_FRAME_BYTES <= FRAME_BYTES_MAX
    assert ACK_ENTRIES_MAX * ACK_ENTRY.size <= PAYLOAD_BYTES_MAX
    assert ACK_ENTRIES_MAX >= CHANNELS_MAX


def test_windows_let_work_go_on() -> None:
    """A receiver that acknowledges in steps must never leave its sender with a full window and nothing to hear."""
    assert FRAME_EAGER_BYTES <= OPAQUE_FRAME_BYTES <= CREDIT_BYTES_MIN <= CREDIT_BYTES_MAX
    assert ACK_EAGER_BYTES <= IN_FLIGHT_BYTES_MIN // 2
    assert IN_FLIGHT_BYTES_MIN >= 2 * OPAQUE_FRAME_BYTES
    assert IN_FLIGHT_BYTES_MIN <= IN_FLIGHT_BYTES_MAX
    assert CREDIT_BYTES_SESSION >= CREDIT_BYTES_MAX


def test_a_session_fits_its_memory() -> None:
    """Both directions at once: what is received and not written, and the frames being made."""
    received = 2 * max(CREDIT_BYTES_SESSION, CHANNELS_MAX * CREDIT_BYTES_MIN)
    assert received <= RELAY_BYTES_MAX
    assert HALF_OPEN_MAX * 2 * PRE_AUTHENTICATION_BYTES_MAX <= RELAY_BYTES_MAX / 16


def test_the_unauthenticated_are_fewer_than_the_kernel_keeps() -> None:
    assert HALF_OPEN_PER_ADDRESS_MAX <= HALF_OPEN_MAX <= LISTEN_BACKLOG
    assert PRE_AUTHENTICATION_BYTES_MAX <= 16 * KIB < CONTROL_MESSAGE_BYTES_MAX
    assert SESSIONS_MAX < HALF_OPEN_MAX


def test_times_nest() -> None:
    assert CHANNEL_OPEN_SECONDS_MAX > CONNECT_SECONDS_MAX, "the destination's own answer comes before our time-out"
    assert HEARTBEAT_SECONDS * HEARTBEATS_MISSED_MAX <= 15
    assert EPOCH_BYTES_SOFT + 2 * FRAME_BYTES_MAX < EPOCH_BYTES_HARD


def test_every_limit_names_its_unit_and_gives_its_reason() -> None:
    source = Path(limits.__file__).read_text()
    lines = [line for line in source.splitlines() if ": Final" in line and not line.startswith(("KIB", "MIB"))]
    assert lines
    for line in lines:
        name = line.split(":")[0]
        assert re.search(r"BYTES|SECONDS|CHARACTERS|_MAX$|FRAMES|BACKLOG", name), name
    unexplained = [line for line in lines if "  # " not in line]
    assert [line.split(":")[0] for line in unexplained] in ([], ["CONTROL_MESSAGE_BYTES_MAX", "HEARTBEAT_SECONDS"])

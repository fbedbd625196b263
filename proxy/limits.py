"""Every limit and time-out of the relay, with its unit in its name and its reason beside it."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# ---- frames and windows
FRAME_BYTES_MAX: Final = 4 * MIB  # one Xen batch of 1024 pages: what a receiver must be able to hold
FRAME_BODY_SLACK_BYTES: Final = 64 * KIB  # encoded, what does not shrink grows by its columns' heads
FRAME_BODY_BYTES_MAX: Final = FRAME_BYTES_MAX + FRAME_BODY_SLACK_BYTES  # of any frame
OPAQUE_FRAME_BYTES: Final = MIB  # plaintext and ciphertext fit a 2 MiB L2 cache; smaller ones cost more Python a byte
FRAME_EAGER_BYTES: Final = 256 * KIB  # a frame this long goes out although earlier ones are still in flight
PAGED_FRAME_BYTES_MIN: Final = 16 * KIB  # less is sent as it is: the columns' heads would eat what they save
ACK_EAGER_BYTES: Final = 2 * MIB  # half the least window: acknowledged at once although more is arriving
SMALL_BODY_BYTES: Final = 768 * KIB  # a frame that waits with less is copied, so that its 1 MiB buffer is free
BUFFERS_EASY_MAX: Final = 32  # buffers of 1 MiB in use before a frame that fills less than most of one is copied
FRAMES_DECODED_AHEAD: Final = 2  # beyond one a chain: decompressed, a frame weighs several times what it did before
TURN_FRAMES: Final = 4  # frames a busy stream may move before the loop serves others: 4 MiB, about 2 ms
FRAMES_IN_FLIGHT_MAX: Final = 256  # per channel and direction; bounds what a peer can queue in tiny frames
IN_FLIGHT_BYTES_MIN: Final = 4 * MIB  # floor of the adaptive window, so that urgent pages never queue behind more
IN_FLIGHT_BYTES_MAX: Final = 64 * MIB  # ceiling of the adaptive window: what one session may hold unacknowledged
REORDER_BYTES_MAX: Final = 2 * IN_FLIGHT_BYTES_MAX  # frames ahead of a lost one; channels' shares may double the window
CREDIT_BYTES_SESSION: Final = 32 * MIB  # shared by the open channels of one direction
CREDIT_BYTES_MIN: Final = MIB  # one channel's share however many there are
CREDIT_BYTES_MAX: Final = 32 * MIB  # one channel's share however few there are

# ---- counts
CHANNELS_MAX: Final = 64  # per session: QEMU's multifd allows 255, nobody uses more than 16
LANES_MAX: Final = 16  # per session
ORDER_AHEAD_MAX: Final = CHANNELS_MAX * FRAMES_IN_FLIGHT_MAX  # how far a frame may be ahead in cache order
SESSIONS_MAX: Final = 16  # per process, at once
LANE_FRAMES_MAX: Final = 2  # frames handed to a lane's thread at once: one is sent while the next is made
LANE_ATTEMPTS_MAX: Final = 5  # a lane hello may be refused and made anew
ENDED_SESSIONS_MAX: Final = 256  # whose verdict is kept for a source that was away at the end
SEGMENTS_MAX: Final = 64  # stored segments that OFFER and ACCEPT name: beyond the newest ones few pages are found
PAGES_WANTED_MAX: Final = FRAME_BYTES_MAX // 4096  # stored pages that one frame can refer to
PAGES_GIVEN_MAX: Final = 15  # pages in one control message
PAGES_QUESTIONS_MAX: Final = 2  # being answered at once: one, and one whose last pages have only just left
ACK_ENTRIES_MAX: Final = CHANNELS_MAX  # per ACK record
HALF_OPEN_MAX: Final = 128  # connections that have not authenticated yet, in all: the oldest makes room
HALF_OPEN_PER_ADDRESS_MAX: Final = 64  # the same from one address
LISTEN_BACKLOG: Final = 512  # connections the kernel keeps while the loop is busy

# ---- what parsers of streams believe (beyond it the rest of a stream is carried as it is)
PARSER_STEPS_MAX: Final = 1 << 17  # structures in one piece of a stream: a parser spends about a microsecond on each
XL_CONFIG_BYTES_MAX: Final = 256 * KIB  # xl's JSON of one domain; real ones take a few KiB
XEN_RECORD_BYTES_MAX: Final = 128 * MIB  # body of one libxc record, by Xen's own REC_LENGTH_MAX
VM_NAME_CHARACTERS_MAX: Final = 255  # longer ones are no names
QEMU_BLOCKS_MAX: Final = 1024  # RAM blocks of one guest: real ones have about ten
QEMU_SECTIONS_MAX: Final = 0xFFFF  # numbers of a stream's sections: real ones stay below a thousand
QEMU_MACHINE_BYTES_MAX: Final = 256  # name of the machine type
QEMU_CAPABILITIES_MAX: Final = 64  # told in the configuration: QEMU knows about 25
QEMU_COMPRESSED_BYTES_MAX: Final = 8 * KIB  # one page under zlib is never longer than about 4120
QEMU_DEVICES_MAX: Final = 4096  # full sections that are compared with the description: real ones are below 300
QEMU_DESCRIPTION_BYTES_MAX: Final = 4 * MIB  # the JSON behind a stream's end, where it is read: some 100 KiB
QEMU_FOOTERS_TRIED_MAX: Final = 4096  # look-alikes of a section's footer in one stream: each costs a microsecond
MULTIFD_PAGES_MAX: Final = 12_800  # offsets in one packet: 128 in fact, and receivers before QEMU 9 take a hundredfold

# ---- control connection
CONTROL_MESSAGE_BYTES_MAX: Final = 64 * KIB
EVIDENCE_PART_BYTES_MAX: Final = 48 * KIB  # of a platform's evidence in one message
REASON_CHARACTERS_MAX: Final = 512  # a peer's words in our log
FACTS_TEXT_CHARACTERS_MAX: Final = 128  # a name or version in what a host says of itself; a processor's has 48
FEATURES_MAX: Final = 128  # of a processor; some 70 are told
FINDINGS_MAX: Final = 32  # of one survey; there are about a dozen checks

# ---- hand-over
JOURNAL_BYTES_MAX: Final = 256 * KIB  # one hand-over's file: a few lines of some 200 bytes, and a line an attempt
JOURNAL_FILES_MAX: Final = 4096  # hand-overs kept; settled ones go, the oldest first
HYPERVISOR_ATTEMPTS_MAX: Final = 5  # to start, destroy, revive or remove a copy before it is left to recovery
HYPERVISOR_PAUSE_SECONDS: Final = 0.5  # after the first attempt; as much longer after each further one
APPROVAL_SECONDS_MAX: Final = 60.0  # everybody who has a say: the machine is paused meanwhile
RESUMED_SECONDS_MAX: Final = 15.0  # a hypervisor that was told to resume or to remove its copy usually takes below one
RESTART_SECONDS_MAX: Final = 10.0  # xl makes a domain whose guest reboots anew after 2 s, and takes some to do it
VISIT_SECONDS_MAX: Final = 120.0  # one answer about a hand-over: a destination may destroy or start a copy meanwhile
ERRAND_PAUSE_SECONDS_MIN: Final = 0.2  # before the second visit to a destination; doubled for each further one
ERRAND_PAUSE_SECONDS_MAX: Final = 15.0  # somebody waits for the machine
ERRAND_SECONDS_MAX: Final = 10.0  # of a session that is decided: xl's command waits; recovery goes on afterwards
RECOVERY_SECONDS_MIN: Final = 1.0  # before the second look at what the journal has unsettled; doubled for each further
RECOVERY_SECONDS: Final = 15.0  # between two such looks, in the long run
RECOVERIES_MAX: Final = 16  # hand-overs taken up at once: each waits for xl or for its peer, and needs little itself
VISITS_MAX: Final = 32  # of one peer at once, in one process: it makes one for each of its sessions, and one more
SURVEY_SECONDS_MAX: Final = 10.0  # an answer to a survey: with Xen a command is run for it, which takes some 20 ms
WORDS_MAX: Final = 16  # in one visit: four are the most that a hand-over needs
ORDER_BYTES_MAX: Final = 4 * KIB  # an operator's word and the answer to it: some 30 bytes, and a reason
ORDER_POLL_SECONDS: Final = 0.5  # between two looks for one, of whoever has a hand-over that an operator may decide
ORDER_SECONDS_MAX: Final = 15.0  # until it is taken: a relay that is alive looks several times
ORDER_DONE_SECONDS_MAX: Final = 120.0  # until it is done: to revive a copy takes xl a quarter of a minute, or a minute
STOPPED_SECONDS_MAX: Final = 10.0  # a relay that is to end lets a last handshake finish: it usually takes below one
JOURNAL_SECONDS: Final = 30 * 86_400.0  # a settled hand-over is kept so long, to answer a peer that asks late

# ---- vTPM
VTPM_BYTES_MAX: Final = 1088 * KIB  # one, wrapped: two blobs of 512 KiB are the most that swtpm takes
VTPM_STATE_BYTES_MAX: Final = 512 * KIB  # one part of a vTPM in QEMU's stream: the most that swtpm takes back
VTPM_PART_BYTES: Final = 48 * KIB  # of it in one control message
VTPM_PROOF_BYTES_MAX: Final = 16 * KIB  # two quotes and 24 digests have about 1.4 KiB

# ---- times
CONNECT_SECONDS_MAX: Final = 10.0  # TCP connect, to the peer or to a local hypervisor
FIRST_BYTE_SECONDS_MAX: Final = 5.0  # a connection that says nothing is dropped
HANDSHAKE_SECONDS_MAX: Final = 10.0  # TLS, offer and answer
LANE_HELLO_SECONDS_MAX: Final = 5.0  # lane hello to LANE_OK
FIRST_LANE_SECONDS_MAX: Final = 30.0  # from ACCEPT to a session's first lane: every attempt at one may take its time
CONTROL_SECONDS_MAX: Final = 10.0  # one control message, from its first byte to its last, and one answer
RESUME_ATTEMPT_SECONDS_MAX: Final = 15.0  # connect, TLS, RESUME and its answer
RESUME_PAUSE_SECONDS_MIN: Final = 0.05  # before the second attempt; doubled for each further one
RESUME_PAUSE_SECONDS_MAX: Final = 1.0  # an operator waits for the network, not for us
LANE_PAUSE_SECONDS_MAX: Final = 10.0  # between attempts to open one more lane while others carry the session
PAGES_GIVEN_SECONDS_MAX: Final = 60.0  # from a question for stored pages to the next part of its answer, behind bulk
HEARTBEAT_SECONDS: Final = 5.0
HEARTBEATS_MISSED_MAX: Final = 3  # then the peer is lost
CHANNEL_OPEN_SECONDS_MAX: Final = CONNECT_SECONDS_MAX + 5.0  # the destination's connect and its answer
HANDOVER_SECONDS_MAX: Final = 300.0  # a destination's hypervisor or command may take this long to end after the stream
WIND_DOWN_SECONDS_MAX: Final = 60.0  # xl migrate-receive destroying its copy
EXEC_EXIT_SECONDS_MAX: Final = 1.0  # a command that closed its output usually ends: its status is wanted before END
ABORT_SECONDS_MAX: Final = 2.0  # telling the peer why
DRAIN_SECONDS_MAX: Final = 5.0  # FINAL records and close_notify

# ---- xl as the local toolstack
XL_SECONDS_MAX: Final = 30.0  # xl list, rename, unpause: below 0.1 s, unless another xl holds libxl's lock
XL_DESTROY_SECONDS_MAX: Final = 60.0  # libxl waits for device backends and hotplug scripts, 10 s and more each
XL_REVIVE_SECONDS_MAX: Final = 60.0  # a pretended migration: about a second
XL_OUTPUT_BYTES_MAX: Final = MIB  # what one command may say; a line of xl list has about 150 bytes
XL_DOMAINS_MAX: Final = 4096  # in one list
XL_MONITOR_SECONDS: Final = 0.5  # a monitor that has seen its domain suspended has ended by then
XL_GONE_POLL_SECONDS: Final = 0.2  # between looks at a domain that is being destroyed
# ---- a QEMU's monitor
QMP_LINE_BYTES_MAX: Final = MIB  # one answer; the longest in use here is a few KiB
QMP_EVENTS_MAX: Final = 10_000  # kept of one connection; a migration sends one a pass
QMP_CONNECTS_MAX: Final = 20  # one after the other: a QEMU that ends breaks what waits at its socket, then refuses
QMP_ANSWER_SECONDS_MAX: Final = 15.0  # QEMU answers at once unless its main loop is stuck
QMP_KEEP_SECONDS: Final = 5.0  # between two looks at the QEMU that may migrate next: it may be another by now
QMP_POLL_SECONDS: Final = 1.0  # asked again without an event: its capability may have been turned off
QMP_STUCK_SECONDS: Final = 2.0  # cancelling takes milliseconds; then what QEMU 7.2 may be stuck in is undone
QMP_REVIVE_SECONDS_MAX: Final = 60.0  # to cancel and to run; the destination's QEMU may hold the disks' locks meanwhile
QMP_QUIT_SECONDS_MAX: Final = 30.0  # QEMU flushes its disks first
QMP_RETRY_SECONDS: Final = 0.05  # from a step of QEMU's to the state that follows from it, of which no event tells
QMP_TAKE_SECONDS_MAX: Final = 60.0  # the source's has given all, the rest of it is in the relays or being loaded

# ---- local transport
PIPE_BYTES: Final = MIB  # F_SETPIPE_SZ: fewer wake-ups than the default 64 KiB

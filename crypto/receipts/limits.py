"""Limits of receipts and their logs. All numbers with a unit, and why they are so."""

from typing import Final

KIB: Final = 1024

STATEMENT_BYTES_MAX: Final = 32 * KIB  # 64 channels' digests take 16 KiB, and the rest of a statement takes 4
RECEIPT_BYTES_MAX: Final = 48 * KIB  # a statement in base64 with its signatures; with a proof it fits a control message
SIGNATURES_MAX: Final = 4  # of one envelope: both hosts', and as many more
TEXT_CHARACTERS_MAX: Final = 512  # a reason, a name of a rule; as of a peer's words in the log
DECISIONS_MAX: Final = 16  # two sides asked at three points, and a few times when the session was resumed
PROCEDURES_MAX: Final = 64  # two sides perform eleven each, a few of them repeatedly
ITEMS_MAX: Final = 8  # of one procedure: there are six
APPROVERS_MAX: Final = 16  # of one decision: two are usual
ATTESTATIONS_MAX: Final = 8
SUBJECTS_MAX: Final = 160  # 64 channels, two directions, and some 30 items beside them
DIGESTS_MAX: Final = 4  # of one subject
PAGE_KINDS_MAX: Final = 16  # ways to send a page: there are eight
FLAGS_MAX: Final = 64

CHECKPOINT_BYTES_MAX: Final = KIB  # a head takes about 200 bytes
CHECKPOINT_LINES_MAX: Final = 16  # signature lines: the host's own, and witnesses' that are not read
TREE_SIZE_MAX: Final = 1 << 40  # entries of a log: a million a second would take twelve days
PROOF_HASHES_MAX: Final = 128  # twice the depth of the largest tree, and more than either proof ever takes

HEADS_KNOWN_MAX: Final = 64  # of one peer, not yet proven to be of one log: sessions that began at one moment
HEADS_ASKED_MAX: Final = 4  # of them, that one exchange has to prove a head against
EVIDENCE_FILES_MAX: Final = 16  # of one peer: who forks his log in every session shall not fill our disk
CERTIFICATE_BYTES_MAX: Final = 4 * KIB  # of a signing certificate in DER: ours take 500 bytes
SIGNERS_MAX: Final = 4096  # signing certificates kept: hosts met, times how often they were issued an identity

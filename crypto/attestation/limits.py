"""Limits of attestation. All numbers with a unit, and why they are so."""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

NONCE_BYTES: Final = 32  # a verifier's; as long as the digest that it goes into
PCR_COUNT: Final = 24  # of a bank, on a PC (PC Client Platform TPM Profile §4.6)
PCR_BANKS_MAX: Final = 4  # sha1, sha256, sha384, sha512: all that a quote may be asked of
DIGEST_BYTES_MAX: Final = 64  # SHA-512
STRUCTURE_BYTES_MAX: Final = KIB  # a key, a quote or a signature of RSA 4096: below 700
CREDENTIAL_BYTES: Final = 32  # the secret of a challenge at enrolment

EVENT_LOG_BYTES_MAX: Final = MIB  # firmware's logs take 20 to 150 KiB
EVENTS_MAX: Final = 8192  # of a firmware's log: some hundreds
EVENT_BYTES_MAX: Final = 256 * KIB  # of one event: a list of revoked boot loaders takes 30 KiB
IMA_BYTES_MAX: Final = 4 * MIB  # the kernel's list: about 150 bytes a file that was run since boot
IMA_ENTRIES_MAX: Final = 65_536  # of that list
IMA_FIELD_BYTES_MAX: Final = 8 * KIB  # of one entry: a path has 4096 at most
EVIDENCE_BYTES_MAX: Final = EVENT_LOG_BYTES_MAX + IMA_BYTES_MAX + 64 * KIB  # of one host, both logs with it

REFERENCE_BYTES_MAX: Final = 4 * MIB  # a file of reference values: 70 bytes a measured file
REFERENCE_DIGESTS_MAX: Final = 65_536  # allowed by one reference, of one kind
VALUES_MAX: Final = 64  # that one PCR may have: a fleet's kernels, old and new
CHAIN_MAX: Final = 8  # certificates from an endorsement key up to its manufacturer's root: three or four
CERTIFICATE_BYTES_MAX: Final = 8 * KIB  # one of them, in DER

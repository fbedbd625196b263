"""Everything that can go wrong in crypto/, as one tree.

    CryptoError
    ├── AuthenticationError            the peer is not who it must be, or cannot show it            exit code 4
    │   ├── TlsFailure                 the handshake or the control connection failed in TLS itself
    │   ├── GroupRefused               the key exchange was not in the allowed groups
    │   ├── PeerCertificateMissing     the peer sent no certificate
    │   ├── CertificateUntrusted       no path to our CA, or the certificate is not fit for this use
    │   ├── CertificateExpired         outside notBefore..notAfter
    │   ├── CertificateRevoked         its serial stands in the CRL
    │   ├── CertificateMalformed       not a certificate, or its korora://host/NAME is absent or not exactly one
    │   ├── PeerNameMismatch           a good certificate of a host that was not asked for
    │   ├── ResumeForged               a session is to be resumed by somebody who did not have it
    │   └── AttestationError           the peer's platform has not shown its state, or it is not the one wanted
    │       ├── AttestationMissing     nothing is shown, where it is required
    │       ├── EvidenceMalformed      what is shown is not what a TPM or a firmware writes
    │       ├── QuoteInvalid           it was not signed by that key, for this session, or over those values
    │       ├── PlatformUnknown        that key was not enrolled for this peer
    │       └── PlatformChanged        a PCR or a measured event is not what the reference allows
    ├── IntegrityError                 what arrived is not what was sent                            exit code 5
    │   ├── RecordMalformed            the header cannot be right
    │   ├── RecordTooLarge             longer than the limit
    │   ├── RecordForged               the AEAD does not open
    │   ├── RecordOutOfOrder           not the next number
    │   │   ├── RecordReplayed         a number already seen
    │   │   └── RecordGap              a number was left out
    │   ├── RecordAfterFinal           a record after the lane's FINAL
    │   ├── EpochInvalid               not this epoch and not the next one
    │   ├── ControlForged              the control connection's TLS failed after ACCEPT
    │   ├── LaneReused                 a lane id that was already given out
    │   ├── KeyExhausted               the hard limit of a key is reached
    │   ├── SealBroken                 something sealed at rest does not open: altered, cut short, or another host's
    │   └── WrapBroken                 something wrapped to one session's key does not open, or there is no such key
    ├── IdentityError                  our own files are not in order; `remedy` says what to do     exit code 2
    │   ├── IdentityMissing            a directory or file is absent or unreadable
    │   ├── IdentityPermissions        a key can be read by group or others
    │   ├── IdentityMalformed          a file does not hold what its name says
    │   ├── IdentityMismatch           key and certificate, or host and signing certificate, do not belong together
    │   ├── IdentityUntrusted          a certificate was not issued by the CA beside it, or not for this use
    │   ├── IdentityExpired            a certificate is not yet or no longer valid
    │   ├── IdentityRevoked            a certificate of our own stands in the CRL
    │   └── CrlError                   the CRL beside the identity cannot be used
    │       ├── CrlMissing
    │       ├── CrlMalformed           not a CRL, or not signed by the CA
    │       └── CrlExpired             not yet or no longer valid
    ├── PkiError                       the CA directory refuses; `remedy` says what to do           exit code 2
    │   ├── PkiMissing                 no CA in that directory
    │   ├── PkiExists                  something is there that would be overwritten
    │   ├── PkiCorrupt                 the CA's files do not agree or cannot be parsed
    │   ├── PkiExpired                 the CA's own certificate is no longer valid
    │   └── PkiNameInvalid             a host name the CA does not issue, or does not know
    ├── TpmError                       our own TPM, or what is kept of others', is not in order     exit code 2
    │   ├── TpmUnusable                no TPM answers there, or it refuses
    │   ├── ReferenceInvalid           a file of reference values, or the folder of them, is not what it must be
    │   └── EnrolmentFailed            a challenge at enrolment is not answered, or its key not certified
    └── ReceiptError                   a receipt, or a log of receipts, is not in order             exit code 5
        ├── ReceiptMalformed           not an envelope, or not a statement, as this program writes them
        ├── SignatureInvalid           a signature does not verify under the key that it names
        ├── SignatureMissing           somebody who must have signed has not
        ├── SignerUntrusted            a signing certificate is not good, or its host has no part in what it signed
        ├── ProofInvalid               an inclusion or consistency proof does not lead to the head
        ├── HeadMalformed              a log's head cannot be parsed, or its host has not signed it
        ├── LogTruncated               a log is shorter than a head of it that was seen
        ├── LogForked                  a log does not continue a head of it that was seen
        ├── LogDamaged                 a log on the disk is not what was written to it; the entry is named
        └── LogUnusable                the disk or its permissions refuse; nothing was logged       exit code 2

The exit codes are the class's, never the text's: korora/ maps a class to a code and prints `str(error)`. No message
holds key material. To the peer all authentication failures look alike (one alert); the class is for our own log only.
"""

from __future__ import annotations

from typing import ClassVar


class CryptoError(Exception):
    """Base of everything raised on purpose in crypto/."""


class AuthenticationError(CryptoError):
    """The peer could not be authenticated."""


class TlsFailure(AuthenticationError):
    """TLS itself failed: an alert, a protocol error, a version we do not speak, an end before the handshake's."""


class GroupRefused(AuthenticationError):
    """The negotiated key exchange group is not one of those allowed."""


class PeerCertificateMissing(AuthenticationError):
    """The peer sent no certificate."""


class CertificateUntrusted(AuthenticationError):
    """The peer's certificate has no path to our CA, or is not fit for this use (RFC 5280 §6, §4.2.1.12)."""


class CertificateExpired(AuthenticationError):
    """The peer's certificate is not yet or no longer valid (RFC 5280 §4.1.2.5)."""


class CertificateRevoked(AuthenticationError):
    """The peer's certificate stands in the CRL (RFC 5280 §5)."""


class CertificateMalformed(AuthenticationError):
    """Not a certificate, or without exactly one well-formed `korora://host/NAME` (RFC 5280 §4.2.1.6)."""


class PeerNameMismatch(AuthenticationError):
    """The certificate is good, and of a host that was not asked for."""


class ResumeForged(AuthenticationError):
    """The proof that a session was the peer's own does not verify."""


class AttestationError(AuthenticationError):
    """The peer's platform has not shown its state, or it is not the one wanted.

    ``str()`` is all that a peer may learn: which value was expected would tell an attacker what to forge. The operator
    on this side reads ``told``.

    Args:
        told: what was found, with the PCR, the value expected and the value seen.
    """

    reason: ClassVar[str] = "other"
    """For a metric's label."""

    def __init__(self, told: str) -> None:
        super().__init__("attestation failed")
        self.told = told


class AttestationMissing(AttestationError):
    """Nothing was shown, where it is required."""

    reason = "missing"


class EvidenceMalformed(AttestationError):
    """A structure is not what a TPM or a firmware writes."""

    reason = "malformed"


class QuoteInvalid(AttestationError):
    """The quote was not signed by that key, is of another session, or is not over the values that are told."""

    reason = "quote"


class PlatformUnknown(AttestationError):
    """The key that signed was not enrolled for this peer."""

    reason = "unknown"


class PlatformChanged(AttestationError):
    """A PCR, an event of the firmware's log or a measured file is not what the reference allows."""

    reason = "changed"


class IntegrityError(CryptoError):
    """What arrived is not what was sent; the session ends."""


class RecordMalformed(IntegrityError):
    """A record's header or layout cannot be right."""


class RecordTooLarge(IntegrityError):
    """A record says it is longer than the limit."""


class RecordForged(IntegrityError):
    """The AEAD did not open."""


class RecordOutOfOrder(IntegrityError):
    """A record does not carry exactly the next number."""


class RecordReplayed(RecordOutOfOrder):
    """A record carries a number that was already seen."""


class RecordGap(RecordOutOfOrder):
    """A record carries a number beyond the next one."""


class RecordAfterFinal(IntegrityError):
    """A record follows FINAL on its lane and direction."""


class EpochInvalid(IntegrityError):
    """A record's epoch is neither the present one nor the one that follows."""


class ControlForged(IntegrityError):
    """The control connection's TLS failed after ACCEPT: a forged record, or an alert that says so."""


class LaneReused(IntegrityError):
    """A lane id was given out before in this session."""


class KeyExhausted(IntegrityError):
    """A key has reached its hard limit."""


class SealBroken(IntegrityError, ValueError):
    """Something sealed at rest does not open: altered, cut short, moved, or sealed under another host's key."""


class _WithRemedy(CryptoError):
    """An error of our own configuration: what is wrong, and what a person does about it.

    `remedy` is a sentence without its full stop; `str()` leaves it out, so that a program can show it apart.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


class WrapBroken(IntegrityError):
    """What was wrapped for one recipient does not open with its key, or that key is none (RFC 9180 §5)."""


class IdentityError(_WithRemedy):
    """The identity of this host is not in order."""


class IdentityMissing(IdentityError):
    """A directory or a file of the identity is absent or cannot be read."""


class IdentityPermissions(IdentityError):
    """A private key can be read by others than its owner."""


class IdentityMalformed(IdentityError):
    """A file of the identity does not hold what its name says."""


class IdentityMismatch(IdentityError):
    """Files of the identity do not belong together."""


class IdentityUntrusted(IdentityError):
    """A certificate of the identity was not issued by the CA beside it, or not for this use."""


class IdentityExpired(IdentityError):
    """A certificate of the identity is not yet or no longer valid."""


class IdentityRevoked(IdentityError):
    """A certificate of the identity stands in the CRL."""


class CrlError(IdentityError):
    """The CRL beside the identity cannot be used. A host without a good CRL does not start."""


class CrlMissing(CrlError):
    """There is no CRL beside the identity."""


class CrlMalformed(CrlError):
    """The file is no CRL, or the CA beside it did not sign it."""


class CrlExpired(CrlError):
    """The CRL is not yet or no longer valid (RFC 5280 §5.1.2.5)."""


class PkiError(_WithRemedy):
    """The CA directory refuses a request."""


class PkiMissing(PkiError):
    """There is no CA in that directory."""


class PkiExists(PkiError):
    """Something stands where the request would write."""


class PkiCorrupt(PkiError):
    """The CA's files cannot be parsed or do not agree."""


class PkiExpired(PkiError):
    """The CA's own certificate is no longer valid."""


class PkiNameInvalid(PkiError):
    """A name that no host can have, or that this CA does not know."""


class TpmError(_WithRemedy):
    """Our own TPM, or what is kept of other hosts', is not in order."""


class TpmUnusable(TpmError):
    """No TPM answers there, or it refuses."""


class ReferenceInvalid(TpmError):
    """A file of reference values, or the folder of them, is absent or is not what it must be."""


class EnrolmentFailed(TpmError):
    """A challenge at enrolment was not answered as only the right TPM can, or its key is not certified."""


class ReceiptError(CryptoError):
    """A receipt, or a log of receipts, is not in order; `remedy` may be empty."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class ReceiptMalformed(ReceiptError):
    """Not an envelope, or not a statement, as this program writes them; or too large."""


class SignatureInvalid(ReceiptError):
    """A signature does not verify under the key that it names."""


class SignatureMissing(ReceiptError):
    """Somebody who must have signed has not."""


class SignerUntrusted(ReceiptError):
    """A signing certificate is not good at that time, or its host has no part in what it signed."""


class ProofInvalid(ReceiptError):
    """A proof of inclusion or of consistency does not lead to the head (RFC 9162 §2.1.3.2, §2.1.4.2)."""


class HeadMalformed(ReceiptError):
    """A head of a log cannot be parsed, is another host's, or was not signed by its own."""


class LogTruncated(ReceiptError):
    """A log is shorter than a head of it that was seen before."""


class LogForked(ReceiptError):
    """A log does not continue a head of it that was seen before."""


class LogDamaged(ReceiptError):
    """A log on the disk is not what was written to it."""


class LogUnusable(ReceiptError):
    """The disk or its permissions refuse; nothing was logged."""

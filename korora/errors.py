"""One clear line for whatever goes wrong, with what to do about it, and its exit code."""

import sys
from types import MappingProxyType
from typing import Final

from crypto import errors as crypto
from proxy import errors as proxy
from proxy.errors import EXIT_BUG, exit_code_of

PREFIX: Final = "korora: error: "

# For errors that bring no remedy of their own; the closest base class counts.
REMEDIES: Final = MappingProxyType(
    {
        crypto.AuthenticationError: "the other relay's log says why",
        crypto.GroupRefused: "update the peer, or let both sides --allow-classical",
        crypto.PeerCertificateMissing: "give the peer an identity: korora pki issue",
        crypto.CertificateUntrusted: "issue both identities from one CA",
        crypto.CertificateExpired: "issue the peer's identity again, and check both clocks",
        crypto.CertificateRevoked: "issue it a new identity if it is to be trusted again; keep the CRLs current",
        crypto.CertificateMalformed: "issue the peer's identity by korora pki issue",
        crypto.PeerNameMismatch: "connect to the right host, or name this one by --name or --pin",
        crypto.AttestationError: "find out what has changed at that host; if that is meant: korora attest golden",
        crypto.AttestationMissing: "let the other relay attest (--tpm), or do not require it here",
        crypto.PlatformUnknown: "enrol that host: korora attest enrol",
        crypto.IntegrityError: "no wrong byte was handed on; find what alters traffic between the relays, then retry",
        crypto.SealBroken: "what this host keeps was altered, or its key is another one; see korora store status",
        crypto.ReceiptError: "keep what was found as evidence, and find out at its host who changed it",
        proxy.PolicyRefused: "try again when the destination can take it, or change what it allows",
        proxy.SessionCancelled: "ask who cancelled it before you migrate again",
        proxy.PeerRefused: "the other relay's log says why",
        proxy.StreamCorrupt: "no wrong byte was handed on; see that both relays have one version, then retry",
        proxy.PeerUnreachable: "see that korora receive runs there, and check address and firewall",
        proxy.PeerLost: "check the network and the other relay's log, then migrate again",
        proxy.DaemonLost: "its log says why; look at xl list on both hosts, then migrate again",
        proxy.HypervisorFailed: "see that the hypervisor runs; its own log says why",
        proxy.PeerAborted: "the other relay's log says more",
    }
)


def line_of(error: BaseException) -> str:
    """What went wrong and what to do about it, on one line."""
    # What an attestation found is for this side's operator; str() is what a peer may learn.
    found = str(getattr(error, "told", "")) or str(error)
    words = "".join(one if one.isprintable() else "?" for one in " ".join(found.split()))  # a file's, or a peer's
    message = words or type(error).__name__
    if exit_code_of(error) == EXIT_BUG:
        return f"{PREFIX}{type(error).__name__}: {message}; this is a bug of Kororā: --log-level debug shows where"
    remedy = remedy_of(error)
    return f"{PREFIX}{message}; {remedy}" if remedy else f"{PREFIX}{message}"


def remedy_of(error: BaseException) -> str:
    """What to do about it, without a full stop; empty where nothing is to be done, as after a signal."""
    own = str(getattr(error, "remedy", "")).rstrip(".")
    return own or next((REMEDIES[kind] for kind in type(error).__mro__ if kind in REMEDIES), "")


def complain(error: BaseException) -> int:
    """Print that line to standard error and return the exit code."""
    sys.stderr.write(f"{line_of(error)}\n")  # in one piece: several processes may share the stream
    sys.stderr.flush()
    return exit_code_of(error)

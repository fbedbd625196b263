"""A quote's verification (TPM 2.0 Library, Part 1 §31, Part 3 §18.4), in Python and `cryptography` alone."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from crypto.attestation.structures import Alg, Attributes, Clock, Public, Quote, Selection, Signature, hash_of
from crypto.errors import EvidenceMalformed, QuoteInvalid

ATTESTATION_KEY: Final = (
    Attributes.FIXED_TPM
    | Attributes.FIXED_PARENT
    | Attributes.SENSITIVE_DATA_ORIGIN
    | Attributes.RESTRICTED
    | Attributes.SIGN
)
"""What an attestation key has to be: made in one TPM, never to leave it, and signing only what that TPM has made."""


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a verified quote says.

    Attributes:
        name: of the key that signed (TPM2B_NAME without its length).
        pcrs: values by bank and index.
        clock: the TPM's.
        firmware: its version.
    """

    name: bytes
    pcrs: Mapping[str, Mapping[int, bytes]]
    clock: Clock
    firmware: int


def check_attestation_key(public: Public) -> None:
    """Such a key signs nothing but what its TPM has made.

    Raises:
        QuoteInvalid: it is not one.
    """
    if public.attributes & ATTESTATION_KEY != ATTESTATION_KEY or public.attributes & Attributes.DECRYPT:
        raise QuoteInvalid(f"the key {public.name.hex()} is no attestation key: {public.attributes!r}")
    if public.scheme is Alg.NULL:
        raise QuoteInvalid(f"the key {public.name.hex()} signs by whatever scheme is asked for")


def verify_quote(
    quote: bytes,
    signature: bytes,
    public: bytes,
    *,
    qualifying: bytes,
    selection: Selection,
    pcrs: Mapping[str, Mapping[int, bytes]],
) -> Quoted:
    """Check a quote.

    Args:
        quote: TPMS_ATTEST.
        signature: TPMT_SIGNATURE over it.
        public: TPMT_PUBLIC of the attestation key; whether it is the right one is the caller's to ask.
        qualifying: what the verifier had said; 32 bytes.
        selection: which PCRs the verifier had asked for.
        pcrs: their values, as told beside the quote.

    Raises:
        EvidenceMalformed: a structure is none.
        QuoteInvalid: the signature, what it is over, or the key.
    """
    key = Public.parse(public)
    check_attestation_key(key)
    sealed = Signature.parse(signature)
    if (sealed.scheme, sealed.hash) != (key.scheme, key.hash):
        raise QuoteInvalid(f"signed by {sealed.scheme.name} with {sealed.hash}, which its key does not do")
    _verify(key, sealed, quote)
    said = Quote.parse(quote)
    if not hmac.compare_digest(said.qualifying, qualifying):
        raise QuoteInvalid("the quote was made for another session, side, challenge or key")
    if said.selection != selection:
        raise QuoteInvalid("the quote is over other PCRs than were asked for")
    if not hmac.compare_digest(said.digest, selection.digest(pcrs, key.hash)):
        raise QuoteInvalid("the quote is over other values than are told beside it")
    if not said.clock.milliseconds:
        raise QuoteInvalid("the TPM's clock stands at zero")
    return Quoted(key.name, pcrs, said.clock, said.firmware)


def _verify(public: Public, signature: Signature, quote: bytes) -> None:
    algorithm = hash_of(public.hash)
    try:
        match public.key:
            case ec.EllipticCurvePublicKey() as key:
                r, s = (int.from_bytes(part, "big") for part in signature.parts)
                key.verify(utils.encode_dss_signature(r, s), quote, ec.ECDSA(algorithm))
            case rsa.RSAPublicKey() as key:
                how: padding.AsymmetricPadding = padding.PKCS1v15()
                if signature.scheme is Alg.RSAPSS:  # the salt's length is the TPM's to choose (Part 1 B.7)
                    how = padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
                key.verify(signature.parts[0], quote, how, algorithm)
    except InvalidSignature:
        raise QuoteInvalid(f"the quote's signature is not by the key {public.name.hex()}") from None
    except ValueError as error:
        raise EvidenceMalformed(f"a signature that cannot be one: {error}") from None


def check_clock(earlier: Clock, later: Clock) -> None:
    """A TPM's counts only grow: less than was seen before is an older state of it, or another TPM with its key.

    Args:
        earlier: as it was seen before this quote was asked for. What was seen meanwhile does not count: quotes of
            sessions that begin at one time may be judged in another order than they were made.
        later: of the quote. The clock is written to the TPM's memory now and then, and may begin a little earlier after
            a restart; that is counted.

    Raises:
        QuoteInvalid: one of them fell.
    """
    before, after = earlier.counts, later.counts
    if after < before:
        raise QuoteInvalid(
            f"the TPM has gone back: {before[0]} resets, {before[1]} restarts and {before[2]} ms were seen before, now "
            f"{after[0]}, {after[1]} and {after[2]}"
        )

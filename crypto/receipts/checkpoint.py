"""A log's signed head: how many entries it has, and their root (C2SP tlog-checkpoint and signed-note, v1).

    korora/alpha                                       the log of host alpha
    17                                                 entries
    CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=       root of the tree over them, base64

    — korora/alpha Az3grlgtzPICa5OS8n…                 4 bytes that name the key, and the Ed25519 signature, base64

What is signed are the lines above the empty one. Further lines of text are allowed and carried; so are further
signatures, of witnesses, and they count for nothing here.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from crypto.certificates import check_name
from crypto.errors import HeadMalformed
from crypto.receipts.limits import CHECKPOINT_BYTES_MAX, CHECKPOINT_LINES_MAX, TREE_SIZE_MAX
from crypto.receipts.merkle import HASH_BYTES

ORIGIN_PREFIX: Final = "korora/"
_MARK: Final = "— "  # U+2014
_ED25519: Final = b"\1"
_KEY_HASH_BYTES: Final = 4
_SIZE: Final = re.compile(r"0|[1-9][0-9]{0,12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A head.

    Attributes:
        origin: whose log, ``korora/NAME``.
        size: entries.
        root: 32 bytes.
    """

    origin: str
    size: int
    root: bytes


def origin_of(name: str) -> str:
    """The name of a host's log.

    Raises:
        PkiNameInvalid: no host can have that name.
    """
    return ORIGIN_PREFIX + check_name(name)


def name_of(head: Checkpoint) -> str:
    """The host whose log it is of, as the head says; empty if it is none of ours."""
    name = head.origin.removeprefix(ORIGIN_PREFIX)
    return "" if name == head.origin else name


def sign(head: Checkpoint, key: SigningKey) -> str:
    """A head's text, signed by its host."""
    text = f"{head.origin}\n{head.size}\n{base64.b64encode(head.root).decode()}\n"
    blob = key_hash(head.origin, key.verify_key) + key.sign(text.encode()).signature
    return f"{text}\n{_MARK}{head.origin} {base64.b64encode(blob).decode()}\n"


def parse(text: str) -> Checkpoint:
    """What a head says, whoever signed it.

    Raises:
        HeadMalformed: it is no head.
    """
    return _parse(text)[1]


def verify(text: str, origin: str, key: VerifyKey) -> Checkpoint:
    """What a head says, if it is that host's and signed by it.

    Raises:
        HeadMalformed: it is no head, another host's, not signed by that key, or altered.
    """
    signed, head, lines = _parse(text)
    if head.origin != origin:
        raise HeadMalformed(f"a head of {head.origin[:80]!r}, expected {origin!r}")
    mine = key_hash(origin, key)
    for name, blob in lines:
        if name == origin and blob[:_KEY_HASH_BYTES] == mine:
            try:
                key.verify(signed.encode(), blob[_KEY_HASH_BYTES:])
            except (BadSignatureError, ValueError):
                raise HeadMalformed(f"the signature of {origin}'s head does not verify: it was altered") from None
            return head
    raise HeadMalformed(f"{origin}'s head is not signed by its host's key")


def verify_any(text: str, origin: str, keys: Iterable[VerifyKey]) -> Checkpoint:
    """What a head says, if it is signed by one of the keys that its host has or had.

    Raises:
        HeadMalformed: as ``verify``; or no key is known.
    """
    trouble = HeadMalformed(f"no key of {origin.removeprefix(ORIGIN_PREFIX)[:80]!r} is known")
    for key in keys:
        try:
            return verify(text, origin, key)
        except HeadMalformed as error:
            trouble = error
    raise trouble


def key_hash(name: str, key: VerifyKey) -> bytes:
    """The four bytes that lead to a key (signed-note, "Ed25519")."""
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + bytes(key)).digest()[:_KEY_HASH_BYTES]


def _parse(text: str) -> tuple[str, Checkpoint, list[tuple[str, bytes]]]:
    """The text that is signed, the head, and its signature lines."""
    if len(text) > CHECKPOINT_BYTES_MAX or any(ord(one) < ord(" ") and one != "\n" for one in text):
        raise HeadMalformed(f"a head has at most {CHECKPOINT_BYTES_MAX} characters, and no control characters")
    body, gap, tail = text.rpartition("\n\n")
    if not gap or not tail.endswith("\n"):
        raise HeadMalformed("a head without its empty line or its last newline")
    origin, size, root = [*body.split("\n"), "", "", ""][:3]
    if not origin or _SIZE.fullmatch(size) is None or int(size) > TREE_SIZE_MAX:
        raise HeadMalformed("a head that does not say whose log it is of, and how many entries that has")
    lines = tail[:-1].split("\n")
    if len(lines) > CHECKPOINT_LINES_MAX:
        raise HeadMalformed(f"a head with {len(lines)} signatures, {CHECKPOINT_LINES_MAX} allowed")
    return f"{body}\n", Checkpoint(origin, int(size), _base64(root, HASH_BYTES)), [_signature(line) for line in lines]


def _signature(line: str) -> tuple[str, bytes]:
    name, _, blob = line.removeprefix(_MARK).partition(" ")
    if not line.startswith(_MARK) or not name or "+" in name:
        raise HeadMalformed("a head with a line below its empty one that is no signature")
    return name, _base64(blob)


def _base64(text: str, length: int | None = None) -> bytes:
    """Base64 as an encoder writes it."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HeadMalformed("a head with a value that is not base64") from None
    if base64.b64encode(content).decode() != text or len(content) != (length or len(content)):
        raise HeadMalformed("a head with a value of a wrong length or spelling")
    return content

"""Other hosts' heads: whoever has shown one must continue it, for good. So nobody rewrites a log unseen.

    FOLDER/peers/NAME.json             heads of that host that the next one has to continue, and the key they hold
                                       under: of its lines the last; earlier ones are of earlier sessions
    FOLDER/peers/NAME.DIGEST.evidence  a head that does not, beside the one that it should

A head that is asked for takes a moment to come, and meanwhile another session with the same host may have got a newer
one. Each is proven against what was known when it was asked for, and both are remembered: the next one has to continue
both. As a rule there is one.

No disk is waited for: after a crash an older head may stand there, from which the next one is proven as well, and both
stand in the session's receipts. That is why lines are appended: ext4 waits for the disk where a file is replaced.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec
from nacl.signing import VerifyKey

from crypto.certificates import check_name
from crypto.errors import HeadMalformed, LogForked, LogTruncated, LogUnusable, ProofInvalid
from crypto.files import make_private_directory, read_bounded, write_private
from crypto.receipts import checkpoint as heads
from crypto.receipts.checkpoint import Checkpoint
from crypto.receipts.limits import (
    CHECKPOINT_BYTES_MAX,
    EVIDENCE_FILES_MAX,
    HEADS_ASKED_MAX,
    HEADS_KNOWN_MAX,
    PROOF_HASHES_MAX,
)
from crypto.receipts.merkle import HASH_BYTES, verify_consistency

PEERS: Final = "peers"
EVIDENCE_SUFFIX: Final = ".evidence"
_LINE_BYTES_MAX: Final = 4 * HEADS_KNOWN_MAX * CHECKPOINT_BYTES_MAX  # JSON may take several bytes for a character
_EARLIER_BYTES_MAX: Final = 32 * 1024  # of a file, beside its last line: some 80 sessions; then it is made anew
_HOLE: Final = b"\0"  # JSON has none
_VERIFIED_MAX: Final = 4096  # hosts whose line this process remembers to have verified, half a KiB each

_Key = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Text = Annotated[str, msgspec.Meta(max_length=CHECKPOINT_BYTES_MAX)]


class Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A head as it was shown.

    Args:
        key: the Ed25519 key that it holds under, in hexadecimal.
        checkpoint: its text.
    """

    key: _Key
    checkpoint: _Text

    @property
    def head(self) -> Checkpoint:
        """What it says.

        Raises:
            HeadMalformed: it is no head.
        """
        return heads.parse(self.checkpoint)


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two heads that one host has signed, and that no log can have both.

    Args:
        what: in words.
        known: the earlier one.
        shown: the one that does not continue it.
        proof: what was to show that it does; hashes in hexadecimal.
    """

    what: str
    known: Seen
    shown: Seen
    proof: Annotated[tuple[_Key, ...], msgspec.Meta(max_length=PROOF_HASHES_MAX)]


class _Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    heads: Annotated[tuple[Seen, ...], msgspec.Meta(min_length=1, max_length=HEADS_KNOWN_MAX)]


class PeerHeads:
    """The heads of all hosts met.

    Args:
        folder: the own log's; ``peers`` is made in it when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / PEERS
        self._verified: dict[str, tuple[bytes, tuple[Seen, ...]]] = {}
        """By host: the line that was verified last, and what it says: the same bytes say the same."""

    def known(self, name: str) -> tuple[Seen, ...]:
        """What that host is to prove its next head against: ``HEADS_ASKED_MAX`` at most, none if it was never met.

        Ask it for that head only afterwards: one that it has signed before may be shorter by right.

        Raises:
            HeadMalformed: what is kept of it is not in order.
            LogUnusable: it cannot be read.
        """
        with self._locked():
            return self._read(name)[0][:HEADS_ASKED_MAX]

    def check(
        self,
        name: str,
        key: VerifyKey,
        text: str,
        asked: Sequence[Seen] = (),
        proofs: Sequence[Sequence[bytes]] = (),
    ) -> Checkpoint:
        """A host shows a head: it is its own, continues those that it was asked to continue, and is remembered.

        Args:
            name: of the host.
            key: its signing key's public half, verified (see signers).
            text: the head.
            asked: what ``known`` gave when it was asked for.
            proofs: of consistency, from each of these to the head, in the same order.

        Raises:
            HeadMalformed: it is no head, another host's, or its signature does not verify.
            LogTruncated: the log has become shorter; both heads are kept as evidence.
            LogForked: the log does not continue what it was; both heads are kept as evidence.
            LogUnusable: it cannot be remembered.
        """
        head = heads.verify(text, heads.origin_of(name), key)
        shown = Seen(bytes(key).hex(), text)
        if len(proofs) != len(asked):
            raise HeadMalformed(f"{name} proves its head against {len(proofs)} earlier ones, asked for {len(asked)}")
        with self._locked():
            seen, length = self._read(name)
            for one, proof in zip(asked, proofs, strict=True):
                self._continues(name, one, shown, proof)
            for one in seen:  # of one size there is one root, whoever asked
                if one.head.size == head.size and one.head.root != head.root:
                    self._forked(name, one, shown, ())
            old = {one.head for one in asked} | {head}
            left = tuple(one for one in seen if one.head not in old)
            if len(left) >= HEADS_KNOWN_MAX:
                raise LogUnusable(
                    f"{name} has {len(left)} heads that are not proven to be of one log", "let its sessions end first"
                )
            if (*left, shown) != seen:
                self._write(name, (*left, shown), length)
        return head

    def _continues(self, name: str, known: Seen, shown: Seen, proof: Sequence[bytes]) -> None:
        old, new = known.head, shown.head
        if new.size < old.size:
            where = self._keep(name, "truncated", known, shown, proof)
            raise LogTruncated(
                f"{name}'s log of receipts is truncated: it has {new.size} entries, and had {old.size}{where}",
                self._remedy(name),
            )
        try:
            verify_consistency(old.size, old.root, new.size, new.root, proof)
        except ProofInvalid:
            self._forked(name, known, shown, proof)

    def _forked(self, name: str, known: Seen, shown: Seen, proof: Sequence[bytes]) -> None:
        old, new = known.head, shown.head
        where = self._keep(name, "forked", known, shown, proof)
        raise LogForked(
            f"{name}'s log of receipts is forked: its {new.size} entries do not continue the {old.size} that it "
            f"had{where}",
            self._remedy(name),
        )

    def _remedy(self, name: str) -> str:
        return (
            f"find out at {name} what became of its log; if that is known and right, remove "
            f"{self.folder / name}.json and its log is followed anew"
        )

    def _keep(self, name: str, what: str, known: Seen, shown: Seen, proof: Sequence[bytes]) -> str:
        """Keep both heads; where, in words. The verdict stands whether that succeeds or not."""
        hashes = tuple(one.hex() for one in proof[:PROOF_HASHES_MAX] if len(one) == HASH_BYTES)
        content = msgspec.json.encode(Evidence(what, known, shown, hashes))
        path = self.folder / f"{name}.{hashlib.sha256(content).hexdigest()[:16]}{EVIDENCE_SUFFIX}"
        try:
            if path.exists():
                return f"; see {path}"
            if sum(1 for _ in self.folder.glob(f"{name}.*{EVIDENCE_SUFFIX}")) >= EVIDENCE_FILES_MAX:
                return f"; {self.folder} holds evidence enough"
            write_private(path, content)
        except OSError as error:
            return f"; the evidence cannot be kept: {error.strerror}"
        return f"; see {path}"

    def _read(self, name: str) -> tuple[tuple[Seen, ...], int]:
        """What is kept of a host, and how many bytes of its file are whole lines."""
        path = self.folder / f"{check_name(name)}.json"
        try:
            content, _ = read_bounded(path, _EARLIER_BYTES_MAX + 2 * _LINE_BYTES_MAX)
        except FileNotFoundError:
            return (), 0
        except OSError as error:
            raise LogUnusable(f"cannot read {path}: {error.strerror}", "run as the user who owns it") from None
        except ValueError as error:
            raise HeadMalformed(f"{path} is {error}", self._remedy(name)) from None
        if not content:
            return (), 0  # a crash left it so
        lines = content.split(b"\n")
        if len(lines) > 1:
            lines.pop()  # empty, or what a crash left of a line; the first one was written whole
        while len(lines) > 1 and _HOLE in lines[-1]:
            lines.pop()  # the same: sectors that were never written read as zeros
        return self._said(name, path, lines[-1]), min(len(content), sum(len(line) + 1 for line in lines))

    def _said(self, name: str, path: Path, line: bytes) -> tuple[Seen, ...]:
        """What a line says, verified."""
        verified, known = self._verified.get(name, (b"", ()))
        if verified == line:
            return known
        try:
            if len(line) > _LINE_BYTES_MAX:
                raise HeadMalformed(f"a line of {len(line)} bytes")
            known = msgspec.json.decode(line, type=_Known).heads
            for one in known:
                heads.verify(one.checkpoint, heads.origin_of(name), VerifyKey(bytes.fromhex(one.key)))
        except (msgspec.DecodeError, UnicodeDecodeError, HeadMalformed) as error:
            raise HeadMalformed(f"{path} is not what was written: {error}", self._remedy(name)) from None
        self._remember(name, line, known)
        return known

    def _remember(self, name: str, line: bytes, known: tuple[Seen, ...]) -> None:
        if len(self._verified) >= _VERIFIED_MAX:
            self._verified.clear()
        self._verified[name] = line, known

    def _write(self, name: str, seen: tuple[Seen, ...], length: int) -> None:
        """Append a line behind so many bytes; or make the file anew where there is none, or enough in it."""
        path, line = self.folder / f"{name}.json", msgspec.json.encode(_Known(seen))
        try:
            if 0 < length <= _EARLIER_BYTES_MAX:
                _append(path, line + b"\n", length)
            else:
                write_private(path, line + b"\n", durably=False)
        except OSError as error:
            raise LogUnusable(
                f"cannot remember {name}'s head in {path}: {error.strerror}", "make room on its disk, or repair it"
            ) from None
        self._remember(name, line, seen)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time."""
        path = self.folder / "lock"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            try:
                descriptor = os.open(path, flags, 0o600)
            except FileNotFoundError:
                make_private_directory(self.folder)
                descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise LogUnusable(f"cannot open {path}: {error.strerror}", "run as the user who owns it") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):
                os.close(descriptor)


def _append(path: Path, line: bytes, length: int) -> None:
    """Write a line behind so many bytes of a file, and nothing behind it; or leave these as they were."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, length)
        if os.pwrite(descriptor, line, length) < len(line):
            os.ftruncate(descriptor, length)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)

"""A log read through: every byte of it, against its index, its signed head, its signatures, and the heads told in it.

``log`` believes the index, as far as it can be cheap; here nothing is believed. What is found wrong is named with its
entry. Where an entry and its hash in the index disagree, the rest of the index and the signed head tell which of the
two was altered: the hashes of an index that was not altered follow from each other, and lead to the head.
"""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Final, Literal, Self

from crypto.errors import CryptoError, HeadMalformed, LogUnusable, ReceiptError, ReceiptMalformed
from crypto.receipts import checkpoint as heads
from crypto.receipts.checkpoint import Checkpoint
from crypto.receipts.dsse import decode, encode
from crypto.receipts.limits import RECEIPT_BYTES_MAX
from crypto.receipts.log import END, ENTRIES, INDEX, ReceiptLog, open_file
from crypto.receipts.merkle import HASH_BYTES, Tree, added, leaf_hash
from crypto.receipts.receipt import Receipt, examine
from crypto.receipts.signers import Trust

_HOLE: Final = bytes(8)
FINDINGS_MAX: Final = 100  # told of one log: whoever reads them wants the first

Kind = Literal[
    "altered", "missing", "out of order", "repeated", "added", "truncated", "receipt", "forked", "index", "head"
]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong.

    Attributes:
        kind: what, in a word.
        index: of the entry, or of the line where it is one too many; None where it is about the whole log.
        what: in a sentence without its full stop.
    """

    kind: Kind
    index: int | None
    what: str


@dataclass(slots=True)
class Audit:
    """What was found.

    Attributes:
        entries: how many lines there are.
        root: over them, 32 bytes.
        head: the last signed head, if it verifies.
        unindexed: entries at the end that a crash left out of the index; the next append puts that in order.
        torn: bytes at the end of an entry that was never logged.
        findings: what is wrong, at most ``FINDINGS_MAX``.
    """

    entries: int = 0
    root: bytes = b""
    head: Checkpoint | None = None
    unindexed: int = 0
    torn: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: Kind, index: int | None, what: str) -> None:
        """Write something down that is wrong."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(kind, index, what))


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the entries: its leaf hash, and what is wrong with it by itself."""

    leaf: bytes
    length: int
    trouble: str


def audit(folder: Path, trust: Trust, name: str = "") -> Audit:
    """Read a log through, as it is when this begins; whoever appends meanwhile goes on.

    Args:
        folder: of the log.
        trust: tells whose keys are whose.
        name: of the host whose log it is; empty to take it from its last head.

    Raises:
        LogUnusable: it cannot be read.
    """
    found, told = Audit(), Audit()
    try:
        with _Snapshot(folder) as files:
            owner = name
            if files.head is not None:
                owner = _read_head(found, files.head, name, trust)
            lines: list[_Line] = []
            own = _Grown()
            for line, receipt in files.lines(trust, found):
                if receipt is not None and owner:
                    _check_told(told, receipt, owner, own.tree, trust)
                own.add(line.leaf, line.length)
                lines.append(line)
            records = files.records()
    except OSError as error:
        raise LogUnusable(f"cannot read the log in {folder}: {error.strerror}", "run as its owner") from None
    found.entries, found.root = len(lines), own.tree.root()
    _Comparison(found, lines, own, records).run()
    if found.head is not None:
        _check_head(found, found.head, own.tree)
    if not found.findings:  # else what they do not go with has been named
        found.findings = told.findings
    return found


class _Snapshot:
    """Both files as long as they are at one moment between two appends, and the head of then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: BinaryIO = BytesIO()
        self._index: BinaryIO = BytesIO()
        self._lengths = (0, 0)
        self.head: str | None = None

    def __enter__(self) -> Self:
        with suppress(FileNotFoundError):
            self._entries = os.fdopen(open_file(self._folder / ENTRIES, write=False), "rb")
            fcntl.flock(self._entries, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            self._index = os.fdopen(open_file(self._folder / INDEX, write=False), "rb")
        self._lengths = _length_of(self._entries), _length_of(self._index)
        try:
            self.head = ReceiptLog(self._folder).last_head()
        except HeadMalformed:
            self.head = ""  # there is one, and it is none
        if not isinstance(self._entries, BytesIO):
            fcntl.flock(self._entries, fcntl.LOCK_UN)
        return self

    def __exit__(self, *_: object) -> None:
        self._entries.close()
        self._index.close()

    def lines(self, trust: Trust, found: Audit) -> Iterator[tuple[_Line, Receipt | None]]:
        """Every line with its newline; what is behind the last newline was never logged."""
        left = self._lengths[0]
        while content := self._entries.readline(min(left, RECEIPT_BYTES_MAX + 1)):
            length = len(content)
            last = content
            while not last.endswith(b"\n") and length < left:  # longer than any: to its end
                last = self._entries.readline(min(left - length, RECEIPT_BYTES_MAX + 1))
                if not last:
                    break
                length += len(last)
            left -= length
            if not last.endswith(b"\n"):
                found.torn = length
                return
            if length > len(content):
                yield _Line(leaf_hash(content), length, f"is longer than {RECEIPT_BYTES_MAX} bytes"), None
            else:
                yield _looked_at(content[:-1], trust)

    def records(self) -> list[bytes]:
        """The records of the index; the last one may be cut short."""
        left = self._lengths[1]
        records: list[bytes] = []
        while record := self._index.read(min(left, _length(len(records)))):
            records.append(record)
            left -= len(record)
        return records


def _length_of(file: BinaryIO) -> int:
    return 0 if isinstance(file, BytesIO) else os.fstat(file.fileno()).st_size


def _looked_at(line: bytes, trust: Trust) -> tuple[_Line, Receipt | None]:
    receipt, trouble = None, ""
    try:
        envelope = decode(line)
        if encode(envelope) != line:
            raise ReceiptMalformed("it is not spelled as it was written")
        receipt = examine(envelope, trust)
    except ReceiptError as error:
        trouble = str(error)
    return _Line(leaf_hash(line), len(line) + 1, trouble), receipt


class _Grown:
    """A tree grown from leaves, and the records that the index has of it."""

    def __init__(self, leaves: Iterable[bytes] = ()) -> None:
        self._hashes: list[bytes] = []
        self._end = 0
        self.tree = Tree(self._hashes, 0)
        self.records: list[bytes] = []
        for leaf in leaves:
            self.add(leaf, 0)

    def add(self, leaf: bytes, length: int) -> None:
        """The entry that follows."""
        new = self.tree.append(leaf)
        self._hashes.extend(new)
        self._end += length
        self.records.append(END.pack(self._end) + b"".join(new))


class _Comparison:
    """Lines against the leaves of the index: which is altered, missing, elsewhere, twice or too many."""

    def __init__(self, found: Audit, lines: list[_Line], own: _Grown, records: list[bytes]) -> None:
        self._found, self._lines, self._records, self._own = found, lines, records, own
        leaves = [record[END.size :][:HASH_BYTES] for record in records]
        while leaves and (
            len(records[len(leaves) - 1]) < _length(len(leaves) - 1) or _HOLE in records[len(leaves) - 1]
        ):
            leaves.pop()  # what a crash left
        self._leaves = leaves
        self._at_line: dict[bytes, int] = {}
        for number, line in enumerate(lines):
            self._at_line.setdefault(line.leaf, number)
        self._at_leaf = {leaf: number for number, leaf in reversed(list(enumerate(leaves)))}

    def run(self) -> None:
        """Step through both."""
        sound = self._index_is_sound()
        i = j = 0
        while i < len(self._lines) and j < len(self._leaves):
            line, leaf = self._lines[i], self._leaves[j]
            if line.leaf == leaf:
                self._same(i, j)
                i, j = i + 1, j + 1
            elif line.leaf not in self._at_leaf:
                step = self._unknown(i, j, sound=sound)
                i, j = i + 1, j + step
            elif self._at_line[line.leaf] != i:
                self._found.add("repeated", i, f"line {i} is entry {self._at_leaf[line.leaf]} once more")
                i += 1
            elif leaf in self._at_line:
                other = self._at_leaf[line.leaf]
                self._found.add("out of order", j, f"entry {j} is out of order: entry {other} stands in its place")
                i, j = i + 1, j + 1
            else:
                self._found.add("missing", j, f"entry {j} is missing")
                j += 1
        self._rest(i, len(self._leaves) - j)

    def _index_is_sound(self) -> bool:
        """Whether its hashes follow from its leaves, and lead to the signed head if there is one."""
        grown, head = _Grown(self._leaves), self._found.head
        for made, record in zip(grown.records, self._records, strict=False):
            if made[END.size :] != record[END.size :]:
                return False
        return head is None or head.size > grown.tree.size or grown.tree.root(head.size) == head.root

    def _same(self, i: int, j: int) -> None:
        if trouble := self._lines[i].trouble:
            self._found.add("receipt", j, f"entry {j} stands as it was logged, and is not in order: {trouble}")
        elif self._records[j] != self._own.records[i] and not self._found.findings:
            self._found.add("index", j, f"the index is altered at entry {j}; the entry is as it was written")

    def _unknown(self, i: int, j: int, *, sound: bool) -> int:
        """A line that the index does not know; how many entries of the index it stands for."""
        trouble = self._lines[i].trouble
        if self._leaves[j] in self._at_line:
            self._found.add("added", i, f"line {i} was put in before entry {j}: {trouble or 'it was never logged'}")
            return 0
        if trouble or sound:
            self._found.add("altered", j, f"entry {j} is altered: {trouble or 'it is not what was logged'}")
        else:
            self._found.add("index", j, f"the index is altered at entry {j}; the entry is in order")
        return 1

    def _rest(self, i: int, missing: int) -> None:
        """One of the two is longer."""
        if missing > 0:
            torn = f", and {self._found.torn} bytes are left of the next" if self._found.torn else ""
            what = f"the log is truncated: it ends before entry {i}, {missing} entries are missing at its end{torn}"
            self._found.add("truncated", i, what)
        for number, line in enumerate(self._lines[i:], i):
            first = self._at_line[line.leaf]
            if first != number:
                self._found.add("repeated", number, f"line {number} is entry {first} once more")
            elif line.trouble:
                self._found.add("altered", number, f"entry {number} is not in order: {line.trouble}")
            else:
                self._found.unindexed += 1


def _is_torn(record: bytes, index: int) -> bool:
    """Whether a crash kept part of a record from the disk."""
    return len(record) < _length(index) or _HOLE in record


def _length(index: int) -> int:
    """Of an entry's record."""
    return END.size + HASH_BYTES * added(index)


def _read_head(found: Audit, text: str, name: str, trust: Trust) -> str:
    """Whose log it is, as far as its head tells."""
    owner = name
    try:
        owner = name or heads.name_of(heads.parse(text))
        found.head = heads.verify_any(text, heads.origin_of(owner), trust.keys(owner))
    except CryptoError as error:
        found.add("head", None, f"the log's signed head is not in order: {error}")
    return owner


def _check_head(found: Audit, head: Checkpoint, tree: Tree) -> None:
    """The log may have grown since its head was signed, nothing else."""
    if found.findings:
        return  # whatever it does not go with has been named
    if head.size > tree.size:
        found.add("truncated", tree.size, f"the log is truncated: {tree.size} entries are left of {head.size}")
    elif tree.root(head.size) != head.root:
        found.add("forked", None, f"the first {head.size} entries are not those whose head was signed")


def _check_told(told: Audit, receipt: Receipt, name: str, before: Tree, trust: Trust) -> None:
    """Heads of this log that its own receipt tells, signed by both hosts: the entries before go with them."""
    predicate, index = receipt.statement.predicate, before.size
    sides = ((predicate.source, predicate.heads.source), (predicate.destination, predicate.heads.destination))
    for text in {text for party, text in sides if party.name == name and text}:
        try:
            head = heads.verify_any(text, heads.origin_of(name), trust.keys(name))
        except CryptoError as error:
            told.add("head", index, f"entry {index} tells a head of this log that is not in order: {error}")
            continue
        if head.size > before.size or before.root(head.size) != head.root:
            told.add(
                "forked",
                index,
                f"entry {index} tells a head of this log over {head.size} entries, and they are not the first "
                f"{head.size}: what stands before it was rewritten",
            )

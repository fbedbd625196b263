"""The kernel's list of measured files (binary_runtime_measurements), and the PCR that it leads to.

Layout: Linux security/integrity/ima/ima_fs.c, ima_measurements_show. An entry: PCR u32, SHA-1 of the template's data
(20 bytes), length of the template's name u32 and the name, length of its data u32 and the data; little-endian. Of the
templates ``ima-ng`` and ``ima-sig`` are read: each field behind its length u32; first ``ALG:\\0`` and the digest of the
file, then its path and a NUL. An entry whose template digest is all zeros is a violation: the file was open to writing
while it was measured; the kernel extends the PCR by all ones then.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

from crypto.attestation.eventlog import extend
from crypto.attestation.limits import IMA_BYTES_MAX, IMA_ENTRIES_MAX, IMA_FIELD_BYTES_MAX, PCR_COUNT
from crypto.attestation.structures import DIGEST_BYTES
from crypto.errors import EvidenceMalformed

PCR: Final = 10  # CONFIG_IMA_MEASURE_PCR_IDX
_ONES: Final = b"\xff" * 64
TEMPLATES: Final = frozenset({"ima-ng", "ima-sig"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured file.

    Attributes:
        pcr: which PCR it went into.
        template: its digest's input: what the PCR was extended by a digest of.
        violation: whether what was measured may have been changed meanwhile.
        algorithm: of ``digest``.
        digest: of the file's content.
        path: as the kernel named it; bytes, since it may be anything.
    """

    pcr: int
    template: bytes
    violation: bool
    algorithm: str
    digest: bytes
    path: bytes

    @property
    def label(self) -> str:
        """Algorithm and digest, as references name them."""
        return f"{self.algorithm}:{self.digest.hex()}"


def parse(data: bytes) -> tuple[Entry, ...]:
    """The entries of a list, in their order.

    Raises:
        EvidenceMalformed: it is none, of another template, or out of bounds.
    """
    if len(data) > IMA_BYTES_MAX:
        raise EvidenceMalformed(f"a list of measured files of {len(data)} bytes, {IMA_BYTES_MAX} allowed")
    entries: list[Entry] = []
    at = 0
    while at < len(data):
        if len(entries) >= IMA_ENTRIES_MAX:
            raise EvidenceMalformed(f"over {IMA_ENTRIES_MAX} measured files")
        if len(data) - at < 24:
            raise EvidenceMalformed("the list of measured files ends within an entry")
        pcr, told = int.from_bytes(data[at : at + 4], "little"), data[at + 4 : at + 24]
        name, at = _field(data, at + 24)
        template, at = _field(data, at)
        entries.append(_entry(pcr, told, name.decode("ascii", "replace"), template))
    return tuple(entries)


def _field(data: bytes, at: int) -> tuple[bytes, int]:
    """The field at ``at``, behind its length, and where the next one begins."""
    size = int.from_bytes(data[at : at + 4], "little")
    begin, end = at + 4, at + 4 + size
    if begin > len(data) or size > IMA_FIELD_BYTES_MAX or end > len(data):
        raise EvidenceMalformed("the list of measured files has a field that is too long")
    return data[begin:end], end


def _entry(pcr: int, told: bytes, name: str, template: bytes) -> Entry:
    if pcr >= PCR_COUNT or name not in TEMPLATES:
        raise EvidenceMalformed(f"a measured file in PCR {pcr} by template {name[:32]!r}: {sorted(TEMPLATES)} are read")
    violation = not any(told)
    if not violation and hashlib.sha1(template, usedforsecurity=False).digest() != told:
        raise EvidenceMalformed("an entry of the list of measured files is not what its digest says")
    content, at = _field(template, 0)
    path, at = _field(template, at)
    if name == "ima-sig":
        _, at = _field(template, at)
    algorithm, separator, digest = content.partition(b":\0")
    if at != len(template) or not separator or not path.endswith(b"\0"):
        raise EvidenceMalformed(f"an entry of the list of measured files is not laid out as {name}")
    return Entry(pcr, template, violation, algorithm.decode("ascii", "replace"), digest, path[:-1])


def covered(entries: tuple[Entry, ...], bank: str, value: bytes) -> tuple[Entry, ...] | None:
    """The first entries, as many as lead PCR 10 to ``value``; None where no number of them does.

    The list may be longer than it was at the quote: the kernel appends to it before it extends the PCR. Since Linux 5.8
    each bank is extended by its own digest of the template; before, all by the SHA-1, padded with zeros.

    Args:
        entries: as ``parse`` gives them.
        bank: of the PCR.
        value: as quoted.
    """
    size = DIGEST_BYTES[bank]
    own = old = bytes(size)
    counted = tuple(entry for entry in entries if entry.pcr == PCR)
    if value == own:
        return ()
    for count, entry in enumerate(counted, 1):
        sha1 = hashlib.sha1(entry.template, usedforsecurity=False).digest()[:size].ljust(size, b"\0")
        digest = hashlib.new(bank, entry.template, usedforsecurity=False).digest()
        own, old = (
            extend(bank, held, _ONES[:size] if entry.violation else by) for held, by in ((own, digest), (old, sha1))
        )
        if value in {own, old}:
            return counted[:count]
    return None

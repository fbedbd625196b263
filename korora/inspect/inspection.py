"""Reads a stream to its end, or as far as it goes, and gathers what there is to say of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from chunking import kernels
from chunking.encoder import page_offsets
from chunking.frame import PageKind
from chunking.pages import PAGE_BYTES, Spans
from korora.inspect.limits import PIECE_BYTES, TEXT_CHARACTERS_MAX
from korora.inspect.source import Source
from korora.inspect.techniques import Technique, Techniques
from korora.inspect.timeline import Timeline
from korora.inspect.versions import Pages, Round, Versions
from proxy.streams.facts import StreamFacts
from proxy.streams.formats import EndWatch, StreamFormat
from proxy.streams.parser import StreamParser


@dataclass(slots=True)
class Inspection:
    """What a stream is.

    Args:
        source: where it came from, for people.
        facts: what the parser learnt.
        notes: what keeps this from being the whole truth: a stream cut short, a format unknown; empty if nothing.
        kinds: pages by ``PageKind``, as the relay's engine finds them.
        distinct: different pages of the guest.
        rounds: passes over memory.
        techniques: in the order in which they save.
        timeline: pages over the stream's course.
    """

    source: str
    facts: StreamFacts
    notes: list[str]
    kinds: NDArray[np.int64]
    distinct: int
    rounds: list[Round]
    techniques: list[Technique]
    timeline: Timeline = field(repr=False)

    @property
    def again(self) -> int:
        """Pages that were sent before."""
        return sum(each.again for each in self.rounds)

    @property
    def unchanged(self) -> int:
        """Of these, pages that had not changed."""
        return sum(each.unchanged for each in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """For scripts; keys are stable."""
        facts = self.facts
        size = facts.stream_bytes
        return {
            "source": self.source,
            "format": facts.format.value,
            "hypervisor": text(facts.hypervisor) or None,
            "machine": text(facts.machine) or None,
            "vm_name": text(facts.vm_name),
            "vm_uuid": text(facts.vm_uuid),
            "complete": not self.notes,
            "notes": self.notes,
            "opaque_reason": facts.opaque_reason,
            "stream_bytes": size,
            "page_bytes": facts.page_bytes,
            "opaque_bytes": facts.opaque_bytes,
            "records": {text(name): count for name, count in facts.records.items()},
            "blocks": [
                {"name": text(block.name), "size_bytes": block.size_bytes} for _, block in sorted(facts.blocks.items())
            ],
            "pages": {
                "with_data": facts.pages_data,
                "zero_marked": facts.pages_zero_marked,
                "xbzrle": facts.pages_xbzrle,
                "compressed": facts.pages_compressed,
                "xtab": facts.entries_xtab,
                "xalloc": facts.entries_xalloc,
                "broken": facts.entries_broken,
                "distinct": self.distinct,
                "sent_again": self.again,
                "sent_again_unchanged": self.unchanged,
            },
            "kinds": {
                "zero": int(self.kinds[PageKind.ZERO]),
                "duplicate": int(self.kinds[PageKind.REF]),
                "delta": int(self.kinds[PageKind.DELTA]),
                "literal": int(self.kinds[PageKind.LITERAL]),
            },
            "rounds": [
                {"pages": each.pages, "sent_again": each.again, "unchanged": each.unchanged} for each in self.rounds
            ],
            "techniques": [
                {
                    "name": each.name,
                    "wire_bytes": each.wire_bytes,
                    "ratio": round(each.wire_bytes / size, 6) if size else None,
                    "cpu_seconds": round(each.cpu_seconds, 4),
                }
                for each in self.techniques
            ],
        }


def inspect(
    source: Source, *, cache_bytes: int, best: bool, progress: Callable[[Source, int], None] | None = None
) -> Inspection:
    """Read ``source`` and describe it.

    Args:
        source: the stream.
        cache_bytes: of the page cache that a relay's session would have.
        best: whether to try the slow high levels too.
        progress: called now and then with the source and the stream's bytes so far.
    """
    parser, watch, versions, timeline = StreamParser(), EndWatch(), Versions(), Timeline()
    kinds = np.zeros(len(PageKind), np.int64)
    with Techniques(cache_bytes, best=best, workers=os.cpu_count() or 1) as techniques:
        rest, final, told = b"", False, _Told(0, 0)
        while not final:
            data = source.read(PIECE_BYTES - len(rest))
            final = len(rest) + len(data) < PIECE_BYTES
            watch.feed(memoryview(data))
            whole = rest + data if rest else data
            spans = parser.feed(memoryview(whole), final=final)
            if not spans.used:
                if final:
                    break
                raise RuntimeError("a piece of which the parser describes nothing")
            piece, rest = memoryview(whole)[: spans.used], whole[spans.used :]
            found = techniques.add(piece, spans)
            kinds += found
            before, told = told, _Told.of(parser.facts)
            zeros, changes = told.zeros - before.zeros, told.changes - before.changes
            again = _follow(versions, piece, spans, zeros_only=not changes)
            shown = found[[PageKind.ZERO, PageKind.REF, PageKind.DELTA, PageKind.LITERAL]]
            timeline.add(spans.used, shown + np.array([zeros, 0, changes, 0], np.int64), again)
            if progress is not None:
                progress(source, parser.facts.stream_bytes)
        techniques.finish()
    facts = parser.facts
    return Inspection(
        source=source.name,
        facts=facts,
        notes=_notes(source, facts, watch, versions),
        kinds=kinds,
        distinct=versions.distinct,
        rounds=[each for each in versions.rounds if each.pages],
        techniques=techniques.all,
        timeline=timeline,
    )


_ZERO_PRINT: Final = np.empty(1, np.uint64)
kernels.fingerprints(np.zeros(PAGE_BYTES, np.uint8), np.zeros(1, np.uint32), _ZERO_PRINT)


class _Told(NamedTuple):
    """Pages so far that the stream tells of without their bytes: zero ones, and changed or compressed ones."""

    zeros: int
    changes: int

    @classmethod
    def of(cls, facts: StreamFacts) -> Self:
        return cls(facts.pages_zero_marked, facts.pages_xbzrle + facts.pages_compressed)


def _follow(versions: Versions, piece: memoryview, spans: Spans, *, zeros_only: bool) -> NDArray[np.uint64]:
    """Tell ``versions`` of the piece's pages; returns the PFNs of those that were sent before.

    Args:
        zeros_only: pages without bytes are zero. Otherwise which are is not known, and all are taken for changed.
    """
    offsets = page_offsets(spans.runs)
    prints = np.empty(len(offsets), np.uint64)
    kernels.fingerprints(np.frombuffer(piece, np.uint8), offsets, prints)
    without = np.full(len(spans.marked), _ZERO_PRINT[0], np.uint64)
    if not zeros_only:
        without = np.arange(len(without), dtype=np.uint64) + np.uint64(1 + sum(each.pages for each in versions.rounds))
    again = versions.add(Pages(spans.pfns, prints), Pages(spans.marked, without))
    return np.concatenate([spans.pfns[again[0]], spans.marked[again[1]]])


def _notes(source: Source, facts: StreamFacts, watch: EndWatch, versions: Versions) -> list[str]:
    notes = []
    if source.broken:
        notes.append(f"reading ended early: {source.broken}")
    if not facts.stream_bytes:
        notes.append("nothing to read: the stream is empty")
    elif facts.opaque_reason == "unknown_format":
        notes.append("unknown format: its first bytes are those of none known here, so it would go as it is")
    elif facts.opaque_reason is not None:
        left = f"{facts.opaque_bytes:,} bytes"
        notes.append(f"not followed to its end ({facts.opaque_reason}): the last {left} would go as they are")
    # A saved domain and a migration end differently; without the other direction either will do.
    if facts.format is not StreamFormat.OPAQUE and watch.cut(answered=True) and watch.cut(answered=False):
        notes.append("cut short: it does not end as its format ends")
    if versions.not_followed:
        notes.append(f"{versions.not_followed:,} pages lie beyond what is followed: sent-again counts leave them out")
    return notes


def text(value: str | None) -> str | None:
    """What a stream says of itself, fit for a terminal: nothing that steers one, and not too long."""
    if value is None:
        return None
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value[:TEXT_CHARACTERS_MAX])
    return clean if len(value) <= TEXT_CHARACTERS_MAX else clean + "…"

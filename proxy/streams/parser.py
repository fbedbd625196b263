"""Parsers of streams as the relay uses them: bytes in, where the pages are out. Sans-IO.

A parser never raises and never changes a byte. What surprises it turns the rest of the stream opaque: described as
other bytes, counted, with a reason in its facts (docs/streams.md).
"""

from collections.abc import Callable
from typing import Final, Protocol

from chunking.pages import PAGE_BYTES, Spans
from proxy.streams.facts import StreamFacts
from proxy.streams.formats import MAGICS, StreamFormat, recognise
from proxy.streams.multifd import multifd_steps
from proxy.streams.qemu import qemu_steps
from proxy.streams.reader import Reader, Steps, Surprise
from proxy.streams.vtpm import VtpmWatch
from proxy.streams.xen import libxc_steps, libxl_steps, xl_steps


class Parser(Protocol):
    """Follows one direction of one channel."""

    @property
    def facts(self) -> StreamFacts:
        """What has been learnt so far."""

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """Describe the stream's next bytes; never raises.

        Args:
            piece: contiguous bytes, fewer than 4 GiB, starting where the last ``used`` ended. Not kept.
            final: whether the stream ends with this piece; otherwise an incomplete page at its end is left out
                (``used < len(piece)``), to be given again with what follows.
            urgent: whether an incomplete page must not wait: it is other bytes then, and so is its rest.
        """


_STEPS: Final[dict[StreamFormat, Callable[[Reader, StreamFacts], Steps[None]]]] = {
    StreamFormat.XL: xl_steps,
    StreamFormat.LIBXL: libxl_steps,
    StreamFormat.LIBXC: libxc_steps,
    StreamFormat.QEMU: qemu_steps,
    StreamFormat.QEMU_MULTIFD: multifd_steps,
}


class FormatParser:
    """A parser of one format, from the stream's first byte on.

    Args:
        kind: the format; OPAQUE describes every byte as other.
        watch: is shown the guest's vTPM, where the format is QEMU's main stream.
    """

    def __init__(self, kind: StreamFormat, watch: VtpmWatch | None = None) -> None:
        self.facts = StreamFacts(kind)
        self._reader = Reader()
        self._steps: Steps[None] | None = None
        self._watch = watch if kind is StreamFormat.QEMU else None
        if self._watch is not None:
            self._watch.begin()
            self._steps = qemu_steps(self._reader, self.facts, self._watch)
        elif kind in _STEPS:
            self._steps = _STEPS[kind](self._reader, self.facts)
        else:
            self.facts.opaque_reason = "unknown_format"

    @property
    def paged(self) -> bool:
        """Whether the stream is still followed."""
        return self._steps is not None

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """See Parser."""
        reader, facts = self._reader, self.facts
        pages = reader.pages_read
        reader.begin(piece, urgent=urgent)
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._give_up("after_end" if reader.at < reader.end else None)
            except Surprise as surprise:
                self._give_up(surprise.reason)
        if self._steps is None:
            rest = reader.rest()
            if rest:
                self._give_up("after_end")  # it came in a piece of its own
            facts.opaque_bytes += rest
        elif final:
            reader.rest()
        if final:
            self._give_up(None)
        spans = reader.finish()
        facts.stream_bytes += spans.used
        facts.pages_data += reader.pages_read - pages
        facts.page_bytes += (reader.pages_read - pages) * PAGE_BYTES
        return spans

    def _give_up(self, reason: str | None) -> None:
        """Follow the stream no longer."""
        self._steps = None
        if reason is not None and self.facts.opaque_reason is None:
            self.facts.opaque_reason = reason
            if self._watch is not None:
                self._watch.lose(f"the stream is followed no longer ({reason})")


def parser_for(head: bytes) -> Parser:
    """The parser of a stream that begins with ``head`` (``HEAD_BYTES`` bytes, or all there are), at its first byte."""
    return FormatParser(recognise(head))


class StreamParser:
    """A parser that finds out for itself what the stream is, however few bytes it is first given.

    While the bytes so far may still become one of several formats they are other bytes, as the first bytes of every
    format are.

    Args:
        watch: see ``FormatParser``.
    """

    def __init__(self, watch: VtpmWatch | None = None) -> None:
        self._watch = watch
        self._head = b""
        self._waiting = StreamFacts(StreamFormat.OPAQUE)
        self._parser: FormatParser | None = None

    @property
    def decided(self) -> bool:
        """Whether it is known what the stream is."""
        return self._parser is not None

    @property
    def paged(self) -> bool:
        """Whether pages are to be expected."""
        return self._parser is not None and self._parser.paged

    @property
    def facts(self) -> StreamFacts:
        """See Parser; while the format is not known yet, nothing but bytes are counted."""
        return self._waiting if self._parser is None else self._parser.facts

    def feed(self, piece: memoryview, *, final: bool, urgent: bool = False) -> Spans:
        """See Parser."""
        if self._parser is None:
            head = self._head + bytes(piece[: _MAGIC_BYTES_MAX - len(self._head)])
            if not final and _undecided(head):
                self._head = head
                return self._wait(piece)
            kind = recognise(head)
            if self._watch is not None and kind not in _OF_QEMU:
                self._watch.lose("what comes is no stream of a QEMU's that can be read")
            self._parser = FormatParser(kind, self._watch)
            if self._head:
                self._parser.feed(memoryview(self._head), final=False)
        return self._parser.feed(piece, final=final, urgent=urgent)

    def _wait(self, piece: memoryview) -> Spans:
        self._waiting.stream_bytes += len(piece)
        reader = Reader()
        reader.begin(piece)
        reader.rest()
        return reader.finish()


_OF_QEMU: Final = (StreamFormat.QEMU, StreamFormat.QEMU_MULTIFD)
_MAGIC_BYTES_MAX: Final = max(len(magic) for magic, _ in MAGICS)


def _undecided(head: bytes) -> bool:
    """Whether ``head`` is a true beginning of some format's magic, and of nothing longer."""
    return any(len(head) < len(magic) and magic.startswith(head) for magic, _ in MAGICS)

"""Pages of a guest go through the engine and arrive exact, whatever the network, the lanes and the caches do."""

import asyncio
import random

import pytest

from crypto.tls import TlsConfig
from proxy.limits import KIB, MIB
from proxy.paging import Encode, PagingTerms
from proxy.report import SessionReport
from tests.proxy.guest import PAGE, Guest
from tests.proxy.support import Middle, Pair, Wire, over_tcp, relays, run, until

SECONDS_MAX = 60.0


async def carry(near: Wire, far: Wire, stream: bytes, answer: bytes) -> tuple[bytes, bytes]:
    """Both hypervisors say their piece at once and then end; what each has heard."""

    async def say(wire: Wire, words: bytes) -> bytes:
        async def out() -> None:
            await wire.send(words)
            wire.shut()

        _, heard = await asyncio.gather(out(), wire.to_end())
        return heard

    return tuple(await asyncio.gather(say(far, answer), say(near, stream)))


def migrate(
    client_tls: TlsConfig,
    server_tls: TlsConfig,
    stream: bytes,
    *,
    source: PagingTerms,
    destination: PagingTerms | None = None,
    lanes: int = 1,
    answer: bytes = b"yes",
    others: tuple[bytes, ...] = (),
) -> tuple[SessionReport, SessionReport]:
    """One session of one channel, and ``others`` for more channels; everything must arrive as it was sent."""

    async def work() -> tuple[SessionReport, SessionReport]:
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                lanes=lanes,
                paging=(source, destination or PagingTerms()),
            ) as pair:
                channels = [await pair.channel(hypervisors) for _ in range(1 + len(others))]
                words = (stream, *others)
                heard = await asyncio.gather(
                    *(carry(*ends, said, answer) for ends, said in zip(channels, words, strict=True))
                )
                reports = await pair.ended_well()
                for (forward, backward), said in zip(heard, words, strict=True):
                    assert forward == said
                    assert backward == answer
                return reports
        finally:
            hypervisors.close()

    return run(work(), SECONDS_MAX)


@pytest.mark.parametrize("encode", [Encode.AUTO, Encode.PAGES, Encode.BEST])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_guest_arrives_exact_and_smaller(
    encode: Encode, lanes: int, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    stream = Guest(1, 3000).stream()
    source, destination = migrate(client_tls, server_tls, stream, source=PagingTerms(encode=encode), lanes=lanes)
    assert source.pages == destination.pages
    assert source.encode == encode
    assert source.bytes_saved == destination.bytes_saved
    if encode is not Encode.AUTO:  # which does what pays here and now
        assert all(source.pages[kind] for kind in ("zero", "duplicate", "delta", "literal"))
        assert source.bytes_wire["forward"] < 0.5 * len(stream)
        assert source.bytes_saved > 0.5 * len(stream)
    assert source.digest_blake3 == destination.digest_blake3


def test_best_needs_fewer_bytes_than_pages(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    stream = Guest(2, 3000).stream()
    wire = [
        migrate(client_tls, server_tls, stream, source=PagingTerms(encode=encode))[0].bytes_wire["forward"]
        for encode in (Encode.PAGES, Encode.BEST)
    ]
    assert wire[1] < wire[0]


@pytest.mark.parametrize("which", ["the source says opaque", "the source has no cache", "the destination has none"])
def test_either_side_can_have_the_bytes_as_they_are(which: str, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    stream = Guest(3, 500).stream()
    terms = {
        "the source says opaque": (PagingTerms(encode=Encode.OPAQUE), PagingTerms()),
        "the source has no cache": (PagingTerms(cache_bytes=0), PagingTerms()),
        "the destination has none": (PagingTerms(), PagingTerms(cache_bytes=0)),
    }[which]
    source, destination = migrate(client_tls, server_tls, stream, source=terms[0], destination=terms[1])
    assert not source.pages
    assert not destination.pages
    assert source.bytes_wire["forward"] > len(stream)


@pytest.mark.parametrize("pages", [1, 7, 64])
def test_a_cache_that_is_far_too_small_costs_bytes_only(
    pages: int, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    stream = Guest(4, 2000).stream(rounds=4)
    terms = PagingTerms(encode=Encode.PAGES, cache_bytes=pages * PAGE)
    source, destination = migrate(client_tls, server_tls, stream, source=terms)
    assert source.pages == destination.pages


def test_the_smaller_cache_of_both_counts(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    stream = Guest(5, 1000).stream()
    small, large = (PagingTerms(encode=Encode.PAGES, cache_bytes=count * PAGE) for count in (5, 100_000))
    one, _ = migrate(client_tls, server_tls, stream, source=small, destination=large)
    other, _ = migrate(client_tls, server_tls, stream, source=large, destination=small)
    assert one.pages == other.pages
    both, _ = migrate(client_tls, server_tls, stream, source=large, destination=large)
    assert both.pages != one.pages


def test_channels_of_several_formats_share_a_session(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    dice = random.Random(6)
    others = (dice.randbytes(3 * MIB), Guest(6, 1000).stream(), b"", b"x" * 100 * KIB)
    source, destination = migrate(
        client_tls, server_tls, Guest(7, 1000).stream(), source=PagingTerms(encode=Encode.PAGES), others=others, lanes=2
    )
    assert source.pages == destination.pages
    assert source.digest_blake3 == destination.digest_blake3


@pytest.mark.parametrize("blocks", [True, False], ids=["in blocks", "one behind the other"])
def test_a_stream_of_which_nothing_is_known_sends_each_chunk_once(
    blocks: bool, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """Files that come twice: in the blocks of a disk, or of an archive, where the second time they lie anywhere."""
    dice = random.Random(8)
    contents = [dice.randbytes(dice.randrange(3000, 12_000)) for _ in range(600)]
    files = b"".join(data + bytes(-len(data) % 4096 if blocks else 600) for data in contents)
    stream = b"disk" * 1024 + files + bytes(4096 if blocks else 1000) + files
    source, destination = migrate(client_tls, server_tls, stream, source=PagingTerms(encode=Encode.PAGES))
    assert source.pages == destination.pages
    assert source.bytes_wire["forward"] < 0.75 * len(stream)


def test_words_of_both_sides_alternate_without_delay(client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    """A hypervisor that waits for an answer before it goes on must get it, in the middle of a page as well."""
    stream = Guest(9, 300).stream()

    async def work() -> None:
        hypervisors = over_tcp()
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                paging=(PagingTerms(encode=Encode.PAGES), PagingTerms()),
            ) as pair:
                near, far = await pair.channel(hypervisors)
                dice, at = random.Random(9), 0
                while at < len(stream):
                    piece = stream[at : at + dice.choice((1, 100, 4000, 70_000, 300_000))]
                    await near.send(piece)
                    assert await far.exactly(len(piece)) == piece
                    await far.send(b"on")
                    assert await near.exactly(2) == b"on"
                    at += len(piece)
                near.shut()
                far.shut()
                await pair.ended_well()
        finally:
            hypervisors.close()

    run(work(), SECONDS_MAX)


@pytest.mark.parametrize("seed", range(6))
def test_a_session_that_is_cut_again_and_again_decodes_on(
    seed: int, client_tls: TlsConfig, server_tls: TlsConfig
) -> None:
    """What lost lanes took with them comes again as it was encoded; both caches stay in step."""
    dice = random.Random(seed)
    stream = Guest(seed, 6000).stream(rounds=4)
    cuts = 0

    async def strike(pair: Pair, middle: Middle) -> None:
        nonlocal cuts
        await until(lambda: pair.departing.session.senders)
        half = pair.departing.session.senders[min(pair.departing.session.senders)]
        for share in sorted(dice.random() for _ in range(4)):
            await until(lambda share=share: half.offset >= share * len(stream))
            living = middle.living(lanes=dice.random() < 0.7)
            if living:
                cuts += 1
                await middle.cut(dice.choice(living), reset=dice.random() < 0.5)

    async def work() -> tuple[SessionReport, SessionReport]:
        hypervisors, middle = over_tcp(), Middle()
        try:
            async with relays(
                client_tls,
                server_tls,
                hypervisors.ingress,
                hypervisors.egress,
                peer_port=middle.port,
                resume_seconds=30,
                lanes=dice.choice((1, 2, 4)),
                paging=(PagingTerms(encode=Encode.PAGES), PagingTerms()),
            ) as pair:
                middle.start(pair.port)
                near, far = await pair.channel(hypervisors)
                striking = asyncio.create_task(strike(pair, middle))
                forward, _ = await carry(near, far, stream, b"yes")
                striking.cancel()
                assert forward == stream
                return await pair.ended_well()
        finally:
            await middle.close()
            hypervisors.close()

    source, destination = run(work(), SECONDS_MAX)
    assert cuts
    assert source.pages == destination.pages
    assert source.digest_blake3 == destination.digest_blake3

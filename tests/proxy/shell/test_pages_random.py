"""Any guest, cut into any writes, encoded in any way, over lanes that break at any time, arrives as it was sent.

HYPOTHESIS_PROFILE=explore tries several hundred new ones; each is a whole session.
"""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunking.adapt import Adapter
from chunking.regime import Regime
from crypto.tls import TlsConfig
from proxy.limits import KIB
from proxy.paging import Encode, PagingTerms
from proxy.report import SessionReport
from tests.attacks.paged import Shelf
from tests.proxy.guest import PAGE, Guest
from tests.proxy.support import Middle, Pair, Wire, over_tcp, relays, run, until

SECONDS_MAX = 60.0
EXAMPLES = 400 if settings.default is not None and settings.default.max_examples > 100 else 40


@dataclass(frozen=True)
class Case:
    """One session.

    Args:
        seed: of everything else that is random.
        guest_pages: of the guest; 0: bytes that are no guest's.
        rounds: over its memory.
        writes: the hypervisor's, most bytes of each, again and again.
        encode: pinned, or None: another regime for each frame.
        caches: pages of the source's and the destination's.
        chains: contexts.
        lanes: of the session.
        cuts: of lanes and control connections.
        stored: share of the stored pages that the destination can read; None where nothing is stored.
        more: further channels.
    """

    seed: int
    guest_pages: int
    rounds: int
    writes: list[int]
    encode: Encode | None
    caches: tuple[int, int]
    chains: int
    lanes: int
    cuts: int
    stored: float | None
    more: int


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32),
    guest_pages=st.sampled_from([0, 1, 5, 63, 64, 65, 300, 1500]),
    rounds=st.integers(1, 4),
    writes=st.lists(st.sampled_from([1, 7, 100, PAGE, PAGE + 1, 16 * KIB, 70_000, 300_000, 5 << 20]), min_size=1),
    encode=st.sampled_from([None, None, *Encode]),
    caches=st.tuples(*[st.sampled_from([1, 2, 17, 256, 5000])] * 2),
    chains=st.integers(1, 3),
    lanes=st.integers(1, 3),
    cuts=st.sampled_from([0, 0, 1, 3]),
    stored=st.sampled_from([None, 0.0, 0.5, 1.0]),
    more=st.sampled_from([0, 0, 1, 2]),
)


async def write(wire: Wire, stream: bytes, writes: list[int]) -> None:
    at, turn = 0, 0
    while at < len(stream):
        size = max(writes[turn % len(writes)], len(stream) // 500)
        await wire.send(stream[at : at + size])
        await asyncio.sleep(0)
        at, turn = at + size, turn + 1
    wire.shut()


async def answer(wire: Wire, words: bytes) -> bytes:
    await wire.send(words)
    wire.shut()
    return await wire.to_end()


async def cut(pair: Pair, middle: Middle, dice: random.Random, cuts: int, length: int) -> None:
    await until(lambda: pair.departing.session.senders)
    half = pair.departing.session.senders[min(pair.departing.session.senders)]
    for share in sorted(dice.random() for _ in range(cuts)):
        await until(lambda share=share: half.offset >= share * length)
        if living := middle.living(lanes=dice.random() < 0.7):
            await middle.cut(dice.choice(living), reset=dice.random() < 0.5)


async def carry(case: Case, client: TlsConfig, server: TlsConfig) -> tuple[SessionReport, SessionReport]:
    dice = random.Random(case.seed)
    guest = Guest(case.seed, case.guest_pages or 1)
    shelves = (None, None)
    if case.stored is not None:
        before = list(guest.memory)
        guest.touch(0.3)
        readable = [ordinal for ordinal in range(len(before)) if dice.random() < case.stored]
        shelves = Shelf(before, range(len(before))), Shelf(before, readable)
    other = dice.randbytes(dice.choice((0, 1, 100, 3 << 20))) * dice.choice((1, 3))
    stream = guest.stream(case.rounds) if case.guest_pages else other
    streams = [stream, *(Guest(number, 200).stream() for number in range(case.more))]
    encode = case.encode or Encode.PAGES
    source, destination = (
        PagingTerms(pin, pages * PAGE, case.chains, "acme", shelf)
        for pin, pages, shelf in zip((encode, Encode.AUTO), case.caches, shelves, strict=True)
    )
    hypervisors, middle = over_tcp(), Middle()
    try:
        async with relays(
            client,
            server,
            hypervisors.ingress,
            hypervisors.egress,
            peer_port=middle.port,
            resume_seconds=30,
            lanes=case.lanes,
            paging=(source, destination),
        ) as pair:
            middle.start(pair.port)
            ends = [await pair.channel(hypervisors) for _ in streams]
            cutting = asyncio.create_task(cut(pair, middle, dice, case.cuts, len(stream)))
            work = [write(near, words, case.writes) for (near, _), words in zip(ends, streams, strict=True)]
            work += [answer(far, b"yes") for _, far in ends]  # type: ignore[misc]
            work += [near.to_end() for near, _ in ends]  # type: ignore[misc]
            heard = (await asyncio.gather(*work))[len(streams) :]
            cutting.cancel()
            with suppress(asyncio.CancelledError):
                await cutting
            assert heard == [*streams, *[b"yes"] * len(streams)]  # type: ignore[comparison-overlap]
            return await pair.ended_well()
    finally:
        await middle.close()
        hypervisors.close()


@settings(max_examples=EXAMPLES, suppress_health_check=[*HealthCheck])
@given(case=CASES)
def test_whatever_is_sent_arrives(case: Case, client_tls: TlsConfig, server_tls: TlsConfig) -> None:
    dice = random.Random(case.seed)

    def any_regime(self: Adapter, _raw_bytes: int) -> Regime:
        del self
        return dice.choice(list(Regime))

    with mock.patch.object(Adapter, "choose", any_regime if case.encode is None else Adapter.choose):
        source, destination = run(carry(case, client_tls, server_tls), SECONDS_MAX)
    assert source.pages == destination.pages
    assert source.digest_blake3 == destination.digest_blake3

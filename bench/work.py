"""What the relays' own duties cost with everything in the cache: the floor under any pair that digests and seals.

A pair hashes each byte twice (BLAKE3 at both ends), seals and opens it once each, and moves it over two hops. Nothing
that keeps these duties can use less CPU than their sum, so the sum says how much of a figure is ours to improve.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.measure import GiB

PIECE_BYTES: Final = 512 * 1024  # fits a core's L2 cache, and is long enough for the calls not to matter
TRIALS: Final = 5  # the best counts: whatever disturbs a trial only ever slows it
PIECES_PER_TRIAL: Final = 256
AEAD_TAG_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Work:
    """CPU-seconds per GiB on one core."""

    blake3_s_per_gib: float
    aes_256_gcm_s_per_gib: float

    @property
    def pair_s_per_gib(self) -> float:
        """A pair's digests and cryptography."""
        return 2 * (self.blake3_s_per_gib + self.aes_256_gcm_s_per_gib)


def measure_work() -> Work:
    """Measure both duties here and now; about a second."""
    data = os.urandom(PIECE_BYTES)
    sealed = bytearray(PIECE_BYTES + AEAD_TAG_BYTES)
    hasher, aead, nonce = blake3(), AESGCM(bytes(32)), bytes(12)
    return Work(
        blake3_s_per_gib=_best(lambda: hasher.update(data)),
        aes_256_gcm_s_per_gib=_best(lambda: aead.encrypt_into(nonce, data, None, sealed)),
    )


def _best(act: Callable[[], object]) -> float:
    """CPU-seconds per GiB of the best trial."""
    trials = []
    for _ in range(TRIALS):
        start_s = time.process_time()
        for _ in range(PIECES_PER_TRIAL):
            act()
        trials.append((time.process_time() - start_s) * GiB / (PIECES_PER_TRIAL * PIECE_BYTES))
    return min(trials)

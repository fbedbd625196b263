"""A corpus of a few small real streams, under the names of the large ones."""

import shutil
from pathlib import Path

from bench.corpus import BUSY, FILES, IDLE_A, IDLE_B, QEMU_A, SUFFIX
from bench.processes import REPOSITORY

VECTORS = REPOSITORY / "tests" / "vectors" / "streams"
SMALL = {
    IDLE_A: "xen417-pv.xlmig-up.zst",
    IDLE_B: "xen417-pv.xlmig-up.zst",
    BUSY: "xen417-pvh.xlmig-up.zst",
    QEMU_A: "q10-plain.qemu.zst",
}


def small_corpus(shared: Path) -> Path:
    """Make `shared`/corpus and return it."""
    corpus = shared / "corpus"
    corpus.mkdir(parents=True)
    for name, vector in SMALL.items():
        shutil.copy(VECTORS / vector, corpus / (FILES[name] + SUFFIX))
    return corpus

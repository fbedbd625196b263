"""The kernels that encoder and decoder run on: compiled where chunking/_kernels.c was built, else numpy."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chunking._kernels import classify, fingerprints, gather_runs, rebuild, scatter_runs

    COMPILED: bool
else:
    from chunking import fallback as chosen

    COMPILED = False
    if os.environ.get("KORORA_KERNELS") != "python":  # a way to see what a machine without a compiler gets
        try:
            from chunking import _kernels as chosen

            COMPILED = True
        except ImportError:
            pass
    classify = chosen.classify
    fingerprints = chosen.fingerprints
    gather_runs = chosen.gather_runs
    rebuild = chosen.rebuild
    scatter_runs = chosen.scatter_runs

__all__ = ["COMPILED", "classify", "fingerprints", "gather_runs", "rebuild", "scatter_runs"]

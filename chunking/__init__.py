"""Pages to frames and back: dedup, delta, compression, page cache, content store. Knows no sockets. Sans-IO."""

import os

# numpy's linear algebra, of which nothing is used here, would start a thread a core that spins for a while.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

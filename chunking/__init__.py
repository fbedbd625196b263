"""Pages to frames and back: dedup, delta, compression, page cache, content store. Knows no sockets. Sans-IO."""

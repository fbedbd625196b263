"""What hypervisors send: incremental, forgiving parsers that say where pages are and never block a byte. Sans-IO."""

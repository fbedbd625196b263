"""Identities, handshake, key schedule, sealed records, receipts. A session is an opaque id to it. Sans-IO."""

"""What a session did, said and signed by both hosts; and each host's log of it, which cannot be rewritten unseen.

    dsse          envelopes: a payload and who signed it
    statement     the payload: what a session did
    merkle        the tree over a log, and proofs within it
    checkpoint    a log's signed head
    log           a host's own log, on its disk
    audit         the same, read through and checked against everything that can be known of it
    peers         other hosts' heads, and whether their logs continue them
    signers       certificates of those who sign

Everything is verified with public keys alone. Nothing that is read from a disk or a peer is believed before.
"""

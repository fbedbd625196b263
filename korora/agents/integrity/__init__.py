"""The integrity analyzer: who may do what to which data of a migration, and in which order. Sans-IO.

Below, a formal state machine: ``levels``, ``state``, ``requests``, ``rules``, ``properties``, ``system``. Above it,
Clark and Wilson's model, enforced: ``items``, ``procedures``, ``order``, ``certification``, ``monitor``.
docs/clark-wilson.md says which statement of the paper is where.
"""

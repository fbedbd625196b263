"""The daemon: one parent that listens and decides, workers that carry the sessions."""

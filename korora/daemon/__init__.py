"""The daemon: one parent that listens and decides, workers that carry the sessions."""

from korora.log import spare_rich

spare_rich()  # before a module of this package imports structlog

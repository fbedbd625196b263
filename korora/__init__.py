"""The program: command line, configuration and wiring. The only place where the rooms below are put together."""

from typing import Final

__version__: Final = "0.1.0"

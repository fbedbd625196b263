"""The program: command line, configuration and wiring. The only place where the rooms below are put together."""

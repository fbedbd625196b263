"""The relay: listeners, sessions, channels, lanes, hand-over. Meets sockets; asyncio is here and in korora only."""

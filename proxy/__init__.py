"""The relay: listeners, sessions, channels, lanes and hand-over. Meets sockets; asyncio lives here and in korora only."""

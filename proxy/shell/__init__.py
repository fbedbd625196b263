"""The relay's one asyncio shell around its sans-IO core."""

"""Whether a machine can go from one host to another, found out before it goes (docs/preflight.md)."""

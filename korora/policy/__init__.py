"""Who may migrate what, where to and when: one TOML file, asked at each point of a session (docs/policy.md)."""

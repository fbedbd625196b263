"""Agents: what examines a migration beside the relay. They meet it through proxy's hooks only."""

"""The coordinator's actor, and the client of it."""

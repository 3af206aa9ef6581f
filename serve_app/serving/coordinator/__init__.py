"""The coordinator's actor, and the way to it."""

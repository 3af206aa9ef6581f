"""Models are built and published here; nothing touches the network."""

from model_fixtures import hub, shared, store

__all__ = ["hub", "shared", "store"]

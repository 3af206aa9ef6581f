"""The store is filled by the real publisher."""

from model_fixtures import hub, shared, store

__all__ = ["hub", "shared", "store"]

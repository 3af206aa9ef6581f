"""Coordination: what the coordinator knows, and what it tells whom."""

"""Placement: which models the coordinator has workers load and evict in the background."""

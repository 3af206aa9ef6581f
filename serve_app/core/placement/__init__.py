"""Placement: the models that the coordinator has workers load and evict in the background."""

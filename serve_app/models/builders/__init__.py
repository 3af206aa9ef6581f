"""Builders: from the name of an architecture to a module, its metadata and its weights."""

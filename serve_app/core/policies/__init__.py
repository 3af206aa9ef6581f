"""Eviction policies: which model is worth its memory."""

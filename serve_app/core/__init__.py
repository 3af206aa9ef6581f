"""Decisions only: no input or output, no clock, no thread, no global randomness."""

"""Replays of request streams in virtual time, over the same ``core`` that serves."""

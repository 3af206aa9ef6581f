"""Experiments on the simulator, each a command or an option of ``edgeserve simulate``."""

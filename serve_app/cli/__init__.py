"""The ``edgeserve`` command."""

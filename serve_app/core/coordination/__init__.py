"""The coordinator's state machine, and a worker's side of its protocol."""

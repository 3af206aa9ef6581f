"""How requests get from routers to workers, and replies back."""

"""How work gets from routers to workers, and results back."""

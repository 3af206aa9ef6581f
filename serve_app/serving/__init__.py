"""Router, worker and coordinator on Ray Serve, and the protocols that they speak."""

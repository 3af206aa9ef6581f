"""The model store on disk, builders, the fast loader, and images as inputs."""

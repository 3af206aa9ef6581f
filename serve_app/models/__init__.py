"""Models in torch: builders, publishing, the loader, and profiling."""

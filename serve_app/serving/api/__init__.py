"""HTTP: endpoints, authorization, errors, metrics, and a fast path for inference."""

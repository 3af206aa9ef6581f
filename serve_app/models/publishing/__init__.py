"""Publishing: from a builder's module to verified weights files and a manifest in the store."""

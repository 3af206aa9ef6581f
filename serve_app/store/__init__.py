"""The model store: published models on disk, without torch, for routers and workers alike."""

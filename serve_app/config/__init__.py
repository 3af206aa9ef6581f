"""Configuration: strict YAML and environment in, frozen settings out; nothing else reads either."""

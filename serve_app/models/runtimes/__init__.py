"""The libraries that run models, each behind the interface of ``base``."""

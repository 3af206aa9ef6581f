"""Routing: where a request runs."""

"""What the handlers of all endpoints have in common."""

from __future__ import annotations

from serve_app.serving.api.request_reader import RequestReader
from serve_app.serving.router.router import Router


class Endpoints:
    """Handlers of requests to one router.

    Args:
        router: knows the models and the workers, and runs inferences.
        reader: reads the requests.
    """

    def __init__(self, router: Router, reader: RequestReader) -> None:
        self._router = router
        self._reader = reader

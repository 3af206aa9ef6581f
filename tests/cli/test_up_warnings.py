"""What ``edgeserve up`` says of models that workers cannot load, whatever applications the deployment has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serve_app.cli.deployment import warn_of_unusable_models
from serve_app.serving.launch.serve_config import Application, ServeFile


class _Location(BaseHTTPRequestHandler):
    """One location without a gateway: nothing else is at the address of the server."""

    def do_GET(self) -> None:
        is_known = self.path in ("/paris/v1/locations", "/v1/locations") and self.path == self.server.known  # type: ignore[attr-defined]
        rows = [{"name": "paris", "unusable": {"broken": "its weights are missing"}}]
        body = json.dumps({"locations": rows} if is_known else {"detail": "nothing here"}).encode()
        self.send_response(200 if is_known else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(params=["/paris", "/"])
def only_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServeFile]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Location) as server:
        server.known = f"{request.param.rstrip('/')}/v1/locations"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        application = Application(name="paris", route_prefix=request.param, edge="edge.yaml", location="paris")
        yield ServeFile(
            path=tmp_path / "local.yaml",
            applications=(application,),
            host="127.0.0.1",
            port=server.server_port,
            proxy_location="EveryNode",
            access_log=False,
        )
        server.shutdown()


def test_a_deployment_without_a_gateway_is_asked_at_a_location(
    only_location: ServeFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = tmp_path / "edge.yaml"
    edge.write_text("{catalog: c.yaml, store: s, locations: {paris: {memory: 64MiB}}}")
    warn_of_unusable_models(only_location, edge)
    assert "model broken cannot be served at paris: its weights are missing" in capsys.readouterr().err

"""A web server with one file, which can break off, be told apart by version, and speak TLS."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator


class FileServer(http.server.ThreadingHTTPServer):
    """Serves ``content`` under every path but ``/absent``, with entity tags, conditions and ranges.

    Attributes:
        content, tag: of the file; the tag changes with the content.
        breaks_after: so many bytes of an answer are sent before the connection breaks; once for each of its items.
        requests: the headers of every request so far.
    """

    daemon_threads = True

    def __init__(self, content: bytes, tag: str | None = '"v1"') -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.tag = content, tag
        self.breaks_after: list[int] = []
        self.requests: list[dict[str, str]] = []
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/models/weights.safetensors"

    def use_tls(self, context: ssl.SSLContext) -> None:
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "https"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that do not trust the certificate break off."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        if self.path == "/absent":
            self.send_error(404)
            return
        content, tag = self.server.content, self.server.tag
        if tag and self.headers.get("If-None-Match") == tag:
            self.send_response(304)
            self.end_headers()
            return
        start = 0
        if tag and self.headers.get("If-Range") == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        end = start + self.server.breaks_after.pop(0) if self.server.breaks_after else len(content)
        self.wfile.write(content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

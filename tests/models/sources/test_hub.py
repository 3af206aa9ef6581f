"""The Hugging Face hub: its library, against a server of this machine that answers as the hub does."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.errors import DownloadFailed, StoreError
from serve_app.models.sources.fetcher import Fetcher

constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.slow

CONTENT = bytes(range(256)) * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "c" * 40
FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        body = CONTENT
        if self.path.startswith("/api/models/org/repo/tree"):
            body = json.dumps(
                [{"type": "file", "path": name, "size": len(CONTENT), "oid": "0" * 40} for name in FILES]
            ).encode()
        elif self.path.startswith("/api/models/org/repo"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "org/repo", "sha": COMMIT, "siblings": siblings}).encode()
        elif self.path.split("?")[0].rpartition("/")[2] not in FILES:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in {"ETag": f'"{DIGEST}"', "X-Repo-Commit": COMMIT, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the library ask this server; it reads ``HF_ENDPOINT`` when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def fetcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fetcher]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serving() as url:
        at(url, monkeypatch)
        yield Fetcher(tmp_path / "downloads")


def test_file_of_the_hub_is_downloaded_once_into_the_cache_of_the_hub(fetcher: Fetcher, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    reference = f"hf://org/repo/model.safetensors#sha256={DIGEST[:12]}"
    assert not fetcher.has(reference)
    path = fetcher.fetch(reference, lambda done, total: progress.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "hub")
    assert progress[-1] == (len(CONTENT), len(CONTENT))
    assert fetcher.has(reference)


def test_repository_is_a_folder_without_pickles(fetcher: Fetcher) -> None:
    assert sorted(path.name for path in fetcher.fetch("hf://org/repo").iterdir()) == list(FILES[:2])


def test_file_that_the_hub_does_not_have_is_named(fetcher: Fetcher) -> None:
    with pytest.raises(DownloadFailed, match=r"cannot download hf://org/repo/absent\.bin: "):
        fetcher.fetch("hf://org/repo/absent.bin")


def test_other_content_than_that_of_the_digest_is_refused(fetcher: Fetcher) -> None:
    with pytest.raises(StoreError, match="has the digest"):
        fetcher.fetch("hf://org/repo/model.safetensors#sha256=0123456789")


def test_file_in_the_cache_will_do_where_the_hub_is_gone(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fetcher.fetch("hf://org/repo/config.json")
    at("http://127.0.0.1:9", monkeypatch)
    assert fetcher.fetch("hf://org/repo/config.json") == kept
    with pytest.raises(DownloadFailed, match="cannot download hf://org/repo/model"):
        fetcher.fetch("hf://org/repo/model.safetensors")

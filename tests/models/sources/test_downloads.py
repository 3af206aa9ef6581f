"""Downloads over HTTP: from a server on this machine that breaks off, changes its file, or is not trusted."""

import hashlib
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer, serving

from serve_app.errors import DownloadFailed, StoreError
from serve_app.models.sources.fetcher import Fetcher

CONTENT = bytes(range(256)) * 10_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer(CONTENT)) as running:
        yield running


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return Fetcher(tmp_path / "downloads")


def test_file_of_a_web_server_is_downloaded_and_reports_its_progress(server: FileServer, fetcher: Fetcher) -> None:
    progress: list[tuple[int, int]] = []
    path = fetcher.fetch(server.url, lambda done, total: progress.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path.name == "weights.safetensors"
    assert progress[0] == (0, len(CONTENT))
    assert progress[-1] == (len(CONTENT), len(CONTENT))


def test_version_that_is_kept_is_not_downloaded_again(server: FileServer, fetcher: Fetcher) -> None:
    first = fetcher.fetch(server.url)
    progress: list[int] = []
    assert fetcher.fetch(server.url, lambda done, total: progress.append(done)) == first
    assert server.requests[-1]["If-None-Match"] == '"v1"'
    assert progress == []


def test_changed_file_is_downloaded_anew(server: FileServer, fetcher: Fetcher) -> None:
    fetcher.fetch(server.url)
    server.content, server.tag = b"changed", '"v2"'
    assert fetcher.fetch(server.url).read_bytes() == b"changed"


def test_file_that_is_kept_will_do_where_its_server_is_gone(fetcher: Fetcher, caplog: pytest.LogCaptureFixture) -> None:
    with serving(FileServer(CONTENT)) as server:
        kept = fetcher.fetch(server.url)
    assert fetcher.has(server.url)
    assert fetcher.fetch(server.url) == kept
    assert "the version that is kept is used" in caplog.text


def test_download_that_breaks_off_goes_on_where_it_stopped(server: FileServer, fetcher: Fetcher) -> None:
    server.breaks_after = [1_000_000]
    assert fetcher.fetch(server.url).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=1000000-"]


def test_download_that_is_given_up_goes_on_in_the_next_run(server: FileServer, tmp_path: Path) -> None:
    server.breaks_after = [500_000, 500_000, 500_000]
    with pytest.raises(DownloadFailed, match=r"broke off 3 times.*publish again, and the download goes on"):
        Fetcher(tmp_path).fetch(server.url)
    assert not Fetcher(tmp_path).has(server.url)
    assert Fetcher(tmp_path).fetch(server.url).read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=1500000-"


def test_download_that_ended_before_it_was_kept_is_made_again(server: FileServer, tmp_path: Path) -> None:
    def killed_at_the_end(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fetcher(tmp_path).fetch(server.url, killed_at_the_end)
    assert Fetcher(tmp_path).fetch(server.url).read_bytes() == CONTENT
    assert "Range" not in server.requests[-1]


def test_file_that_changed_within_a_broken_download_is_downloaded_from_its_start(
    server: FileServer, tmp_path: Path
) -> None:
    server.breaks_after = [100, 0, 0]
    with pytest.raises(DownloadFailed):
        Fetcher(tmp_path).fetch(server.url)
    server.content, server.tag = CONTENT[::-1], '"v2"'
    assert Fetcher(tmp_path).fetch(server.url).read_bytes() == CONTENT[::-1]


def test_file_without_a_version_is_downloaded_from_its_start(fetcher: Fetcher) -> None:
    with serving(FileServer(CONTENT, tag=None)) as server:
        server.breaks_after = [1000]
        assert fetcher.fetch(server.url).read_bytes() == CONTENT
        assert "Range" not in server.requests[-1]


def test_right_digest_needs_no_second_request(server: FileServer, fetcher: Fetcher) -> None:
    reference = f"{server.url}#sha256={DIGEST}"
    assert fetcher.fetch(reference).read_bytes() == CONTENT
    assert fetcher.fetch(f"{server.url}#sha256={DIGEST[:8].upper()}").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_wrong_digest_is_refused_and_not_kept(server: FileServer, fetcher: Fetcher) -> None:
    with pytest.raises(StoreError, match=f"has the digest sha256={DIGEST[:16]}, not 0123456789abcdef"):
        fetcher.fetch(f"{server.url}#sha256=0123456789abcdef")
    assert not fetcher.has(server.url)


def test_file_that_was_kept_is_replaced_where_another_digest_is_wanted(server: FileServer, fetcher: Fetcher) -> None:
    fetcher.fetch(server.url)
    server.content = b"changed under the same tag"
    digest = hashlib.sha256(server.content).hexdigest()
    assert fetcher.fetch(f"{server.url}#sha256={digest}").read_bytes() == server.content


def test_server_that_refuses_is_named_with_its_answer(server: FileServer, fetcher: Fetcher) -> None:
    url = server.url.replace("/models/weights.safetensors", "/absent")
    with pytest.raises(DownloadFailed, match="the server answers 404 Not Found"):
        fetcher.fetch(url)


def test_secrets_of_a_url_are_not_in_messages(fetcher: Fetcher) -> None:
    with pytest.raises(DownloadFailed) as failed:
        fetcher.fetch("http://me:secret@127.0.0.1:9/weights.pth?signature=secret")
    assert "http://127.0.0.1:9/weights.pth" in str(failed.value)
    assert "secret" not in str(failed.value)


def test_two_urls_with_one_name_are_kept_apart(server: FileServer, fetcher: Fetcher) -> None:
    assert fetcher.fetch(server.url) != fetcher.fetch(server.url.replace("/models/", "/others/"))


def test_private_authority_is_trusted_where_it_is_named(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server, context = FileServer(CONTENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.use_tls(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    with serving(server):
        with pytest.raises(DownloadFailed, match=r"certificate.*SSL_CERT_FILE"):
            Fetcher(tmp_path / "downloads").fetch(server.url)
        assert Fetcher(tmp_path / "downloads", ca_bundle=bundle).fetch(server.url).read_bytes() == CONTENT


def test_proxy_of_the_environment_is_used(
    server: FileServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetcher.fetch("http://models.invalid/weights.safetensors").read_bytes() == CONTENT
    assert server.requests[-1]["Host"] == "models.invalid"


def test_bucket_is_read_by_fsspec_and_resumed(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    from serve_app.models.sources.download_cache import DownloadCache
    from serve_app.models.sources.remote_files import FileSystemFile

    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "weights.pth").write_bytes(CONTENT)
    url = f"file://{tmp_path}/bucket/weights.pth"
    assert fsspec.get_filesystem_class("file")
    cache = DownloadCache(tmp_path / "downloads")
    with FileSystemFile(url).open(0, None, None) as download:
        assert download is not None
        version = download.version
    with FileSystemFile(url).open(100, version, None) as download:
        assert download is not None
        assert (download.offset, b"".join(download.chunks)) == (100, CONTENT[100:])
    assert cache.fetch(url, DIGEST, FileSystemFile(url), lambda done, total: None).read_bytes() == CONTENT
    with FileSystemFile(url).open(0, None, version) as download:
        assert download is None


@pytest.mark.parametrize(
    ("url", "extra"), [("s3://bucket/weights.pth", "s3"), ("gs://bucket/weights.pth", "gs"), ("hf://org/repo/f", "hub")]
)
def test_missing_library_is_named_with_its_extra(
    fetcher: Fetcher, url: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("s3fs", "gcsfs", "huggingface_hub"):
        monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(StoreError, match=rf"pip install 'edgeserve\[{extra}\]'"):
        fetcher.fetch(url)

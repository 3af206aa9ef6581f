"""The command line as a user meets it: what it prints, and how it fails."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import yaml
from deployment_support import LOCATIONS, SMALL, run_cli


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    import os

    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}


@pytest.fixture
def photo_file(tmp_path: Path, photo: bytes) -> Path:
    path = tmp_path / "photo.jpg"
    path.write_bytes(photo)
    return path


def check_fails(result, code: int, *words: str) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("edgeserve: ")
    for word in words:
        assert word in result.stderr


def test_infer_prints_labels_and_where_the_model_ran(deployment, photo_file) -> None:
    result = deployment.cli("infer", "squeezenet1_1", str(photo_file), "--url", deployment.url, "--top-k", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("%") == 3
    assert "squeezenet1_1 at " in result.stdout


def test_infer_as_json_names_the_location_that_was_asked(deployment, photo_file) -> None:
    result = deployment.cli(
        "infer", "squeezenet1_1", str(photo_file), "--url", deployment.url, "--location", "tokyo", "--json"
    )
    answer = json.loads(result.stdout)
    assert answer["model"] == "squeezenet1_1"
    assert len(answer["predictions"]) == 5
    assert answer["location"] in LOCATIONS


def test_status_shows_every_location_and_the_coordinator(deployment) -> None:
    shown = deployment.cli("status", "--url", deployment.url).stdout
    content = json.loads(deployment.cli("status", "--url", deployment.url, "--json").stdout)
    assert [row["name"] for row in content["locations"]] == list(LOCATIONS)
    for row in content["locations"]:
        assert row["name"] in shown
        assert row["used_bytes"] == sum(model["bytes"] for model in row["resident"])
        assert row["used_bytes"] <= row["capacity_bytes"]
        assert row["requests"] == row["hits"] + row["joins"] + row["loads"] + row["forwards"]
    assert content["coordinator"]["up"] is True


def test_models_load_and_unload_change_what_a_location_holds(deployment) -> None:
    at = ("--location", "virginia", "--url", deployment.url)
    url = f"{deployment.location('virginia')}/v2/repository/models/mnasnet0_5"
    for action in ("load", "unload"):
        # At once, before any report has told the router.
        assert httpx.post(f"{url}/{action}", timeout=60).status_code == 200
    assert deployment.cli("load", "mnasnet0_5", *at).returncode == 0
    listed = deployment.cli("models", "--url", deployment.url).stdout
    assert all(model in listed for model in SMALL)
    assert deployment.cli("unload", "mnasnet0_5", *at).returncode == 0
    check_fails(deployment.cli("unload", "mnasnet0_5", *at), 1, "mnasnet0_5", "virginia")


def test_what_the_server_refuses_is_one_line_and_exit_code_1(deployment, photo_file) -> None:
    check_fails(deployment.cli("infer", "unknown", str(photo_file), "--url", deployment.url), 1, "unknown")


def test_a_second_up_finds_everything_as_configured(deployment) -> None:
    result = deployment.cli("up", str(deployment.folder / "local.yaml"), "--detach", "--no-compile")
    assert result.returncode == 0, result.stderr
    assert "everything is as configured" in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", [("status",), ("models",), ("load", "x", "--location", "y")])
def test_commands_say_so_when_nothing_answers(environment, command) -> None:
    check_fails(run_cli((*command, "--url", "http://127.0.0.1:1"), environment), 1, "edgeserve up")


def test_down_says_so_when_nothing_is_up(environment) -> None:
    check_fails(run_cli(("down",), environment), 1, "nothing is up")


@pytest.mark.parametrize("command", [("infer",), ("nonsense",), ("status", "--nonsense"), ("infer", "m", "no.jpg")])
def test_bad_usage_is_one_line_and_exit_code_2(environment, command) -> None:
    check_fails(run_cli(command, environment), 2, "--help")


def test_help_names_every_command(environment) -> None:
    shown = run_cli(("--help",), environment).stdout
    for command in ("up", "down", "status", "init", "infer", "models", "publish", "load", "unload"):
        assert f"\n  {command} " in shown


def test_a_wrong_key_in_a_configuration_names_file_key_and_keys(environment, tmp_path) -> None:
    edge = tmp_path / "edge.yaml"
    edge.write_text(yaml.safe_dump({"locations": {"paris": {"memroy": "1GiB"}}}))
    check_fails(run_cli(("publish", "--edge", str(edge)), environment), 2, str(edge), "memroy", "memory")


def configure(folder: Path, port: int = 8000, **application) -> Path:
    (folder / "catalog.yaml").write_text(yaml.safe_dump({"models": {"tiny": _TINY}}))
    (folder / "edge.yaml").write_text(yaml.safe_dump({"store": "store", "locations": {"paris": {"memory": "64MiB"}}}))
    paris = {
        "name": "paris",
        "route_prefix": "/paris",
        "import_path": "serve_app.serving.app:build",
        "args": {"location": "paris", "edge": str(folder / "edge.yaml")},
    }
    local = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [{**paris, **application}]}
    path = folder / "local.yaml"
    path.write_text(yaml.safe_dump(local))
    return path


def test_up_says_which_port_is_taken(environment, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_cli(("up", str(configure(tmp_path, port))), environment)
    assert result.returncode == 1
    assert str(port) in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"args": {"locaton": "paris"}}, "locaton"),
        ({"name": "lima"}, "lima"),
        ({"route_prefix": "paris"}, "route_prefix"),
        ({"import_path": "other:app"}, "import_path"),
        ({"deployments": []}, "deployments"),
    ],
)
def test_up_refuses_what_it_would_not_honor(environment, tmp_path, change, word) -> None:
    check_fails(run_cli(("up", str(configure(tmp_path, **change))), environment), 2, word)


@pytest.mark.parametrize("port", [0, 99999])
def test_up_refuses_a_port_that_is_none(environment, tmp_path, port) -> None:
    check_fails(run_cli(("up", str(configure(tmp_path, port))), environment), 2, "port")


def test_up_refuses_to_start_what_it_could_not_record(environment, tmp_path) -> None:
    blocked = {**environment, "XDG_CACHE_HOME": str(configure(tmp_path))}
    check_fails(run_cli(("up", str(tmp_path / "local.yaml")), blocked), 1, "XDG_CACHE_HOME")


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is not EdgeServe."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            """Into no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_answer_of_another_server_is_one_line(environment, other_server) -> None:
    check_fails(run_cli(("status", "--url", other_server), environment), 1, "not EdgeServe")


def test_the_users_proxy_is_not_used_for_servers_on_this_machine(deployment) -> None:
    proxied = {**deployment.environment, "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    assert run_cli(("status", "--url", deployment.url + "/"), proxied).returncode == 0


_TINY = {"builder": "torchvision:squeezenet1_1", "weights": "random:1"}

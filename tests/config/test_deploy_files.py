import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from serve_app.config.catalog import load_catalog
from serve_app.config.edge import load_edge
from serve_app.config.yaml_files import load_yaml
from serve_app.core.task import TASK_KINDS
from serve_app.serving.launch.local_ray import FAST_INGRESS
from serve_app.serving.launch.serve_config import read_serve_file
from serve_app.serving.metrics import METRICS

ROOT = Path(__file__).parents[2]
SERVE_FILES = ["deploy/local.yaml", "deploy/cluster.yaml"]


def test_the_edge_catalog_has_a_model_of_every_task() -> None:
    entries = load_catalog(Path("deploy/edge-catalog.yaml"))
    named = {entry.task.kind for entry in entries if entry.task is not None}
    # Those of the detector and of the segmenter of torchvision come with their builder.
    assert named | {"detection"} == set(TASK_KINDS)
    assert {"ssdlite", "lraspp"} <= {entry.model_id for entry in entries}


@pytest.fixture(autouse=True)
def top_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files name each other by paths from there."""
    monkeypatch.chdir(ROOT)


def rules() -> list[dict[str, Any]]:
    return [rule for group in load_yaml(ROOT / "deploy/prometheus/rules.yml")["groups"] for rule in group["rules"]]


def metrics() -> dict[str, set[str]]:
    """Labels by metric."""
    return {name: set(metric.labels) for name, metric in METRICS.items()}


def cluster() -> dict[str, Any]:
    content: dict[str, Any] = load_yaml(ROOT / "cluster.yaml")
    return content


def aws_cluster() -> dict[str, Any]:
    """``cluster.yaml`` with its commented part in place."""
    _, comments = (ROOT / "cluster.yaml").read_text().split("# On AWS", 1)
    start = comments.index("# provider:")
    lines = [line.removeprefix("#").removeprefix(" ") for line in comments[start:].splitlines()]
    return {**cluster(), **yaml.safe_load("\n".join(lines))}


def outliving_cluster() -> dict[str, Any]:
    """``cluster.yaml`` with what lets the locations outlive the head in place."""
    lines = (ROOT / "cluster.yaml").read_text().splitlines()
    start = lines.index("# file_mounts:")
    block = lines[start : lines.index("#", start)]
    return {**cluster(), **yaml.safe_load("\n".join(line.removeprefix("# ") for line in block))}


def validate(content: dict[str, Any]) -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(content)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", SERVE_FILES)
def test_serve_file_names_an_edge_file_and_one_application_for_each_of_its_locations(name: str) -> None:
    serve_file = read_serve_file(Path(name))
    edge = load_edge(serve_file.edge_path())
    assert load_catalog(edge.catalog)
    assert set(serve_file.locations) == set(edge.locations)
    for app in serve_file.applications:
        location = app.location
        assert (app.name, app.route_prefix) == ((location, f"/{location}") if location else ("gateway", "/"))


def test_locations_of_the_cluster_are_pinned_and_linked() -> None:
    edge = load_edge(Path("deploy/cluster-edge.yaml"))
    assert all(location.pin_to_nodes for location in edge.locations.values())
    assert len(edge.core_links()) == 3
    assert all(0.02 <= link.rtt_s <= 0.15 for link in edge.core_links().values())


def test_every_host_of_the_cluster_takes_requests() -> None:
    serve_file = read_serve_file(Path("deploy/cluster.yaml"))
    assert (serve_file.host, serve_file.proxy_location) == ("0.0.0.0", "EveryNode")
    assert not serve_file.access_log


def test_cluster_file_is_valid_for_ray() -> None:
    prepared = validate(cluster())
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 3


def test_commented_aws_variant_is_valid_for_ray_and_has_every_location() -> None:
    content = aws_cluster()
    assert content["provider"]["type"] == "aws"
    validate_config({**content, "cluster_synced_files": []})
    labels = [node["labels"]["location"] for node in content["available_node_types"].values() if "labels" in node]
    assert labels == list(load_edge(Path("deploy/cluster-edge.yaml")).locations)


def test_commented_variant_with_a_store_is_valid_for_ray_and_hands_it_the_password(tmp_path: Path) -> None:
    content = outliving_cluster()
    validate(content)
    assert content["file_mounts"].items() > cluster()["file_mounts"].items()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "redis_password").write_text("secret\n")
    command = content["head_start_ray_commands"][1]
    assert "RAY_REDIS_ADDRESS=192.0.2.14:6379 RAY_external_storage_namespace=edgeserve ray start" in command
    options = run_on_host(tmp_path, "192.0.2.10", command).split()
    assert {"--head", "--port=6379", "--redis-username=default", "--redis-password=secret"} < set(options)


def test_each_host_finds_its_own_location(tmp_path: Path) -> None:
    addresses = cluster()["provider"]["worker_ips"]
    found = [started(tmp_path, f"172.17.0.1 {address} fd00::1") for address in addresses]
    assert [line.split()[:2] for line in found] == [["start", "--address=192.0.2.10:6379"]] * 3
    assert all(f"--node-ip-address={address} " in line for address, line in zip(addresses, found, strict=True))
    labels = [line.split("--labels=")[1].strip() for line in found]
    assert labels == [f"location={name}" for name in load_edge(Path("deploy/cluster-edge.yaml")).locations]


def test_a_host_without_a_location_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        started(tmp_path, "198.51.100.7")
    assert "location: is unknown: add the address of this host" in failed.value.stderr


def started(home: Path, addresses: str) -> str:
    """What the start command of a worker with these addresses hands to ``ray``."""
    return run_on_host(home, addresses, cluster()["worker_start_ray_commands"][1])


def run_on_host(home: Path, addresses: str, command: str) -> str:
    """Output of a command on a host where the environment is set up, and ``ray`` prints what it was given."""
    binaries = home / "edgeserve-env" / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    (home / "edgeserve").mkdir(exist_ok=True)
    (binaries / "activate").write_text(f"PATH={binaries}:$PATH\n")
    for name, script in {"ray": 'echo "$@"', "hostname": f"echo {addresses}"}.items():
        (binaries / name).write_text(f"#!/bin/sh\n{script}\n")
        (binaries / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"{cluster()['setup_commands'][0]}; {command}"],
        env={"HOME": str(home), "PATH": f"{binaries}:/usr/bin:/bin", "RAY_HEAD_IP": "192.0.2.10"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_ray_is_started_with_the_token_and_the_fast_ingress(tmp_path: Path) -> None:
    variables = run_on_host(tmp_path, "192.0.2.11", ". ~/edgeserve.env && env").splitlines()
    assert {"RAY_AUTH_MODE=token", "RAY_enable_autoscaler_v2=0"} <= set(variables)
    wanted = {f"{name}={value}" for name, value in FAST_INGRESS.items() if name.startswith("RAY_SERVE_")}
    assert wanted <= set(variables)
    content = cluster()
    commands = content["head_start_ray_commands"] + content["worker_start_ray_commands"]
    assert all(". ~/edgeserve.env &&" in command for command in commands)


def test_prometheus_reads_the_file_that_ray_keeps_and_rules_that_exist() -> None:
    folder = ROOT / "deploy/prometheus"
    content = load_yaml(folder / "prometheus.yml")
    assert all((folder / name).is_file() for name in content["rule_files"])
    assert "ray/prom_metrics_service_discovery.json" in str(content["scrape_configs"][0]["file_sd_configs"])


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule.get("alert"))
def test_rule_uses_metrics_and_labels_that_exist(rule: dict[str, Any]) -> None:
    known = metrics()
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = set(re.findall(r"\bray_(edgeserve_\w+)", rule["expr"]))
    base = {name if name in known else re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert base <= known.keys()
    assert base or any(name in rule["expr"] for name in recorded)
    matched = {label for some in re.findall(r"{(.*?)}", rule["expr"]) for label in re.findall(r"(\w+)[=!]", some)}
    grouped = {label for some in re.findall(r"(?:by|on) \((.*?)\)", rule["expr"]) for label in some.split(", ")}
    for name in base:
        assert matched | grouped <= known[name] | {"le"}


def test_metrics_are_found_in_the_source() -> None:
    assert metrics()["edgeserve_requests_total"] == {"location", "model", "outcome", "code"}
    assert metrics()["edgeserve_cache_used_bytes"] == {"location", "replica"}

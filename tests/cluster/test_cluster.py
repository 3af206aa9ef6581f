"""``ray up cluster.yaml`` on four hosts, as its comments say, and what the locations do then."""

from __future__ import annotations

import json
import re

import httpx
import pytest
from cluster_support import (
    ADDRESSES,
    HEAD,
    KEY,
    LOCATIONS,
    MODELS,
    PAYLOAD_BYTES,
    ROOT,
    USER,
    Cluster,
    binary_request,
    infer,
)

import loadtests.testbed

MODEL = MODELS[0]
REQUESTS = 8
#: Sends requests from inside a host to its own address, and prints how each was served and where.
CLIENT = """
import json, sys, urllib.request
url, body, headers, count = sys.argv[1], open(sys.argv[2], "rb").read(), json.loads(sys.argv[3]), int(sys.argv[4])
for _ in range(count):
    request = urllib.request.Request(url, body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()
        print(answer.headers["X-EdgeServe-Outcome"], answer.headers["X-EdgeServe-Location"])
"""


def traffic(cluster: Cluster) -> dict[str, tuple[int, int]]:
    """Bytes received and sent by each host so far."""
    return {host.name: (host.received_bytes(), host.sent_bytes()) for host in cluster.testbed.hosts.values()}


def payloads_since(cluster: Cluster, before: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """How many payloads fit into what each host has received and sent since then."""
    now = traffic(cluster)
    return {
        name: (
            (now[name][0] - before[name][0]) // PAYLOAD_BYTES,
            (now[name][1] - before[name][1]) // PAYLOAD_BYTES,
        )
        for name in now
    }


def make_resident(cluster: Cluster, location: str) -> None:
    for _ in range(5):
        if infer(cluster.url(location, at=location), MODEL).headers["X-EdgeServe-Outcome"] == "hit":
            return
    raise AssertionError(f"{MODEL} does not stay at {location}")


def test_the_cluster_differs_from_cluster_yaml_in_addresses_and_key_alone(ray_cluster: Cluster) -> None:
    assert loadtests.testbed.disk.USER == USER
    assert f"ssh_user: {USER}\n" in (ROOT / "cluster.yaml").read_text()
    used = (ray_cluster.project / "cluster.yaml").read_text().replace(str(ray_cluster.testbed.key), KEY)
    for host, address in ADDRESSES.items():
        used = re.sub(rf"\b{re.escape(ray_cluster.host(host).address)}\b", address, used)
    assert used == (ROOT / "cluster.yaml").read_text()


def test_every_host_has_installed_the_wheel_and_requires_the_token(ray_cluster: Cluster) -> None:
    for host in ray_cluster.testbed.hosts.values():
        paths = host.run("bash", "-c", ". ~/edgeserve.env && command -v edgeserve python ray").stdout.split()
        assert all(path.startswith(f"{ray_cluster.testbed.home}/edgeserve-env/bin/") for path in paths)
        package = 'python -c "import serve_app; print(serve_app.__file__)"'
        file = host.run("bash", "-c", f". ~/edgeserve.env && {package}").stdout
        assert file.startswith(f"{ray_cluster.testbed.home}/edgeserve-env/lib/")
    stranger = (
        f". ~/edgeserve.env && RAY_AUTH_TOKEN=stranger ray status --address {ray_cluster.host(HEAD).address}:6379"
    )
    refused = ray_cluster.host("tokyo").run("bash", "-c", stranger, check=False)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_request_to_a_locations_own_address_is_handled_there(cluster: Cluster, location: str) -> None:
    for model in MODELS:
        response = infer(cluster.url(location, at=location), model)
        assert response.headers["X-EdgeServe-Location"] == location


def test_routers_and_workers_run_on_the_hosts_of_their_location(cluster: Cluster) -> None:
    for name, host in cluster.testbed.hosts.items():
        running = set(re.findall(r"ray::ServeReplica:(\w+):(\w+)", host.run("ps", "ax", "-o", "args=").stdout))
        expected = {("gateway", "Router")} if name == HEAD else {(name, "Router"), (name, "Worker")}
        assert running - {("gateway", "Router")} == expected - {("gateway", "Router")}


def test_every_host_answers_for_every_location_and_for_all_of_them(cluster: Cluster) -> None:
    for name, host in cluster.testbed.hosts.items():
        for location in LOCATIONS:
            response = infer(cluster.url(location, at=name), MODEL)
            assert response.headers["X-EdgeServe-Location"] == location
        status = httpx.get(f"http://{host.address}:8000/v1/locations", timeout=30).raise_for_status().json()
        assert [row["name"] for row in status["locations"]] == list(LOCATIONS)
        assert status["coordinator"]["up"]


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_hit_from_the_same_host_leaves_nothing_on_the_network(cluster: Cluster, location: str) -> None:
    make_resident(cluster, location)
    body, headers = binary_request()
    host = cluster.host(location)
    # A home is a folder of the machine, so the body reaches the host without its network.
    (host.folder / "home" / "body").write_bytes(body)
    url = f"{cluster.url(location, at=location)}/v2/models/{MODEL}/infer"
    before = traffic(cluster)
    served = host.run("python3", "-c", CLIENT, url, "body", json.dumps(headers), str(REQUESTS), timeout_s=120).stdout
    assert served.splitlines() == [f"hit {location}"] * REQUESTS
    assert payloads_since(cluster, before) == dict.fromkeys(cluster.testbed.hosts, (0, 0))


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_hit_from_outside_reaches_no_other_host(cluster: Cluster, location: str) -> None:
    make_resident(cluster, location)
    content = binary_request()
    before = traffic(cluster)
    for _ in range(REQUESTS):
        response = infer(cluster.url(location, at=location), MODEL, content)
        assert response.headers["X-EdgeServe-Outcome"] == "hit"
        assert response.headers["X-EdgeServe-Location"] == location
    expected = {name: (REQUESTS if name == location else 0, 0) for name in cluster.testbed.hosts}
    assert payloads_since(cluster, before) == expected


def test_a_request_sent_to_another_host_crosses_the_network(cluster: Cluster) -> None:
    """What the two tests above would see if hits left their host."""
    before = traffic(cluster)
    for _ in range(REQUESTS):
        infer(cluster.url("tokyo", at="paris"), MODEL)
    seen = payloads_since(cluster, before)
    assert seen["paris"][1] >= REQUESTS
    assert seen["tokyo"][0] >= REQUESTS


def test_serve_deploy_does_the_same_as_edgeserve_up(cluster: Cluster) -> None:
    cluster.exec("edgeserve down")
    assert not any(cluster.is_ready(location) for location in LOCATIONS)
    cluster.exec("cd ~/edgeserve && serve deploy deploy/cluster.yaml")
    cluster.await_locations()
    for location in LOCATIONS:
        assert infer(cluster.url(location, at=location), MODEL).headers["X-EdgeServe-Location"] == location

"""Hosts of their own for these tests, and on them one cluster as ``ray up cluster.yaml`` makes it.

For one module, and not for the session: what runs on them would slow down all other tests.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_support import HEAD, LOCATIONS, Cluster, client_sockets, left_running, start, until

from loadtests.testbed import Testbed
from loadtests.testbed.machine import missing

_GIB = 1 << 30
#: Without its head, Ray on a host gives up after a minute.
_DOWN_S = 180.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacks = missing(memory=True) or (None if shutil.which("rsync") else "ray up needs rsync")
    for item in items:
        if lacks and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=lacks))


@pytest.fixture(scope="module")
def testbed() -> Iterator[Testbed]:
    # What is not imported need not be compiled, four times.
    os.environ["PIP_NO_COMPILE"] = "1"
    with Testbed.up((HEAD, *LOCATIONS), name=f"c{os.getpid()}", memory_bytes=5 * _GIB) as hosts:
        del os.environ["PIP_NO_COMPILE"]
        yield hosts


@pytest.fixture(scope="module")
def ray_cluster(testbed: Testbed) -> Iterator[Cluster]:
    """Ray on every host, started by ``ray up`` and ended by ``ray down``."""
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    try:
        cluster = start(testbed, folder)
        yield cluster
        said = cluster.ray("down", "cluster.yaml", "--yes")
        until(
            "ray down has ended everything",
            lambda: not left_running(testbed),
            _DOWN_S,
            lambda: f"{left_running(testbed)}\nray down said:\n{said}",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(client_sockets(testbed), ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(ray_cluster: Cluster) -> Cluster:
    """The locations as ``edgeserve up`` deploys them."""
    ray_cluster.exec("cd ~/edgeserve && edgeserve up deploy/cluster.yaml --detach")
    return ray_cluster

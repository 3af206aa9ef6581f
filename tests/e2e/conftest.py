"""One real deployment for all serving tests: ``edgeserve up`` with small models, stopped by ``edgeserve down``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployment_support import SEED, Deployment, encoded, family_of, free_port, run_cli, write_configuration
from PIL import Image


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    # Ray's sockets live below its folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    port = free_port()
    write_configuration(folder, port)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDGESERVE_"))},
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    # Compiled before, so that nothing goes on in the background while tests run.
    published = run_cli(("publish", "--edge", str(folder / "edge.yaml")), environment)
    started = run_cli(("up", str(folder / "local.yaml"), "--detach", "--no-compile"), environment)
    try:
        assert published.returncode == 0, published.stderr
        assert started.returncode == 0, f"edgeserve up failed:\n{started.stdout}\n{started.stderr}"
        running = json.loads((folder / "cache" / "edgeserve" / "up.json").read_text())
        yield Deployment(f"http://127.0.0.1:{port}", folder, environment, running["address"])
    finally:
        stopped = run_cli(("down",), environment)
        left = [f"{process.pid} {process.name()}" for process in family_of(folder)]
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.returncode == 0, stopped.stderr
    assert not left, f"edgeserve down left {left}"


@pytest.fixture(scope="session")
def ray_cluster(deployment: Deployment) -> Iterator[Any]:
    """A connection to the deployment's Ray, for tests that kill parts of it."""
    import ray

    ray.init(address=deployment.ray_address, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def photo() -> bytes:
    pixels = np.random.default_rng(SEED).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC), "JPEG")


@pytest.fixture(scope="session")
def direct() -> Callable[[str], Any]:
    """A model as torchvision itself builds it from the seed of the catalog."""
    import torch

    from serve_app.models.torchvision_compat import import_torchvision

    built: dict[str, Any] = {}

    def build(model_id: str) -> Any:
        if model_id not in built:
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                built[model_id] = getattr(import_torchvision().models, model_id)(weights=None).eval()
        return built[model_id]

    return build

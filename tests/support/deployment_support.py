"""A small deployment as its users see it: what is configured, and how tests look at it."""

from __future__ import annotations

import importlib.util
import io
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedder_model
import httpx
import psutil
import tagger_model
import yaml
from PIL import Image

LOCATIONS = ("paris", "tokyo", "virginia")
SEED = 7
#: Fit by twos or threads into a location's memory.
SMALL = (
    "squeezenet1_0",
    "squeezenet1_1",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
)
PINNED = "shufflenet_v2_x0_5"
#: Fits only where memory is ample.
LARGE = "resnet18"
TOO_LARGE = "resnet34"
#: Two locations hold it without requests; one location preloads the other one.
GUARDED, LISTED = "guarded", "listed"
#: No image classifier.
TAGGER = "tagger"
#: Takes texts.
EMBEDDER = "embedder"
#: A quarter is workspace, and a fifth may be held back for what the process grows by: the rest is too small for the
#: large model at two of them.
MEMORY = {"paris": "56MiB", "tokyo": "56MiB", "virginia": "90MiB"}


@dataclass(frozen=True)
class Deployment:
    """A running EdgeServe, as its users see it."""

    url: str
    folder: Path
    environment: dict[str, str]
    ray_address: str

    def location(self, name: str) -> str:
        return f"{self.url}/{name}"

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_cli(arguments, self.environment)

    def processes(self, title: str) -> list[int]:
        """The processes of this deployment whose title begins like that."""
        return [process.pid for process in family_of(self.folder) if " ".join(process.cmdline()).startswith(title)]

    def status(self) -> dict[str, Any]:
        content = httpx.get(f"{self.url}/v1/locations", timeout=30).raise_for_status().json()
        return {row["name"]: row for row in content["locations"]} | {"coordinator": content["coordinator"]}


def run_cli(arguments: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_configuration(folder: Path, port: int) -> None:
    models: dict[str, dict[str, Any]] = {
        name: {"builder": f"torchvision:{name}", "weights": f"random:{SEED}", "family": "imagenet"}
        for name in (*SMALL, LARGE, TOO_LARGE)
    }
    models[PINNED]["pinned"] = True
    # Small images need little workspace: these fit beside others at every location, however it was measured.
    size = {"resize_px": 64, "crop_px": 64}
    tiny = {"builder": "torchvision:squeezenet1_1", "weights": f"random:{SEED}", "input": size}
    models |= {GUARDED: {**tiny, "min_copies": 2}, LISTED: tiny}
    tagger_model.write(folder / "tagger.onnx")
    models[TAGGER] = {"builder": "onnx:tagger.onnx", **tagger_model.ENTRY}
    if importlib.util.find_spec("tokenizers") is not None:
        embedder_model.write(folder)
        models[EMBEDDER] = {"builder": "onnx:embedder.onnx", **embedder_model.ENTRY}
    edge = {
        "catalog": "catalog.yaml",
        "store": "store",
        "locations": {name: {"memory": MEMORY[name]} for name in LOCATIONS}
        | {"tokyo": {"memory": MEMORY["tokyo"], "preload": [LISTED]}},
        "default_link": {"rtt": "100us"},
        "coordinator": {"stale_after": "1s"},
        "limits": {"body": "6MiB", "image_pixels": 2_000_000, "batch": 4},
    }
    applications = [
        {
            "name": name or "gateway",
            "route_prefix": f"/{name}",
            "import_path": "serve_app.serving.app:build",
            "args": {"edge": str(folder / "edge.yaml"), **({"location": name} if name else {})},
        }
        for name in (*LOCATIONS, "")
    ]
    local = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": applications,
    }
    for name, content in (("catalog", {"models": models}), ("edge", edge), ("local", local)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def family_of(folder: Path) -> list[psutil.Process]:
    """Every process that the deployment in ``folder`` has brought forth."""
    family = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                family.append(process)
        except psutil.Error:
            continue
    return family


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""EdgeServe on this machine for a benchmark: its own Ray folder, port, state and store, stopped at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"

_PUBLISH_S, _UP_S, _DOWN_S = 900.0, 240.0, 90.0


class StartError(Exception):
    """Something that is to be measured did not start."""


@dataclass(frozen=True, slots=True)
class Here:
    """A running EdgeServe with one address per location below ``http://HOST:port``."""

    port: int
    folder: Path
    environment: Mapping[str, str]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def clean_environment(folder: Path) -> dict[str, str]:
    """This process's environment, but for what would lead to another Ray or another EdgeServe."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EDGESERVE_"))}
    return {
        **kept,
        "RAY_TMPDIR": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH")))),
    }


@contextmanager
def edgeserve(
    models: Mapping[str, Mapping[str, Any]],
    locations: Mapping[str, Mapping[str, Any]],
    *,
    edge: Mapping[str, Any] | None = None,
    store: Path | None = None,
    prepare: Callable[[Path], object] = lambda store: None,
) -> Iterator[Here]:
    """EdgeServe from beginning to end.

    Args:
        models: the catalog.
        locations: as in ``edge.yaml``.
        edge: more of ``edge.yaml``.
        store: where models are published already; by default they are published into a store of its own.
        prepare: is called with the store once all is published, before anything starts.

    Raises:
        StartError: it did not come up.
    """
    # Ray's sockets live below the folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    here = Here(free_port(), folder, clean_environment(folder))
    _configure(here, models, locations, {"store": str(store or folder / "store"), **(edge or {})})
    try:
        # Compiled before, so that nothing goes on in the background while something is measured.
        _run(here, "publish", "--edge", str(folder / "edge.yaml"), timeout_s=_PUBLISH_S)
        prepare(store or folder / "store")
        _run(here, "up", str(folder / "local.yaml"), "--detach", "--no-compile", timeout_s=_UP_S)
        yield here
    finally:
        try:
            _run(here, "down", timeout_s=_DOWN_S)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _configure(here: Here, models: Mapping[str, Any], locations: Mapping[str, Any], edge: Mapping[str, Any]) -> None:
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "serve_app.serving.app:build",
            "args": {"edge": str(here.folder / "edge.yaml"), "location": name},
        }
        for name in locations
    ]
    local = {
        "http_options": {"host": HOST, "port": here.port},
        "logging_config": {"enable_access_log": False},
        "applications": applications,
    }
    written = {
        "catalog": {"models": {name: dict(model) for name, model in models.items()}},
        "edge": {"catalog": "catalog.yaml", "locations": {name: dict(at) for name, at in locations.items()}, **edge},
        "local": local,
    }
    for name, content in written.items():
        (here.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def _run(here: Here, *arguments: str, timeout_s: float) -> None:
    command = [sys.executable, "-m", "serve_app", *arguments]
    try:
        done = subprocess.run(
            command, env=here.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartError(f"edgeserve {arguments[0]} took longer than {timeout_s:.0f} s") from None
    if done.returncode:
        raise StartError(f"edgeserve {arguments[0]} failed: {' '.join((done.stdout + done.stderr).split())[-600:]}")

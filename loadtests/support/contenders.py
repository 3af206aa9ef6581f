"""Other servers of a trivial model, to hold ours against: MLServer, and Ray Serve as it is by default."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import orjson

from loadtests.support import plain_serve
from loadtests.support.local_deployment import HOST, ROOT, StartError, clean_environment, free_port
from loadtests.support.wire import binary_infer, request

Shape = tuple[int, ...]
MLSERVER = "mlserver==1.7.*"
#: MLServer imports a copy of it in an environment of its own.
MLSERVER_MODEL = Path(__file__).with_name("mlserver_tiny.py")
_INSTALL_S, _READY_S, _STOP_S = 420.0, 90.0, 30.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that answers, and the request for one tensor of each shape that is measured."""

    name: str
    port: int
    requests: Mapping[Shape, bytes]


def ours(port: int, models: Mapping[Shape, str]) -> Contender:
    """EdgeServe at ``port``; ``models`` are paths by the shape that they take."""
    requests = {}
    for shape, path in models.items():
        body, headers = binary_infer(shape, "input")
        requests[shape] = request(HOST, port, f"{path}/infer", body, headers)
    return Contender("edgeserve", port, requests)


@contextmanager
def mlserver(shapes: Sequence[Shape]) -> Iterator[Contender]:
    """MLServer without worker processes, logs and metrics.

    It does not know the binary tensor extension; the fastest that its REST takes is one base64 string for a large
    tensor, and JSON numbers for a small one.

    Raises:
        StartError: it cannot be installed, or did not start.
    """
    python = _mlserver_python()
    http, grpc, metrics = (free_port() for _ in range(3))
    with tempfile.TemporaryDirectory(prefix="es-") as folder:
        settings = {
            "host": HOST, "http_port": http, "grpc_port": grpc, "metrics_port": metrics, "metrics_endpoint": None,
            "debug": False, "parallel_workers": 0, "root_path": "",
        }  # fmt: skip
        (Path(folder) / "settings.json").write_bytes(orjson.dumps(settings))
        model = {"name": "tiny", "implementation": "mlserver_tiny.FirstTen"}
        (Path(folder) / "model-settings.json").write_bytes(orjson.dumps(model))
        shutil.copy(MLSERVER_MODEL, folder)
        log = Path(folder) / "log"
        command = [str(python.parent / "mlserver"), "start", folder]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment, cwd=folder
            )
        try:
            _await(f"http://{HOST}:{http}/v2/models/tiny/ready", process, "MLServer", log)
            path = "/v2/models/tiny/infer"
            headers = {"Content-Type": "application/json"}
            requests = {shape: request(HOST, http, path, _mlserver_body(shape), headers) for shape in shapes}
            yield Contender("mlserver", http, requests)
        finally:
            _stop(process)


@contextmanager
def default_serve(shapes: Sequence[Shape]) -> Iterator[Contender]:
    """Ray Serve with its defaults: the Python proxy, an ingress, and a second deployment behind its handle.

    Raises:
        StartError: it did not start.
    """
    port = free_port()
    # Ray's sockets live below the folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="es-"))
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", plain_serve.__name__, str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=clean_environment(folder), cwd=ROOT,
        )  # fmt: skip
    try:
        _await(f"http://{HOST}:{port}/-/healthz", process, "Ray Serve", log)
        assert process.stdout is not None
        # Until the application itself is there.
        process.stdout.readline()
        requests = {}
        for shape in shapes:
            body = np.arange(np.prod(shape), dtype="<f4").tobytes()
            requests[shape] = request(HOST, port, "/", body, {"Content-Type": "application/octet-stream"})
        yield Contender("default serve", port, requests)
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_STOP_S)
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _mlserver_body(shape: Shape) -> bytes:
    data = np.arange(np.prod(shape), dtype="<f4")
    if len(data) > 100:
        tensor = {
            "name": "input",
            "shape": [1],
            "datatype": "BYTES",
            "data": [base64.b64encode(data.tobytes()).decode()],
        }
    else:
        tensor = {"name": "input", "shape": shape, "datatype": "FP32", "data": data.tolist()}
    return orjson.dumps({"inputs": [tensor]})


def _mlserver_python() -> Path:
    """The Python of an environment with MLServer, made at the first call and kept in the user's cache.

    Raises:
        StartError: it cannot be installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "edgeserve-loadtests" / "mlserver-1.7"
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, capture_output=True, timeout=_INSTALL_S)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", MLSERVER]
        subprocess.run(install, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        last = str(detail).strip().splitlines()[-1:] or [type(error).__name__]
        raise StartError(f"{MLSERVER} cannot be installed into {folder}: {last[0]}") from None
    (folder / "complete").touch()
    return python


def _await(url: str, process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    deadline_s = time.monotonic() + _READY_S
    with httpx.Client(timeout=2.0, trust_env=False) as http:
        while time.monotonic() < deadline_s and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if http.get(url).is_success:
                    return
            time.sleep(0.2)
    said = " ".join(log.read_text(errors="replace").split())[-400:]
    raise StartError(f"{name} did not get ready within {_READY_S:.0f} s: {said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

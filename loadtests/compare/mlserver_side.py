"""MLServer with its repository API, under a client that keeps its models within memory."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from loadtests.compare.http import Http, Reply, RequestFailed
from loadtests.compare.lru import LruBooks
from loadtests.compare.processes import Memory, Processes, SideFailed, free_ports
from loadtests.compare.zoo import Zoo

#: MLServer 1.7 does not start workers with newer ones of uvloop.
_MLSERVER = ("mlserver~=1.7.0", "uvloop<0.22")
_INSTALL_S = 900.0
_UP_S = 60.0
#: In the virtual environment once everything is installed.
_COMPLETE = "complete"


class MLServer:
    """One inference worker, which is what MLServer has by default, and all models to be loaded on demand."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo
        self._port, self._grpc_port, self._metrics_port = free_ports(3)
        self._processes = Processes("mlserver")
        self._held = HeldModels(LruBooks(zoo.memory_bytes, zoo.sizes))

    def start(self) -> None:
        """Make the virtual environment unless there is one, and start; raises ``SideFailed``."""
        python = environment(self._zoo.folder.parent)
        repository = self._processes.folder / "repository"
        settings = {
            "debug": False,
            "host": "127.0.0.1",
            "http_port": self._port,
            "grpc_port": self._grpc_port,
            "metrics_port": self._metrics_port,
            "load_models_at_startup": False,
        }
        repository.mkdir()
        (repository / "settings.json").write_text(json.dumps(settings))
        for model in self._zoo.sizes:
            (repository / model).mkdir()
            content = {"name": model, "implementation": "loadtests.compare.mlserver_runtime.Classifier"}
            (repository / model / "model-settings.json").write_text(json.dumps(content))
        command = [str(python.parent / "mlserver"), "start", str(repository)]
        server = self._processes.start(command, {"COMPARE_SPEC": str(self._zoo.spec)}, cwd=repository)
        self._processes.await_ready(server, self._is_ready, _UP_S)

    def connect(self) -> Client:
        """A client; all of them share the books."""
        return Client(self._port, self._held)

    def memory(self) -> Memory:
        """All of its processes serve."""
        return self._processes.memory()

    def cpu_s(self) -> float:
        """Of all processes."""
        return self._processes.cpu_s()

    def held_bytes(self) -> int:
        """What the books say."""
        return self._held.used_bytes

    def stop(self) -> None:
        """End it."""
        self._processes.stop()

    def _is_ready(self) -> bool:
        http = Http(self._port)
        try:
            http.get("/v2/health/ready")
        except RequestFailed:
            return False
        finally:
            http.close()
        return True


class HeldModels:
    """``LruBooks`` for several threads, with the loads and unloads that they ask for."""

    def __init__(self, books: LruBooks) -> None:
        self._books = books
        self._changed = threading.Condition()

    @property
    def used_bytes(self) -> int:
        """What is held or being loaded."""
        with self._changed:
            return self._books.used_bytes

    def lease(self, model: str, http: Http) -> str:
        """Have a model in the server's memory until ``done``; says how; raises ``RequestFailed``."""
        has_waited = False
        while True:
            with self._changed:
                while (step := self._books.ask(model)).kind == "wait":
                    has_waited = True
                    self._changed.wait()
                if step.kind == "hit":
                    return "join" if has_waited else "hit"
                if step.kind == "join":
                    while (is_ready := self._books.is_ready(model)) is False:
                        self._changed.wait()
                    if is_ready:
                        return "join"
                    has_waited = True
                    continue
            self._load(model, step.victims, http)
            return "load"

    def done(self, model: str) -> None:
        """The request no longer uses it."""
        with self._changed:
            self._books.done(model)
            self._changed.notify_all()

    def _load(self, model: str, victims: tuple[str, ...], http: Http) -> None:
        is_loaded = False
        try:
            for victim in victims:
                self._unload(victim, http)
            http.post(f"/v2/repository/models/{model}/load", b"", {})
            is_loaded = True
        finally:
            with self._changed:
                if is_loaded:
                    self._books.loaded(model)
                else:
                    self._books.failed(model)
                self._changed.notify_all()

    def _unload(self, victim: str, http: Http) -> None:
        try:
            http.post(f"/v2/repository/models/{victim}/unload", b"", {})
        finally:
            with self._changed:
                self._books.unloaded(victim)
                self._changed.notify_all()


class Client:
    """Loads what is missing, then asks by the Open Inference Protocol."""

    def __init__(self, port: int, held: HeldModels) -> None:
        self._http = Http(port)
        self._held = held

    def classify(self, model: str, image: bytes, top_k: int = 5) -> Reply:
        """Have an image classified; raises ``RequestFailed``."""
        asked_s = time.perf_counter()
        outcome = self._held.lease(model, self._http)
        wait_s = time.perf_counter() - asked_s if outcome != "hit" else 0.0
        tensor = {
            "name": "image",
            "shape": [1],
            "datatype": "BYTES",
            "data": [base64.b64encode(image).decode()],
            "parameters": {"content_type": "base64", "top_k": top_k},
        }
        try:
            body = json.dumps({"inputs": [tensor]}).encode()
            _, answer = self._http.post(f"/v2/models/{model}/infer", body, {"Content-Type": "application/json"})
        finally:
            self._held.done(model)
        content = json.loads(json.loads(answer)["outputs"][0]["data"][0])
        return Reply(
            outcome=outcome,
            wait_s=wait_s,
            # It does not say how long a request waits inside.
            queue_s=0.0,
            exec_s=content["exec_s"],
            predictions={int(index): probability for index, probability in content["predictions"].items()},
        )

    def close(self) -> None:
        """The client goes."""
        self._http.close()


def environment(cache: Path) -> Path:
    """The Python of a virtual environment with MLServer and our versions of torch; made once, which takes minutes.

    Raises:
        SideFailed: it cannot be made.
    """
    torch, torchvision = (version(name).partition("+")[0] for name in ("torch", "torchvision"))
    folder = cache / f"mlserver-torch{torch}-python{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if (folder / _COMPLETE).is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    packages = (*_MLSERVER, f"torch=={torch}", f"torchvision=={torchvision}", "numpy", "pillow")
    try:
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *packages],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip() or "no output").splitlines()[-1]
        raise SideFailed(f"its virtual environment cannot be made: {problem[:200]}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SideFailed(f"its virtual environment cannot be made: {error}") from None
    (folder / _COMPLETE).touch()
    return python

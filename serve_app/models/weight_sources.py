"""Where weights come from: a download, a safetensors file, or a seed when the download is out of reach."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from serve_app.errors import StoreError

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"

#: What is served instead of pretrained weights that cannot be fetched.
FALLBACK = "random:0"

#: Longest wait for the one probe of a download host, and for the next byte of a download.
PROBE_TIMEOUT_S = 3.0
STALL_TIMEOUT_S = 30.0

#: Returns whether the URL can be fetched from this machine.
Probe = Callable[[str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """Where pretrained weights are fetched from, and whether this machine has them already."""

    url: str
    cached: bool


class DownloadFailed(StoreError):
    """Pretrained weights could not be fetched; seeded random ones can stand in."""


class WeightSource:
    """Decides, for one run of the publisher, which weights a model gets; every host is probed once.

    Args:
        reachable: the probe; tests pass a fake.
    """

    def __init__(self, reachable: Probe | None = None) -> None:
        self._reachable = reachable or url_reachable
        self._hosts: dict[str, bool] = {}

    def choose(self, requested: str, download: Download | None) -> str:
        """Choose the weights to use for the requested ones.

        Args:
            requested: ``pretrained``, ``random:SEED`` or ``file:PATH``.
            download: where they would be fetched from; None if they need no download.

        Returns:
            ``requested``, or ``FALLBACK`` when it needs a download that is out of reach.
        """
        if requested != PRETRAINED or download is None or download.cached:
            return requested
        host = urlparse(download.url).netloc
        if host not in self._hosts:
            self._hosts[host] = self._reachable(download.url)
            if not self._hosts[host]:
                logger.warning("%s cannot be reached: models without cached weights get %s", host, FALLBACK)
        return requested if self._hosts[host] else FALLBACK

    def mark_unreachable(self, download: Download) -> None:
        """Record that a download failed although the probe had succeeded, so that the other models do not try."""
        self._hosts[urlparse(download.url).netloc] = False


def url_reachable(url: str, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """Return whether the URL answers within ``timeout_s``, by the proxy that the system is set up with.

    A refused connection answers at once. The resolution of the name has no time-out of its own, hence the thread.
    """
    answers: list[bool] = []

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s):
                answers.append(True)
        except (OSError, HTTPException):
            answers.append(False)

    thread = threading.Thread(target=probe, name="probe-download-host", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers == [True]


def download_torchvision(weights: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of a torchvision weights enum member: from torch hub's cache, else downloaded and checked.

    Unpickling is limited to tensors (``weights_only``).

    Raises:
        DownloadFailed: the download failed.
        StoreError: the file is there but cannot be read.
    """
    try:
        with _stall_timeout(STALL_TIMEOUT_S):
            state: dict[str, torch.Tensor] = weights.get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
        return state
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise DownloadFailed(f"cannot download {weights.url}: {error}; check the network and publish again") from error
    except Exception as error:
        path = hub_file(weights.url)
        raise StoreError(f"cannot read the weights {path}: {error}; delete that file and publish again") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, by name.

    Raises:
        StoreError: the file is missing or is not a safetensors file.
    """
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot read the weights {path}: {error}; name a safetensors file") from error
    return state


def load_strictly(module: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into a module; names and shapes must match exactly.

    Raises:
        StoreError: they do not.
    """
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"the weights {source} do not fit the model: {reason[:500]}") from error


def hub_file(url: str) -> Path:
    """Return the path at which torch hub keeps the file that it downloads from this URL."""
    return Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlparse(url).path).name)


@contextlib.contextmanager
def _stall_timeout(seconds: float) -> Iterator[None]:
    """Bound every socket operation: torch hub's download sets no time-out and would wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)

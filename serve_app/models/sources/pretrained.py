"""Which weights a model gets in one run of the publisher, and the file that they are in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import urlparse

import torch

from serve_app.core.reference import parse_reference
from serve_app.errors import DownloadFailed
from serve_app.models.sources.download_cache import OnBytes, ignore_bytes
from serve_app.models.sources.fetcher import Fetcher, probe_url
from serve_app.models.sources.probe import url_reachable

logger = logging.getLogger(__name__)

PRETRAINED: Final = "pretrained"

#: What is served instead of pretrained weights that cannot be fetched.
FALLBACK: Final = "random:0"

#: Returns whether the URL or reference can be fetched from this machine.
Probe = Callable[[str], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """Where pretrained weights are: in a file that another library has downloaded, or under the first of the
    references that answers."""

    references: tuple[str, ...] = ()
    file: Path | None = None


class WeightSource:
    """Decides, for one run of the publisher, which weights a model gets; every host is probed once.

    Args:
        fetcher: fetches files.
        reachable: the probe; tests pass a fake.
    """

    def __init__(self, fetcher: Fetcher | None = None, reachable: Probe | None = None) -> None:
        self.fetcher = fetcher or Fetcher()
        self._reachable = reachable
        self._hosts: dict[str, bool] = {}

    def choose(self, requested: str, pretrained: Pretrained | None) -> str:
        """Choose the weights to use for the requested ones.

        Args:
            requested: ``pretrained``, ``random:SEED`` or a reference.
            pretrained: where pretrained weights are; None if the builder brings them.

        Returns:
            ``requested``, or ``FALLBACK`` when it means pretrained weights that are out of reach.
        """
        if requested != PRETRAINED or pretrained is None or pretrained.file is not None:
            return requested
        if any(self._answers(reference) for reference in self._in_order(pretrained)):
            return requested
        return FALLBACK

    def file(self, pretrained: Pretrained, on_bytes: OnBytes = ignore_bytes) -> Path:
        """Return the file of pretrained weights: fetched from the first of its references that answers.

        Raises:
            DownloadFailed: none answers.
        """
        if pretrained.file is not None:
            return pretrained.file
        reasons = []
        for reference in self._in_order(pretrained):
            if not self._answers(reference):
                continue
            try:
                return self.fetcher.fetch(reference, on_bytes)
            except DownloadFailed as error:
                reasons.append(str(error))
                # The other models do not try.
                self._hosts[_host(reference)] = False
        raise DownloadFailed("; ".join(reasons) or f"{' and '.join(pretrained.references)} cannot be reached")

    def _in_order(self, pretrained: Pretrained) -> list[str]:
        """Return what needs no network first."""
        return sorted(pretrained.references, key=lambda reference: not self.fetcher.has(reference))

    def _answers(self, reference: str) -> bool:
        if self.fetcher.has(reference):
            return True
        host = _host(reference)
        if host not in self._hosts:
            self._hosts[host] = self._probe(reference)
            if not self._hosts[host]:
                logger.warning("%s cannot be reached; models without weights from elsewhere get %s", host, FALLBACK)
        return self._hosts[host]

    def _probe(self, reference: str) -> bool:
        if self._reachable is not None:
            return self._reachable(reference)
        url = probe_url(reference)
        if url is not None:
            return url_reachable(url, context=self.fetcher.ssl_context())
        try:
            self.fetcher.fetch(reference)
        except DownloadFailed as error:
            logger.info("%s", error)
            return False
        return True


def torch_hub_file(url: str) -> Path | None:
    """Return the file that torch hub has downloaded from a URL before; None if there is none."""
    path = Path(torch.hub.get_dir(), "checkpoints", PurePosixPath(urlparse(url).path).name)
    return path if path.is_file() else None


def _host(reference: str) -> str:
    parsed = parse_reference(reference)
    if parsed.kind == "package":
        return "the package index"
    return urlparse(probe_url(reference) or parsed.place).netloc

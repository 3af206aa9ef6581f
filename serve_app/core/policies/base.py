"""What an eviction policy is: the hooks that a cache calls, and the one number by which the policy ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from typing import NamedTuple

from serve_app.core.catalog import ModelProfile


class PreloadVerdict(NamedTuple):
    """What a cache has made of a candidate: whether it loads, and what must leave, or would have had to."""

    accepted: bool
    victims: tuple[ModelProfile, ...]


#: Yields absent models; is sent the verdict on each, or None where the model cannot be loaded now.
PreloadCandidates = Generator[ModelProfile, PreloadVerdict | None, None]


class EvictionPolicy(ABC):
    """The hooks that a policy may use; every one but ``utility`` may stay empty. All times are seconds."""

    #: Whether, of several victims, only the largest that suffice leave ("Many Models at the Edge", ACSOS 2021). Without
    #: it they leave strictly in the order of their utilities, as the classical policies are defined.
    trim_victims: bool = False

    #: When ``preload_candidates`` may return other models although nothing has happened.
    next_review_s: float = math.inf

    def on_start(self, *, preloads: bool) -> None:
        """A cache begins to use this policy; ``preloads``: it asks for ``preload_candidates``."""

    def on_request(self, model: ModelProfile, now: float) -> None:
        """A request asked for ``model``, whether or not it is resident."""

    def on_load(self, model: ModelProfile, now: float) -> None:
        """``model`` takes memory from now on."""

    def on_evict(self, model: ModelProfile, now: float) -> None:
        """``model`` was displaced by another one and no longer takes memory."""

    def on_unload(self, model: ModelProfile, now: float) -> None:
        """``model`` no longer takes memory for any other reason: its load failed, or it was unloaded."""

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        """Models that other locations hold, and the extra seconds that a request forwarded there takes."""

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        """Requests may ask for these models."""

    def on_succession(self, model: ModelProfile, successor: ModelProfile, now: float) -> None:
        """Requests that asked for ``model`` ask for ``successor``, the next version of it, from now on."""

    @abstractmethod
    def utility(self, model: ModelProfile, now: float) -> float:
        """What keeping ``model`` is worth; only the order of the numbers matters."""

    def lowered(self, now: float) -> Iterable[str]:
        """Resident models whose utility may have fallen since the last call, for whatever reason.

        Rises need not be named. A model that is not named here keeps its place or rises.
        """
        return ()

    def preload_candidates(self, now: float, free_bytes: int) -> PreloadCandidates:
        """Yield absent models that should perhaps be loaded before any request, the most useful per byte first.

        For each, the cache looks for victims. If it finds them, it asks ``accept_preload`` and sends the verdict back.
        After an accepted candidate it asks for no more.
        """
        yield from ()

    def accept_preload(self, model: ModelProfile, victims: Iterable[ModelProfile], now: float) -> bool:
        """Whether a candidate is worth its load and the absence of ``victims``; changes nothing."""
        return False

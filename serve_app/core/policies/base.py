"""What an eviction policy is: what it is told, and the one number by which it ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from serve_app.core.catalog import ModelProfile


class EvictionPolicy(ABC):
    """The hooks that a policy may use; every one but ``utility`` may stay empty. All times are seconds."""

    def on_request(self, model: ModelProfile, now: float) -> None:
        """``model`` was asked for, whether or not it is resident."""

    def on_load(self, model: ModelProfile, now: float) -> None:
        """``model`` takes up memory from now on."""

    def on_evict(self, model: ModelProfile, now: float) -> None:
        """``model`` was displaced by another one and no longer takes up memory."""

    def on_unload(self, model: ModelProfile, now: float) -> None:
        """``model`` no longer takes up memory for any other reason: its load failed, or it was unloaded by hand."""

    def on_forward_costs(self, forward_s: Mapping[str, float]) -> None:
        """Models that other locations hold, and the extra seconds that a request forwarded there takes."""

    def on_catalog(self, models: Iterable[ModelProfile], now: float) -> None:
        """These models can be asked for."""

    #: Whether, of several victims, only the largest that suffice go ("Many Models at the Edge", ACSOS 2021). Without it
    #: they go strictly in the order of their utilities, as the classical policies are defined.
    spares_small: bool = False

    @abstractmethod
    def utility(self, model: ModelProfile, now: float) -> float:
        """What keeping ``model`` is worth; only the order of the numbers matters."""

    def fallen(self, now: float) -> Iterable[str]:
        """Resident models whose utility may have fallen since this was last asked, however it came about.

        Rises need not be told. A model that is not named here keeps its place or rises.
        """
        return ()

    #: Whether the cache loads what this policy wishes for.
    preloading: bool = True

    #: When time alone gives ``wishes`` something new to say.
    review_s: float = math.inf

    def wishes(self, now: float, free_bytes: int) -> Iterable[ModelProfile]:
        """Absent models that should perhaps be loaded before anybody asks, the most worthwhile first."""
        return ()

    def worthwhile(self, model: ModelProfile, victims: Sequence[ModelProfile], now: float) -> bool:
        """Whether a wish is worth its load and the absence of ``victims``."""
        return False

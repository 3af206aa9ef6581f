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

    def on_exchange(self, model: ModelProfile, other: ModelProfile, now: float) -> None:
        """``model`` is in memory, or is being loaded, in the form ``other`` from now on, see ``core/forms.py``."""

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
        """What keeping ``model`` in its form is worth; only the order of the numbers matters.

        A policy may rank a model alike in all of its forms. One that ranks by bytes is asked for a ``Surplus``, too:
        what a model takes beyond its smaller form, which leaves before the rest if it is worth no more.
        """

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
        """Whether a candidate is worth its load and the absence of ``victims``; changes nothing.

        Of a model that goes over to its smaller form, the ``Surplus`` is a victim.
        """
        return False

    def accept_exchange(
        self, model: ModelProfile, other: ModelProfile, victims: Iterable[ModelProfile], now: float
    ) -> bool:
        """Whether ``other``, a faster form of the resident ``model``, is worth ``victims``; changes nothing.

        That its load pays back is known. Unless a policy says otherwise, ``model`` displaces what it ranks above.
        """
        own = self.utility(model, now)
        return all(self.utility(victim, now) < own for victim in victims)

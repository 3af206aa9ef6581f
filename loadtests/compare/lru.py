"""Decisions of a client that keeps the models of a server within a memory, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a request has to do: use the model, wait for its load, load it, or ask again when something has changed.

    ``victims`` are to be unloaded before the load, each told by ``unloaded``; nobody can ask for them before that.
    """

    kind: Literal["hit", "join", "load", "wait"]
    victims: tuple[str, ...] = ()


@dataclass(slots=True)
class _Held:
    is_ready: bool
    uses: int


class LruBooks:
    """Who holds what; not for several threads at a time.

    Args:
        capacity_bytes: of all models together.
        sizes: bytes of every model.

    Raises:
        ValueError: a model is larger than the memory.
    """

    def __init__(self, capacity_bytes: int, sizes: Mapping[str, int]) -> None:
        for model, size_bytes in sizes.items():
            if size_bytes > capacity_bytes:
                raise ValueError(f"{model} has {size_bytes} bytes, more than the memory of {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._sizes = dict(sizes)
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._leaving: set[str] = set()

    @property
    def used_bytes(self) -> int:
        """What is held or being loaded."""
        return sum(self._sizes[model] for model in self._held)

    @property
    def models(self) -> tuple[str, ...]:
        """What is held or being loaded, the least recently used first."""
        return tuple(self._held)

    def ask(self, model: str) -> Step:
        """A request comes; unless it must wait, it uses the model until ``done`` or ``failed``."""
        held = self._held.get(model)
        if held is not None:
            held.uses += 1
            self._held.move_to_end(model)
            return Step(kind="hit" if held.is_ready else "join")
        if model in self._leaving:
            # A load that overtakes the unload would be undone by it.
            return Step(kind="wait")
        victims: list[str] = []
        missing = self.used_bytes + self._sizes[model] - self._capacity_bytes
        for candidate, state in self._held.items():
            if missing <= 0:
                break
            if state.is_ready and not state.uses:
                victims.append(candidate)
                missing -= self._sizes[candidate]
        if missing > 0:
            return Step(kind="wait")
        for victim in victims:
            del self._held[victim]
            self._leaving.add(victim)
        self._held[model] = _Held(is_ready=False, uses=1)
        return Step(kind="load", victims=tuple(victims))

    def unloaded(self, model: str) -> None:
        """A victim has left the server's memory."""
        self._leaving.discard(model)

    def is_ready(self, model: str) -> bool | None:
        """Whether a load has ended well; None if it has failed."""
        held = self._held.get(model)
        return None if held is None else held.is_ready

    def loaded(self, model: str) -> None:
        """The load has ended well."""
        self._held[model].is_ready = True

    def failed(self, model: str) -> None:
        """The load has failed; whoever has joined it asks again."""
        del self._held[model]

    def done(self, model: str) -> None:
        """A request no longer uses the model."""
        self._held[model].uses -= 1

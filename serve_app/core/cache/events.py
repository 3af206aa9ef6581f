"""What happens to a ``ModelCache`` beside requests: the events that ``ModelCache.handle`` takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy


@dataclass(frozen=True, slots=True)
class PreloadTick:
    """``ModelCache.next_tick_s`` has come: preloads may begin."""


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """The load of a model has ended well."""

    model_id: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The load of a model has failed: its bytes are free, and all requests that waited for it have lost their pin."""

    model_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class ExchangeSuggested:
    """A model in memory had better go over to another of its forms, which ``model`` describes; see ``forms.py``."""

    model: ModelProfile


@dataclass(frozen=True, slots=True)
class ExchangeEnded:
    """A model has gone over to its other form, and nothing uses the former one any more; or it has stayed as it was."""

    model_id: str
    succeeded: bool


@dataclass(frozen=True, slots=True)
class LoadImpossible:
    """A load of a model would fail, so that nothing is to be displaced for it."""

    model_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class RetryAllowed:
    """The next request for a model may try to load it at once, whatever failed before."""

    model_id: str


@dataclass(frozen=True, slots=True)
class WaitCanceled:
    """The request behind a ticket no longer waits; unknown tickets are ignored."""

    ticket: int


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """An operator unloads a model; the model stays away until a request comes for it.

    ``handle`` raises ``NotFound`` if the model is absent, ``Conflict`` if it is pinned, protected, in use or loading.
    """

    model_id: str


@dataclass(frozen=True, slots=True)
class WithdrawSuggested:
    """Placement suggests that a model leaves; ignored if the model is unevictable, in use or absent.

    Until the next request for the model, only a required preload brings it back.
    """

    model_id: str


@dataclass(frozen=True, slots=True)
class ContentChanged:
    """What is in memory of a model is not what the store has any more: it leaves as soon as it is idle, even if pinned.

    Until then it takes no new requests: they wait, and the first of them, or any preload, brings it back.
    """

    model_id: str


@dataclass(frozen=True, slots=True)
class IdleChecked:
    """Withdraw every model that no request has used since ``since_s``."""

    since_s: float


@dataclass(frozen=True, slots=True)
class PreloadSuggested:
    """Placement or the configuration suggests a load in the background.

    The suggestion waits for background loads that are under way, but not for long (``PreloadQueue.SUGGESTION_S``).
    A preload displaces only idle models of less utility; a ``required`` one displaces any idle model.
    """

    model: ModelProfile
    required: bool = False


@dataclass(frozen=True, slots=True)
class ModelsKnown:
    """Models that requests may ask for, so that the policy may preload them before the first request."""

    models: Sequence[ModelProfile]


@dataclass(frozen=True, slots=True)
class CatalogChanged:
    """The catalog is now this one; a model that it no longer has leaves when idle.

    ``successors`` has, for each version of a model that answers no requests which name none, the version that does.
    """

    models: Sequence[ModelProfile]
    pinned: Collection[str]
    successors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    """The worker has more memory or less; a model in use beyond the new capacity leaves when idle.

    ``handle`` raises ``ValueError`` if the pinned models need more.
    """

    capacity_bytes: int
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UnaccountedChanged:
    """So much of the capacity is taken by something that no accounting covers; see ``MemoryGuard``.

    No request is rejected for it: unaccounted bytes yield to pinned and protected models, and to a model that does not
    fit beside them, which then leaves as soon as it is idle.
    """

    unaccounted_bytes: int


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """Another policy ranks the models from now on."""

    policy: EvictionPolicy


@dataclass(frozen=True, slots=True)
class ProtectedChanged:
    """The copies that the cluster cannot spare are these, the most important first, and no others.

    Copies are protected in this order until they fill half of the unpinned memory; the last may exceed that half. A
    protected copy yields to a request that could never be served otherwise.
    """

    model_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class ForwardCostsChanged:
    """Models that other workers hold, and the extra seconds that a request forwarded there takes."""

    forward_s: Mapping[str, float]


Event = (
    PreloadTick
    | ExchangeSuggested
    | ExchangeEnded
    | LoadEnded
    | LoadFailed
    | LoadImpossible
    | RetryAllowed
    | WaitCanceled
    | UnloadRequested
    | WithdrawSuggested
    | ContentChanged
    | IdleChecked
    | PreloadSuggested
    | ModelsKnown
    | CatalogChanged
    | CapacityChanged
    | UnaccountedChanged
    | PolicyChanged
    | ProtectedChanged
    | ForwardCostsChanged
)

#: It carries nothing, so one is enough.
TICK = PreloadTick()

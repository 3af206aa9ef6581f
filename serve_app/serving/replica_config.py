"""From settings to the rules, budgets and catalog of one replica."""

import random
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from serve_app.config.edge import EdgeSettings, LocationSettings
from serve_app.core.catalog import Catalog, ModelEntry
from serve_app.core.coordination.rules import CoordinatorRules, PlacementSettings
from serve_app.core.memory_budget import MemoryBudget, divide
from serve_app.core.placement.rules import PlacementRules
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.registry import make_policy
from serve_app.core.routing.rules import RoutingRules
from serve_app.serving.coordinator.client import CoordinatorClient
from serve_app.serving.worker.worker import RetentionRules
from serve_app.store.model_store import ModelStore

#: A typical request, for placement: a photograph.
_PAYLOAD_BYTES = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """What a replica is told: everything that was configured. The store is read where the replica runs.

    It is the Serve applications' ``user_config``, so a change of it reaches the replicas while they serve.
    """

    settings: EdgeSettings
    entries: tuple[ModelEntry, ...]
    location: str | None
    issued: int = 0

    def to_json(self) -> Any:
        """As plain values, which is all that Serve takes."""
        return _DEPLOYED.dump_python(self, mode="json")

    @staticmethod
    def from_json(content: Any) -> "ReplicaConfig":
        """What ``to_json`` has made plain."""
        return _DEPLOYED.validate_python(content)

    def budget(self, catalog: Catalog) -> MemoryBudget:
        """How a worker of this location divides its memory."""
        return divide(self.here.memory, catalog.models, self.settings.worker.parallel_inferences)

    @property
    def here(self) -> LocationSettings:
        """The settings of the replica's location; the gateway has none."""
        assert self.location is not None
        return self.settings.locations[self.location]

    def policy(self, replica: str) -> EvictionPolicy:
        """A policy for the cache of a worker."""
        return make_policy(self.settings.policy.name, random.Random(replica), **self.settings.policy.parameters)

    def catalog(self) -> Catalog:
        """The models that the store of this node holds."""
        return ModelStore(self.settings.store).catalog(self.entries)

    def rules(self, catalog: Catalog) -> RoutingRules:
        """The rules that routers and workers share."""
        return RoutingRules(
            profiles=catalog.profiles(),
            links=self.settings.core_links(),
            default_link=self.settings.core_default_link(),
            horizon_s=self.settings.coordinator.horizon,
            # A report waits for its turn, and so does the view that brings it.
            staleness_s=2 * self.settings.coordinator.report_every,
        )

    def min_copies(self) -> dict[str, int]:
        """Models of which there must be a number of copies."""
        return {entry.model_id: entry.min_copies for entry in self.entries if entry.min_copies}

    def holding(self) -> RetentionRules:
        """What a worker of this location holds in any case."""
        worker = self.settings.worker
        return RetentionRules(
            preload=self.settings.locations[self.location].preload if self.location else (),
            min_copies=self.min_copies(),
            idle_unload_s=worker.idle_unload,
            hand_over_s=worker.hand_over,
        )

    def coordination(self, catalog: Catalog) -> CoordinatorRules:
        """How the coordinator is to work."""
        coordinator = self.settings.coordinator
        placement = None
        if coordinator.placement_every is not None:
            placement = PlacementSettings(
                routing=self.rules(catalog),
                every_s=coordinator.placement_every,
                payload_bytes=_PAYLOAD_BYTES,
                min_copies=self.min_copies(),
                rules=PlacementRules(withdraw_after_s=coordinator.withdraw_after),
            )
        return CoordinatorRules(
            issued=self.issued,
            half_life_s=coordinator.popularity_half_life,
            stale_after_s=coordinator.stale_after,
            placement=placement,
        )

    def link(self, catalog: Catalog) -> CoordinatorClient:
        """A connection to the coordinator."""
        return CoordinatorClient(self.coordination(catalog), self.location)


_DEPLOYED = TypeAdapter(ReplicaConfig)

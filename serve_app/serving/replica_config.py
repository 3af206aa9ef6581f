"""The configuration of one replica, and what follows from it: rules, budgets and policy. Reads no disk."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from serve_app.config.edge import EdgeSettings
from serve_app.core.catalog import Catalog, ModelEntry
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.memory_budget import MemoryBudget, divide
from serve_app.core.placement.rules import PlacementRules, PlacementSettings
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.registry import make_policy
from serve_app.core.routing.rules import RoutingRules
from serve_app.errors import ConfigError
from serve_app.serving.worker.settings import RetentionRules
from serve_app.store.projects import ProjectState

#: Size of a typical request, for placement: a photograph.
_PAYLOAD_BYTES = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """The ``user_config`` of the Serve applications, so that a change reaches the replicas while they serve.

    Methods with a ``catalog`` take the published models of the store, which each replica reads on its own node.

    Attributes:
        settings: ``edge.yaml``.
        entries: ``catalog.yaml``.
        location: the location of the replica; None for the gateway.
        issued: when the configuration was written; of two configurations, the coordinator follows the newer.
        project: the key of the catalog's project in the store, whose versions are served; see ``store/projects.py``.
        versions: of the project, when the configuration was written.
    """

    settings: EdgeSettings
    entries: tuple[ModelEntry, ...]
    location: str | None
    issued: int = 0
    project: str = ""
    versions: ProjectState | None = None

    def to_json(self) -> Any:
        """Return plain values, which is all that Serve takes."""
        return _ADAPTER.dump_python(self, mode="json")

    @staticmethod
    def from_json(content: Any) -> ReplicaConfig:
        """Return the configuration of which ``to_json`` made ``content``."""
        return _ADAPTER.validate_python(content)

    def worker_location(self) -> str:
        """Return the location, for what only workers have.

        Raises:
            ConfigError: this is the configuration of the gateway.
        """
        if self.location is None:
            raise ConfigError("the gateway has no workers; give the application the argument location")
        return self.location

    def memory_budget(self, catalog: Catalog) -> MemoryBudget:
        """Divide the memory of a worker between models and workspace; raises ``ConfigError`` for the gateway."""
        memory_bytes = self.settings.locations[self.worker_location()].memory
        return divide(memory_bytes, catalog.models, self.settings.worker.parallel_inferences)

    def eviction_policy(self, replica: str) -> EvictionPolicy:
        """Make the policy of a worker's cache; ``replica`` seeds its random choices."""
        policy = self.settings.policy
        return make_policy(policy.name, random.Random(replica), **policy.parameters)

    def routing_rules(self, catalog: Catalog) -> RoutingRules:
        """Return the rules that routers and workers share."""
        return RoutingRules(
            profiles=catalog.profiles(),
            links=self.settings.core_links(),
            default_link=self.settings.core_default_link(),
            horizon_s=self.settings.coordinator.horizon,
            # A report waits for its period, and so does the delta that carries it to the router.
            staleness_s=2 * self.settings.coordinator.report_every,
        )

    def min_copies(self, catalog: Catalog) -> dict[str, int]:
        """Return the number of copies that the cluster must have, for each model with such a number, by key."""
        wanted = {entry.model_id: entry.min_copies for entry in self.entries if entry.min_copies}
        return {model.model_id: wanted[model.name] for model in catalog.answering() if model.name in wanted}

    def retention_rules(self, catalog: Catalog) -> RetentionRules:
        """Return which models a worker holds whatever its policy says; raises ``ConfigError`` for the gateway."""
        worker = self.settings.worker
        return RetentionRules(
            preload=self.settings.locations[self.worker_location()].preload,
            min_copies=self.min_copies(catalog),
            idle_unload_s=worker.idle_unload,
            hand_over_s=worker.hand_over,
        )

    def coordinator_rules(self, catalog: Catalog, published_ns: int = 0) -> CoordinatorRules:
        """Return the rules that the coordinator is to follow; ``published_ns``: when the versions last changed."""
        coordinator = self.settings.coordinator
        placement = None
        if coordinator.placement_every is not None:
            placement = PlacementSettings(
                routing=self.routing_rules(catalog),
                every_s=coordinator.placement_every,
                payload_bytes=_PAYLOAD_BYTES,
                min_copies=self.min_copies(catalog),
                rules=PlacementRules(withdraw_after_s=coordinator.withdraw_after),
            )
        return CoordinatorRules(
            issued=max(self.issued, published_ns),
            half_life_s=coordinator.popularity_half_life,
            stale_after_s=coordinator.stale_after,
            placement=placement,
        )


_ADAPTER = TypeAdapter(ReplicaConfig)

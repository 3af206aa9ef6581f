"""Parameters of routing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from serve_app.core.catalog import ModelProfile
from serve_app.core.links import HERE, Link


@dataclass(frozen=True, kw_only=True)
class RoutingRules:
    """Parameters of the choice of where a request runs.

    Attributes:
        profiles: of all models, by id.
        links: as configured, in either direction.
        default_link: between all other pairs of locations.
        horizon_s: how far ahead today's popularity is trusted when a load is weighed against forwarding every time.
        staleness_s: how old a view of other locations may be; a shorter queue there counts only if it is shorter by
            more than that.
    """

    profiles: Mapping[str, ModelProfile]
    links: Mapping[tuple[str, str], Link]
    default_link: Link
    horizon_s: float
    staleness_s: float = 0.0

    def link(self, here: str, there: str) -> Link:
        """Return the link between two locations, in either direction; ``HERE`` within one."""
        if here == there:
            return HERE
        return self.links.get((here, there)) or self.links.get((there, here)) or self.default_link

    def with_links(self, measured: Mapping[tuple[str, str], Link]) -> RoutingRules:
        """Return these rules with measured links in place of configured ones."""
        return replace(self, links={**self.links, **measured})

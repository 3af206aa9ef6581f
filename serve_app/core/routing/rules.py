"""What the choice of where a request runs depends on besides the state of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from serve_app.core.catalog import ModelProfile
from serve_app.core.links import HERE, Link


@dataclass(frozen=True, kw_only=True)
class RoutingRules:
    """What the choice depends on besides the state of the cluster.

    ``links`` are as configured, in either direction. ``horizon_s``: how far ahead today's popularity is trusted when a
    load is weighed against forwarding every time. ``staleness_s``: how old what is known of other locations may be; a
    shorter queue there counts only if it is shorter by more than that.
    """

    profiles: Mapping[str, ModelProfile]
    links: Mapping[tuple[str, str], Link]
    default_link: Link
    horizon_s: float
    staleness_s: float = 0.0

    def link(self, here: str, there: str) -> Link:
        """The link between two locations, in either direction; nothing within one."""
        if here == there:
            return HERE
        return self.links.get((here, there)) or self.links.get((there, here)) or self.default_link

    def with_links(self, measured: Mapping[tuple[str, str], Link]) -> RoutingRules:
        """These rules with links as they were measured, where they were."""
        return replace(self, links={**self.links, **measured})

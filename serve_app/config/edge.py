"""``edge.yaml``: locations, memory, policy, links, limits."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from pydantic import ConfigDict, Field, model_validator

from serve_app.config.default_files import find, resolve
from serve_app.config.environment import STORE_VARIABLE
from serve_app.config.policy_parameters import parse_parameters
from serve_app.config.units import Duration, Period, Size
from serve_app.config.yaml_files import Settings, beside, read_settings, read_text
from serve_app.core.catalog import MODEL_ID_PATTERN
from serve_app.core.links import Link
from serve_app.core.policies.registry import make_policy
from serve_app.errors import ConfigError

#: First parts of the gateway's own paths; no location can have one of them as its prefix.
_RESERVED_NAMES = ("v1", "v2", "metrics", "console", "docs", "openapi.json")


class LocationSettings(Settings):
    """One edge location.

    ``memory`` is what each of its workers may take beyond a process without models, in bytes: the models in its cache,
    and the workspace of running inferences.
    """

    memory: Size
    workers: int = Field(default=1, ge=1, le=64)
    #: Run only on nodes with the label ``location=<name>``; a single machine has no such label.
    pin_to_nodes: bool = False
    #: Models that each worker loads in the background as it starts; they are evicted like others.
    preload: tuple[str, ...] = ()


class LinkSettings(Settings):
    """The network between two locations; ``bandwidth`` in bytes per second."""

    between: tuple[str, str]
    rtt: Duration
    bandwidth: Size = 125_000_000


class DefaultLinkSettings(Settings):
    """The network between two locations that ``links`` leaves out."""

    rtt: Duration = 0.002
    bandwidth: Size = 1_250_000_000


class PolicySettings(Settings):
    """The eviction policy; the other keys are its own parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "edgeserve"

    @model_validator(mode="after")
    def _policy_accepts_its_parameters(self) -> PolicySettings:
        make_policy(self.name, random.Random(0), **self.parameters)
        return self

    @property
    def parameters(self) -> dict[str, float]:
        """Parameters for ``make_policy``."""
        return parse_parameters(self.name, self.model_extra or {})


class WorkerSettings(Settings):
    """How a worker runs models."""

    threads_per_inference: int = Field(default=1, ge=1)
    parallel_inferences: int = Field(default=2, ge=1)
    parallel_loads: int = Field(default=2, ge=1)
    #: Concurrent background loads of models that will probably be requested, in addition to the others; 0: none.
    parallel_preloads: int = Field(default=2, ge=0)
    #: Time from a failed load to the next attempt.
    failure_memory: Duration = 5.0
    #: A model without requests for so long is unloaded, although no other model needs its memory; off: never.
    idle_unload: Period = None
    #: Drop the weights of an unloaded model from the kernel's page cache. Otherwise they stay there until the machine
    #: needs the memory, and the next load does not read the disk.
    release_page_cache: bool = False
    #: How long a worker that shuts down waits until other workers have loaded its popular models.
    hand_over: Duration = 5.0


class CoordinatorSettings(Settings):
    """Reports of the workers, and what the coordinator makes of them."""

    report_every: Duration = 0.25
    stale_after: Duration = 2.0
    popularity_half_life: Duration = 60.0
    #: How far ahead the request rate is extrapolated when a load is weighed against forwarding.
    horizon: Duration = 10.0
    #: Period of placement rounds, in which the coordinator orders loads and unloads; off: none.
    placement_every: Period = 1.0
    #: After a flash crowd, a redundant copy that is not worth its load is unloaded when unused for so long.
    withdraw_after: Duration = 60.0

    @model_validator(mode="after")
    def _reports_arrive_in_time(self) -> CoordinatorSettings:
        if self.stale_after <= self.report_every:
            raise ValueError("stale_after must be longer than report_every, or every worker is taken for dead")
        return self


class LimitSettings(Settings):
    """Limits of one request, and of all requests together."""

    body: Size = 32 * 2**20
    image_pixels: int = Field(default=50_000_000, gt=0)
    batch: int = Field(default=32, ge=1)
    #: Concurrent requests of one router; more are answered 503.
    inflight: int = Field(default=1024, ge=1)
    #: Requests of one worker that wait for memory.
    waiting: int = Field(default=256, ge=1)
    #: Deadline of a request that carries none; it is answered 504 then.
    request_time: Duration = 60.0


class EdgeSettings(Settings):
    """``edge.yaml``: everything but the models."""

    catalog: Path = Path("catalog.yaml")
    store: Path = Path("~/.cache/edgeserve/store")
    locations: dict[str, LocationSettings] = Field(min_length=1)
    default_location: str | None = None
    links: tuple[LinkSettings, ...] = ()
    default_link: DefaultLinkSettings = DefaultLinkSettings()
    policy: PolicySettings = PolicySettings()
    worker: WorkerSettings = WorkerSettings()
    coordinator: CoordinatorSettings = CoordinatorSettings()
    limits: LimitSettings = LimitSettings()
    #: File with the token that requests must carry; without the file, requests need none.
    token_file: Path | None = None

    @model_validator(mode="after")
    def _consistent(self) -> EdgeSettings:
        for name in self.locations:
            if not MODEL_ID_PATTERN.fullmatch(name) or name in _RESERVED_NAMES:
                taken = ", ".join(_RESERVED_NAMES)
                raise ValueError(f"location {name!r} must be letters, digits, '.', '_' or '-', and none of {taken}")
        named = [self.default_location, *(end for link in self.links for end in link.between)]
        for unknown in [name for name in named if name is not None and name not in self.locations]:
            raise ValueError(f"unknown location {unknown!r}; there are {', '.join(self.locations)}")
        described: set[frozenset[str]] = set()
        for link in self.links:
            ends = frozenset(link.between)
            if len(ends) < 2 or ends in described:
                raise ValueError(f"links: {' and '.join(link.between)} must be two locations, and stand there once")
            described.add(ends)
        return self

    def restart_digest(self) -> str:
        """A digest of the settings that a running replica cannot take over; a new digest replaces the replicas."""
        changeable = {"worker": {"idle_unload", "hand_over"}}
        fixed = self.model_dump_json(include={"store", "worker", "limits", "token_file"}, exclude=changeable)
        return hashlib.sha256(f"{fixed} {self.coordinator.report_every}".encode()).hexdigest()

    @property
    def gateway_location(self) -> str:
        """The location of requests that name none."""
        return self.default_location or next(iter(self.locations))

    def core_links(self) -> dict[tuple[str, str], Link]:
        """``links`` as the core takes them."""
        return {link.between: Link(rtt_s=link.rtt, bytes_per_s=link.bandwidth) for link in self.links}

    def core_default_link(self) -> Link:
        """``default_link`` as the core takes it."""
        return Link(rtt_s=self.default_link.rtt, bytes_per_s=self.default_link.bandwidth)


def load_edge(path: Path) -> EdgeSettings:
    """Read ``edge.yaml``; relative paths in it are relative to its folder, and ``deploy/catalog.yaml`` is the default.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key or value.
    """
    path = find(path)
    settings = read_settings(path, EdgeSettings)
    store = os.environ.get(STORE_VARIABLE)
    return settings.model_copy(
        update={
            "catalog": resolve(settings.catalog, named_by=path),
            "store": Path(store).expanduser().absolute() if store else beside(path, settings.store),
            "token_file": beside(path, settings.token_file) if settings.token_file else None,
        }
    )


def load_token(settings: EdgeSettings) -> str | None:
    """The token that requests must carry, if any.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if settings.token_file is None:
        return None
    token = read_text(settings.token_file).strip()
    if not token:
        raise ConfigError(f"{settings.token_file}: the token file is empty; write a token into it or drop token_file")
    return token

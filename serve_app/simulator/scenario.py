"""What a replay takes: a workload, a policy, and a memory."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.config.policy_parameters import parse_parameters
from serve_app.config.units import parse_size
from serve_app.core.cache.model_cache import ModelCache
from serve_app.core.catalog import ModelProfile
from serve_app.core.policies.base import EvictionPolicy
from serve_app.core.policies.registry import ORACLES, POLICIES, make_policy
from serve_app.simulator.forms import COMPILED, SOONEST, TIERED, FormsInMemory, Ladder, choose
from serve_app.simulator.oracles import Belady, BeladyAm, next_uses
from serve_app.workload.locations import split
from serve_app.workload.profiles import DEFAULT_FORMS, DEFAULT_PROFILES, assign, assign_forms, read_forms, read_profiles
from serve_app.workload.spec import parse_trace
from serve_app.workload.trace import Trace

#: Every policy that can be replayed.
ALL_POLICIES = (*POLICIES, *ORACLES)
#: Stands for all policies.
EVERY_POLICY = "all"
_ORACLE_CLASSES: dict[str, Callable[[Sequence[float]], EvictionPolicy]] = {"belady": Belady, "belady-am": BeladyAm}
_PERCENT = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*%", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A request stream, and the profiles of its models.

    Attributes:
        trace: the requests.
        profiles: of ``trace.models``, in their order.
        seed: of every random draw for this workload, including those of the policies.
        forms: how forms were chosen; empty where models have but one.
        ladders: the forms of each model, if they matter.
        published_bytes: what all models take as they were published, if they are in other forms.
    """

    trace: Trace
    profiles: tuple[ModelProfile, ...]
    seed: int
    forms: str = ""
    ladders: Mapping[str, Ladder] = field(default_factory=dict)
    published_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Return the memory in which all models fit together, as they were published."""
        return self.published_bytes or sum(profile.size_bytes for profile in self.profiles)

    @property
    def largest_bytes(self) -> int:
        """Return the memory below which some model does not fit at all."""
        return max(profile.size_bytes for profile in self.profiles)

    @property
    def executions_at_a_time(self) -> float:
        """Return the mean number of parallel executions if no request waits; infinite for a single moment."""
        arrival_s = self.trace.arrival_s
        span_s = arrival_s[-1] - arrival_s[0]
        counts = Counter(self.trace.model)
        exec_s = sum(count * self.profiles[model].exec_s for model, count in counts.items())
        return exec_s / span_s if span_s > 0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """A policy with its parameters, and the text by which the user chose both."""

    label: str
    name: str
    parameters: tuple[tuple[str, float], ...] = ()

    @property
    def is_oracle(self) -> bool:
        """Return whether the policy knows the future."""
        return self.name in ORACLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Memory of one location: exactly one of bytes and a share of the memory of all models.

    Raises:
        ValueError: it is not positive.
    """

    given_bytes: int | None = None
    given_share: float | None = None

    def __post_init__(self) -> None:
        if (self.given_bytes is None) == (self.given_share is None):
            raise ValueError("a capacity is given in bytes or as a share")
        if not (self.given_bytes or self.given_share or 0) > 0:
            raise ValueError("a capacity must be more than 0 bytes")

    def size_bytes(self, total_bytes: int) -> int:
        """Return the memory where all models take ``total_bytes``: an integer, and at least 1."""
        return self.given_bytes or max(1, int((self.given_share or 0.0) * total_bytes))

    def share(self, total_bytes: int) -> float:
        """Return the memory as a share of ``total_bytes``."""
        return self.given_share or (self.given_bytes or 0) / total_bytes


def make_workload(
    *, trace: str, models: Path | None = None, keep: bool = False, locations: int | None = None, seed: int = 0
) -> Workload:
    """Make the workload of ``--trace``, ``--models``, ``--map`` and ``--locations``.

    Args:
        trace: a specification as ``workload.spec`` describes it.
        models: the table of models; None for the default one.
        keep: the trace names rows of the table; otherwise each of its models gets the numbers of a random row.
        locations: number of locations over which the requests are spread; None keeps those of the trace.
        seed: of every random draw.

    Raises:
        TraceError: the trace or the table is wrong, or does not fit the other.
        ValueError: ``locations`` is below 1.
    """
    rows = DEFAULT_PROFILES if models is None else read_profiles(models)
    stream = split(parse_trace(trace, seed=seed), locations, seed=seed)
    profile_of = assign(stream.models, rows, seed=seed, keep=keep)
    return Workload(trace=stream, profiles=tuple(profile_of[model] for model in stream.models), seed=seed)


def make_workloads(
    *,
    trace: str,
    choices: Sequence[str],
    models: Path | None = None,
    keep: bool = False,
    locations: int | None = None,
    seed: int = 0,
) -> tuple[Workload, ...]:
    """Make the same workload with the forms of the models chosen in several ways; arguments as of ``make_workload``.

    Args:
        trace, models, keep, locations, seed: the table of models has a column ``form``.
        choices: see ``forms.choose``.

    Raises:
        TraceError: the trace or the table is wrong, or does not fit the other.
        ValueError: no model of the table has such a form.
    """
    rows = read_forms(models or DEFAULT_FORMS)
    names = dict.fromkeys(form.form for row in rows for form in row)
    for choice in choices:
        if choice not in (TIERED, SOONEST, COMPILED, *names):
            raise ValueError(f"{choice!r} is no form; there are {TIERED}, {SOONEST}, {COMPILED}, {', '.join(names)}")
    stream = split(parse_trace(trace, seed=seed), locations, seed=seed)
    forms_of = assign_forms(stream.models, rows, seed=seed, keep=keep)
    published_bytes = sum(forms[0].profile.size_bytes for forms in forms_of.values())
    workloads = []
    for choice in choices:
        ladders = {model: choose(forms_of[model], choice) for model in stream.models}
        workloads.append(
            Workload(
                trace=stream,
                profiles=tuple(ladders[model].loaded.profile for model in stream.models),
                seed=seed,
                forms=choice,
                ladders=ladders,
                published_bytes=published_bytes,
            )
        )
    return tuple(workloads)


def forms_maker(workload: Workload) -> Callable[[], FormsInMemory] | None:
    """Return the function that makes the forms of an empty cache; None where every model has one form."""
    return (lambda: FormsInMemory(workload.ladders)) if workload.ladders else None


def parse_forms(texts: Sequence[str]) -> tuple[str, ...]:
    """Parse choices of forms, several with commas between them, each once, in order."""
    return tuple(dict.fromkeys(part.strip() for text in texts for part in text.split(",")))


def parse_policies(texts: Sequence[str]) -> tuple[PolicyChoice, ...]:
    """Parse names of policies, several with commas between them, or ``all``; each once, in the order of the texts.

    Parameters follow a colon, named and written as in ``edge.yaml``: ``edgeserve:half_life=10min``, further ones after
    an ampersand.

    Raises:
        ValueError: no such policy or parameter, or a bad value.
    """
    names = [part.strip() for text in texts for part in text.split(",")]
    listed = [name for part in names for name in (ALL_POLICIES if part == EVERY_POLICY else (part,))]
    return tuple(_parse_policy(label) for label in dict.fromkeys(listed))


def parse_capacities(texts: Sequence[str]) -> tuple[Capacity, ...]:
    """Parse sizes such as ``2GiB`` and shares such as ``25%``, several with commas between them, each once, in order.

    Raises:
        ValueError: neither a size nor a share, or not positive.
    """
    return tuple(dict.fromkeys(_parse_capacity(part.strip()) for text in texts for part in text.split(",")))


def cache_maker(
    workload: Workload,
    policy: PolicyChoice,
    *,
    capacity_bytes: int,
    max_preloads: int,
    cache_class: Callable[..., ModelCache] = ModelCache,
) -> Callable[[int], ModelCache]:
    """Return the function that makes an empty cache for the location with a given number."""

    def make(location: int) -> ModelCache:
        return cache_class(
            capacity_bytes=capacity_bytes,
            policy=_make_policy(workload, policy, location),
            max_preloads=max_preloads,
        )

    return make


def _make_policy(workload: Workload, policy: PolicyChoice, location: int) -> EvictionPolicy:
    if policy.name in _ORACLE_CLASSES:
        return _ORACLE_CLASSES[policy.name](next_uses(_requested_models(workload.trace, location)))
    rng = random.Random(f"{workload.seed}: policy of location {location}")
    return make_policy(policy.name, rng, **dict(policy.parameters))


def _requested_models(trace: Trace, location: int) -> Sequence[int]:
    if trace.location is None:
        return trace.model if location == 0 else ()
    return [model for model, origin in zip(trace.model, trace.location, strict=True) if origin == location]


def _parse_policy(label: str) -> PolicyChoice:
    name, _, text = label.partition(":")
    if name not in ALL_POLICIES:
        raise ValueError(f"unknown policy {name!r}; there are {', '.join(ALL_POLICIES)} and {EVERY_POLICY}")
    if not text:
        return PolicyChoice(label=name, name=name)
    if name in ORACLES:
        raise ValueError(f"policy {name!r} takes no parameters")
    parameters = _parameters(name, text)
    # Made once here, so that a bad value is reported before the first replay.
    make_policy(name, random.Random(0), **parameters)
    return PolicyChoice(label=label, name=name, parameters=tuple(sorted(parameters.items())))


def _parameters(name: str, text: str) -> dict[str, float]:
    written: dict[str, str] = {}
    for part in text.split("&"):
        key, equals, value = part.partition("=")
        if key in written:
            raise ValueError(f"policy {name!r}: {key} stands twice")
        if not equals:
            raise ValueError(f"policy {name!r}: {part!r} has no value; write it like {key}=...")
        written[key] = value
    return parse_parameters(name, written)


def _parse_capacity(text: str) -> Capacity:
    if percent := _PERCENT.fullmatch(text):
        return Capacity(given_share=float(percent[1]) / 100)
    try:
        return Capacity(given_bytes=parse_size(text))
    except ValueError as error:
        if "not a size" in str(error):
            raise ValueError(f"{text!r} is not a capacity; write it like 2GiB or 25%") from None
        raise

"""Measure misses and hits of published models side by side, as a worker would load and run them.

Every round takes each kind of measurement once, so that a disturbance of the machine affects all kinds alike. Ratios
are taken within a round.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from serve_app.core.forms import faster, soonest
from serve_app.core.precision import Lowered
from serve_app.errors import StoreError
from serve_app.models.profiling.grid import grid
from serve_app.models.profiling.measure import workspace_bytes
from serve_app.models.readahead import ReadAhead, is_resident
from serve_app.models.runtimes import registry
from serve_app.models.runtimes.base import LoadedModel
from serve_app.store.forms import Refusal, that_serve
from serve_app.store.manifest import Agreement, Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import Tensors, probe

#: Rounds per model: short inferences are noisier, and cost less to repeat.
MIN_ROUNDS, MAX_ROUNDS = 11, 51
_ROUNDS_S = 2.0

COLD_ROUNDS = 7

#: Rounds of one form before the next form has its turn.
_TURN = 6

_READ_BYTES = 1 << 20

_DROP_WITHIN_S = 2.0
_DROP_RETRY_S = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class Quartiles:
    """The median of several measurements, and their lower and upper quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Compute the quartiles of at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdProfile:
    """One model whose weights are not in the page cache.

    ``rounds`` has the seconds of a miss and of the hit after it, of every round. ``read_s`` is the time to read the
    weights in order, without a model.
    """

    load_s: float
    rounds: tuple[tuple[float, float], ...]
    read_s: float

    @property
    def miss_s(self) -> float:
        """Return the median of the rounds."""
        return statistics.median(miss_s for miss_s, _ in self.rounds)

    def over_bound(self, read_s: float) -> float:
        """Return the median over the rounds of a miss over the longer of its hit and ``read_s``."""
        return statistics.median(miss_s / max(hit_s, read_s) for miss_s, hit_s in self.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one form of a model takes on this machine, in seconds and bytes; medians, batch 1.

    ``size_bytes`` are its weights and buffers. A miss is a load and the first inference; it is compared with a hit of
    the first form, in which the model was published. ``cpu_miss_over_hit`` compares processor time, which leaves out
    waiting and hardly depends on other load of the machine. ``is_served``: workers load it in this form.
    """

    model_id: str
    form: str
    precision: str
    agreement: Agreement | None
    is_served: bool
    is_fastest: bool
    size_bytes: int
    workspace_bytes: int
    load_s: float
    first_s: float
    miss_s: float
    hit_s: float
    miss_over_hit: Quartiles
    cpu_miss_over_hit: float
    rounds: int
    cold: ColdProfile | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """All profiles of a run: geometric means, and the model with the highest ratio of miss to hit.

    ``read_bytes_per_s`` is the bandwidth of the disk. No cold miss can take less than the longer of a hit and of
    reading the weights at that bandwidth; ``cold_over_bound`` has the ratio to that bound by model.
    """

    miss_over_hit: float
    cpu_miss_over_hit: float
    worst: str
    read_bytes_per_s: float | None
    cold_over_bound: dict[str, float]


def profile(store: ModelStore, manifests: Sequence[Manifest], *, cold: bool, lowered: Lowered = "no") -> list[Profile]:
    """Measure the forms of one published model in turns, with the number of threads that ``use_threads`` has set.

    Args:
        store: where the model is published; its weights are in the page cache afterwards.
        manifests: of its forms; first of the one in which it was published.
        cold: measure with weights that must be read from the disk as well.
        lowered: see ``ModelEntry``.

    Raises:
        StoreError: the model is broken, or the kernel keeps its weights in memory.
    """
    contract = manifests[0].model.contract
    inputs = probe(contract, grid(contract.axes)[0])
    loads = [partial(registry.prepare(manifest, store).load, ReadAhead, None) for manifest in manifests]
    warm = [_warm(load, inputs) for load in loads]
    count = min(MAX_ROUNDS, max(MIN_ROUNDS, math.ceil(_ROUNDS_S / (2 * max(once_s for _, once_s in warm)))))
    rounds = in_turns(loads, inputs, count)
    serving = that_serve([manifest.model for manifest in manifests], lowered)
    served = soonest(serving)
    fast = [served.form, *(form.form for form in faster(serving, served))][-1]
    return [
        Profile(
            model_id=manifest.model.model_id,
            form=manifest.model.form,
            precision=manifest.model.dtype,
            agreement=manifest.agreement,
            is_served=manifest.model is served,
            is_fastest=manifest.model.form == fast,
            size_bytes=manifest.model.weights_bytes,
            workspace_bytes=workspace,
            load_s=statistics.median(each.load_s for each in own),
            first_s=statistics.median(each.first_s for each in own),
            miss_s=statistics.median(each.miss_s for each in own),
            hit_s=statistics.median(each.hit_s for each in own),
            miss_over_hit=Quartiles.of([each.miss_s / first.hit_s for each, first in zip(own, rounds[0], strict=True)]),
            cpu_miss_over_hit=statistics.median(
                each.cpu_miss_s / first.cpu_hit_s for each, first in zip(own, rounds[0], strict=True)
            ),
            rounds=count,
            cold=_profile_cold(store, manifest, load, inputs) if cold else None,
        )
        for manifest, load, (workspace, _), own in zip(manifests, loads, warm, rounds, strict=True)
    ]


def _warm(load: Callable[[], LoadedModel], inputs: Tensors) -> tuple[int, float]:
    """Bring a model to its usual speed; return the bytes and the seconds of an execution."""
    model = load()
    try:
        model.run(inputs)  # reads the weights, and lets the libraries below torch set up for these shapes
        return workspace_bytes(lambda: model.run(inputs)), _seconds(lambda: model.run(inputs))
    finally:
        model.unload()


def summarize(profiles: Sequence[Profile]) -> Summary:
    """Summarize the forms that are served, of at least one model."""
    profiles = [each for each in profiles if each.is_served]
    ratios = {each.model_id: each.miss_over_hit.median for each in profiles}
    cold = {each.model_id: (each.size_bytes, each.cold) for each in profiles if each.cold is not None}
    read_s = sum(each.read_s for _, each in cold.values())
    bandwidth = sum(size_bytes for size_bytes, _ in cold.values()) / read_s if read_s else None
    return Summary(
        miss_over_hit=statistics.geometric_mean(ratios.values()),
        cpu_miss_over_hit=statistics.geometric_mean(each.cpu_miss_over_hit for each in profiles),
        worst=max(ratios, key=lambda model_id: ratios[model_id]),
        read_bytes_per_s=bandwidth,
        cold_over_bound={
            model_id: each.over_bound(size_bytes / bandwidth)
            for model_id, (size_bytes, each) in cold.items()
            if bandwidth
        },
    )


def as_json(
    profiles: Sequence[Profile], refused: Mapping[str, Mapping[str, Refusal]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Convert to one object per model, with times in milliseconds; what was not measured is null.

    The numbers are those of the model as it was published; ``forms`` has them for each form, ``served`` names the
    one that workers load, and ``fastest`` the last one that it goes over to. ``refused`` says by model and form why
    there is none.
    """
    summary = summarize(profiles)
    forms: dict[str, list[Profile]] = {}
    for each in profiles:
        forms.setdefault(each.model_id, []).append(each)
    return [
        {
            "model": model_id,
            **_as_json(own[0], summary),
            "served": next(each.form for each in own if each.is_served),
            "fastest": next(each.form for each in own if each.is_fastest),
            "forms": [
                {
                    "form": each.form,
                    "precision": each.precision,
                    "agreement": asdict(each.agreement) if each.agreement else None,
                    **_as_json(each, summary),
                }
                for each in own
            ],
            "refused": [{"form": form, **asdict(refusal)} for form, refusal in refused.get(model_id, {}).items()],
        }
        for model_id, own in forms.items()
    ]


def _as_json(each: Profile, summary: Summary) -> dict[str, Any]:
    over_bound = summary.cold_over_bound.get(each.model_id) if each.is_served else None
    return {
        "size_bytes": each.size_bytes,
        "workspace_bytes": each.workspace_bytes,
        "load_ms": _ms(each.load_s),
        "first_ms": _ms(each.first_s),
        "miss_ms": _ms(each.miss_s),
        "hit_ms": _ms(each.hit_s),
        "miss_over_hit": round(each.miss_over_hit.median, 4),
        "miss_over_hit_quartiles": [round(each.miss_over_hit.low, 4), round(each.miss_over_hit.high, 4)],
        "cpu_miss_over_hit": round(each.cpu_miss_over_hit, 4),
        "rounds": each.rounds,
        "cold_load_ms": _ms(each.cold.load_s) if each.cold else None,
        "cold_miss_ms": _ms(each.cold.miss_s) if each.cold else None,
        "cold_over_bound": None if over_bound is None else round(over_bound, 4),
        "disk_bytes_per_s": round(summary.read_bytes_per_s) if summary.read_bytes_per_s else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A miss and the hit after it, in seconds, and in seconds of processor time."""

    load_s: float
    first_s: float
    hit_s: float
    cpu_load_s: float
    cpu_miss_s: float
    cpu_hit_s: float

    @property
    def miss_s(self) -> float:
        """A load and the first execution."""
        return self.load_s + self.first_s


def in_turns(loads: Sequence[Callable[[], LoadedModel]], inputs: Tensors, count: int) -> list[list[Round]]:
    """Take misses and hits of every model in turns, until there are ``count`` of each; return the rounds of each.

    Whatever disturbs the machine then disturbs all of them alike. A turn is several rounds, and one before them that
    does not count: it finds the caches of the processor full of what ran before.
    """
    rounds: list[list[Round]] = [[] for _ in loads]
    while len(rounds[-1]) < count:
        for own, load in zip(rounds, loads, strict=True):
            _miss_and_hit(load, inputs)
            own += [_miss_and_hit(load, inputs) for _ in range(min(_TURN, count - len(own)))]
    return rounds


def _miss_and_hit(load: Callable[[], LoadedModel], inputs: Tensors) -> Round:
    stamps = [_clocks()]
    model = load()
    try:
        stamps.append(_clocks())
        for _ in range(2):
            model.run(inputs)
            stamps.append(_clocks())
    finally:
        model.unload()
    (began, cpu_began), (loaded, cpu_loaded), (first, cpu_first), (hit, cpu_hit) = stamps
    return Round(
        load_s=loaded - began,
        first_s=first - loaded,
        hit_s=hit - first,
        cpu_load_s=cpu_loaded - cpu_began,
        cpu_miss_s=cpu_first - cpu_began,
        cpu_hit_s=cpu_hit - cpu_first,
    )


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _profile_cold(
    store: ModelStore, manifest: Manifest, load: Callable[[], LoadedModel], inputs: Tensors
) -> ColdProfile:
    paths = [store.blob_path(file.name) for file in manifest.files]
    rounds, reads = [], []
    for _ in range(COLD_ROUNDS):
        for path in paths:
            _drop_from_page_cache(path)
        rounds.append(_miss_and_hit(load, inputs))
        for path in paths:
            _drop_from_page_cache(path)
        reads.append(_seconds(lambda: _read_files(paths)))
    return ColdProfile(
        load_s=statistics.median(each.load_s for each in rounds),
        rounds=tuple((each.miss_s, each.hit_s) for each in rounds),
        read_s=statistics.median(reads),
    )


def _drop_from_page_cache(path: Path) -> None:
    """Make the kernel drop the pages of a file, again and again while a read of them is in progress."""
    size_bytes = path.stat().st_size
    until_s = time.monotonic() + _DROP_WITHIN_S
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while True:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not is_resident(descriptor, size_bytes):
                return
            if time.monotonic() > until_s:
                raise StoreError(
                    f"weights {path} cannot be dropped from memory: another process has them mapped, or the store is "
                    "not on a disk; stop what serves them, or leave --cold out"
                )
            time.sleep(_DROP_RETRY_S)
    finally:
        os.close(descriptor)


def _read_files(paths: Sequence[Path]) -> None:
    chunk = bytearray(_READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(chunk):
                pass


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)

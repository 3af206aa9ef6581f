"""Measure what each optimization buys: the figures behind what publishing does to every model."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve_app.core.catalog import ModelEntry, PublishedModel
from serve_app.models.builders import registry
from serve_app.models.graph_optimizations import fold, foldable_norms
from serve_app.models.module_call import call_module, ordered_outputs
from serve_app.store.manifest import ExecutionFormat

_ROUNDS = 11

_THREADS = 2

#: Compared with ``eager``: the module as its builder makes it, with one thread.
VARIANTS = ("channels_last", "folded", "both", "bfloat16", "two_threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model: seconds of a hit of ``eager``, and the time of each variant as a part of that (medians).

    ``bfloat16`` and ``two_threads`` are on top of ``both``. ``agreement`` is the share of random images of which
    bfloat16 finds the same best class as float32.
    """

    model_id: str
    eager_s: float
    ratios: dict[str, float]
    agreement: float

    def as_json(self) -> dict[str, Any]:
        """Convert to one flat object, with times in milliseconds."""
        ratios = {name: round(ratio, 4) for name, ratio in self.ratios.items()}
        eager_ms = round(self.eager_s * 1000, 4)
        return {"model": self.model_id, "eager_ms": eager_ms, **ratios, "bfloat16_agreement": self.agreement}


def compare(entry: ModelEntry, published: PublishedModel) -> Comparison:
    """Run every variant once a round, each on the same image; times are of one core.

    Args:
        entry: names the builder.
        published: names the weights and the shape of an image.

    Raises:
        StoreError: the model cannot be built any more.
    """
    variants = dict(_variants(entry, published))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    agreed = []
    generator = torch.Generator().manual_seed(0)
    with _threads_restored(), torch.inference_mode():
        for round_number in range(_ROUNDS + 1):
            image = torch.randn((1, *published.inputs[0].shape[1:]), generator=generator)
            best = {}
            for name, call in variants.items():
                began_s = time.perf_counter()
                best[name] = int(call(image).argmax())
                if round_number:  # the first call sets the libraries up
                    seconds[name].append(time.perf_counter() - began_s)
            agreed.append(best["bfloat16"] == best["eager"])
    return Comparison(
        model_id=entry.model_id,
        eager_s=statistics.median(seconds["eager"]),
        ratios={
            name: statistics.median(
                variant_s / eager_s for variant_s, eager_s in zip(seconds[name], seconds["eager"], strict=True)
            )
            for name in VARIANTS
        },
        agreement=statistics.mean(agreed),
    )


def _variants(
    entry: ModelEntry, published: PublishedModel
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    module = registry.build(entry, published.weights_actual)
    folded = copy.deepcopy(module)
    fold(folded, foldable_norms(folded, entry.model_id))
    both = _channels_last(folded)
    yield "eager", _runner(published, module)
    yield "channels_last", _runner(published, _channels_last(module), channels_last=True)
    yield "folded", _runner(published, folded)
    yield "both", _runner(published, both, channels_last=True)
    yield (
        "bfloat16",
        _runner(published, copy.deepcopy(both).to(torch.bfloat16), channels_last=True, dtype=torch.bfloat16),
    )
    yield "two_threads", _runner(published, both, channels_last=True, threads=_THREADS)


def _runner(
    published: PublishedModel,
    module: nn.Module,
    *,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(image: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(threads)
        contract, execution = published.contract, ExecutionFormat(channels_last=channels_last)
        outputs = call_module(module, contract.inputs, (image,), execution, dtype)
        return ordered_outputs(outputs, contract.outputs)[0]

    return call


def _channels_last(module: nn.Module) -> nn.Module:
    changed = copy.deepcopy(module)
    for child in changed.modules():
        if isinstance(child, nn.Conv2d):
            child.weight.data = child.weight.contiguous(memory_format=torch.channels_last)
    return changed


@contextmanager
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)

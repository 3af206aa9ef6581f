"""Measure what each optimization buys: the figures behind what publishing does to every model."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serve_app.core.catalog import ModelEntry, PublishedModel
from serve_app.models.builders import registry
from serve_app.models.graph_optimizations import fold, foldable_norms
from serve_app.models.module_call import call_module, ordered_outputs
from serve_app.models.profiling.photographs import crops, noise
from serve_app.models.sources.pretrained import WeightSource
from serve_app.store.manifest import ExecutionFormat

_ROUNDS = 11

_THREADS = 2

#: Compared with ``eager``: the module as its builder makes it, with one thread.
VARIANTS = ("channels_last", "folded", "both", "bfloat16", "two_threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model: seconds of a hit of ``eager``, and the time of each variant as a part of that (medians).

    ``bfloat16`` and ``two_threads`` are on top of ``both``. ``agreement`` and ``both_agreement`` are the shares of
    images of which bfloat16 and ``both`` find the same best class as ``eager``; ``sure_agreement`` is that of bfloat16
    among the images of which ``eager`` is sure: with a probability above one half; None where there are none.
    ``images`` says how many there are of what.
    """

    model_id: str
    eager_s: float
    ratios: dict[str, float]
    agreement: float
    sure_agreement: float | None
    both_agreement: float
    images: str

    def as_json(self) -> dict[str, Any]:
        """Convert to one flat object, with times in milliseconds."""
        ratios = {name: round(ratio, 4) for name, ratio in self.ratios.items()}
        eager_ms = round(self.eager_s * 1000, 4)
        return {
            "model": self.model_id,
            "eager_ms": eager_ms,
            **ratios,
            "bfloat16_agreement": round(self.agreement, 4),
            "bfloat16_agreement_where_sure": self.sure_agreement,
            "both_agreement": round(self.both_agreement, 4),
            "images": self.images,
        }


def compare(
    entry: ModelEntry, published: PublishedModel, photographs: Sequence[Path], source: WeightSource | None = None
) -> Comparison:
    """Run every variant once a round, each on the same image; times are of one core.

    Args:
        entry: names the builder.
        published: names the weights and the shape of an image.
        photographs: what variants of a model with real weights must agree on; of random weights, noise tells as much.
        source: fetches files of weights.

    Raises:
        StoreError: the model cannot be built any more.
        ConfigError: a photograph cannot be read.
    """
    variants = dict(_variants(entry, published, source))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    images, what = noise(published.inputs[0].shape[1:], _ROUNDS + 1), "of noise"
    with _threads_restored(), torch.inference_mode():
        for round_number, image in enumerate(images):
            for name, call in variants.items():
                began_s = time.perf_counter()
                call(image)
                if round_number:  # the first call sets the libraries up
                    seconds[name].append(time.perf_counter() - began_s)
        if photographs and published.task.image is not None and not published.has_random_weights:
            images, what = crops(photographs, published.task.image), f"cut out of {len(photographs)} photographs"
        bfloat16, both = (_agreement(variants["eager"], variants[name], images) for name in ("bfloat16", "both"))
    return Comparison(
        model_id=entry.model_id,
        eager_s=statistics.median(seconds["eager"]),
        ratios={
            name: statistics.median(
                variant_s / eager_s for variant_s, eager_s in zip(seconds[name], seconds["eager"], strict=True)
            )
            for name in VARIANTS
        },
        agreement=bfloat16.share,
        sure_agreement=bfloat16.share_where_sure,
        both_agreement=both.share,
        images=f"{len(images)} {what}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agreement:
    share: float
    share_where_sure: float | None


def _agreement(
    reference: Callable[[torch.Tensor], torch.Tensor],
    other: Callable[[torch.Tensor], torch.Tensor],
    images: Sequence[torch.Tensor],
) -> _Agreement:
    agreed, sure = [], []
    for image in images:
        logits = reference(image)
        agreed.append(int(other(image).argmax()) == int(logits.argmax()))
        sure.append(float(logits.softmax(-1).max()) > 0.5)
    agreed_sure = [agrees for agrees, is_sure in zip(agreed, sure, strict=True) if is_sure]
    return _Agreement(
        share=statistics.mean(agreed),
        share_where_sure=statistics.mean(agreed_sure) if agreed_sure else None,
    )


def _variants(
    entry: ModelEntry, published: PublishedModel, source: WeightSource | None
) -> Iterator[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    module = registry.build(entry, published.weights_actual, source)
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

"""Quantize an ONNX graph to int8: its matrix products and convolutions, with the ranges that its probes show."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from serve_app.core.catalog import PublishedModel
from serve_app.errors import StoreError
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.publishing.probe_agreement import probes
from serve_app.models.runtimes.processor import multiplies_int8
from serve_app.models.threads import one_thread
from serve_app.store.manifest import Manifest
from serve_app.tasks.tensors import Tensors

#: The most probes that ranges are taken from, the least, and the seconds that the model may take for them.
_MOST, _LEAST, _WITHIN_S = 64, 8, 20.0

#: Of the probes; those on which the agreement is measured are others.
_SEED: Final = 1


def quantize_graph(mapped: Manifest, graph: Path, folder: Path) -> Path:
    """Write a graph with weights and activations of 8 bits, in a process of its own; return its path.

    Weights have a scale for each channel. The scales of activations come from the least and the largest number that the
    probes of the model show.

    Args:
        mapped: the model as it was published.
        graph: of the same model in float32.
        folder: where to.

    Raises:
        StoreError: the library cannot quantize it, or crashes.
    """
    target = folder / "int8.onnx"
    arguments = {"manifest": mapped.to_json().decode(), "graph": str(graph), "target": str(target)}
    call_in_fresh_process(f"{__name__}:quantize_here", arguments, mapped.model.builder, "quantized")
    return target


def quantize_here(manifest: str, graph: str, target: str) -> dict[str, Any]:
    """Quantize in this process; the arguments can be carried by JSON."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = Manifest.from_json(manifest.encode(), "of the publisher").model
    # It says much that nobody needs, to the root logger.
    logging.disable(logging.WARNING)
    prepared = Path(target).with_name("prepared.onnx")
    try:
        with one_thread():
            quant_pre_process(graph, str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared), target, _Reader(model), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=not multiplies_int8(),
            )  # fmt: skip
    except StoreError:
        raise
    except Exception as error:
        first, *_ = str(error).splitlines() or [""]
        raise StoreError(f"onnxruntime cannot quantize it ({type(error).__name__}: {first})") from error
    return {}


class _Reader:
    """The probes, as the library asks for them."""

    def __init__(self, model: PublishedModel) -> None:
        count = max(_LEAST, min(_MOST, math.ceil(_WITHIN_S / max(model.profile.exec_s, 1e-6))))
        self._probes: Iterator[Tensors] = probes(model, count, _SEED)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next inputs; None after the last ones."""
        inputs = next(self._probes, None)
        return None if inputs is None else dict(inputs)

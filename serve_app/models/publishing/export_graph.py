"""Export a published module as an ONNX graph, in a process of its own: a trace calls foreign code.

The exporter records what the module does with one input. A module that decides by the numbers in its tensors would do
otherwise with others, so the trace of a foreign module that reads numbers is refused. Those of known libraries read
shapes, which are compared at two sizes of every free axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from serve_app.core.contract import Contract, TensorSpec
from serve_app.errors import StoreError
from serve_app.models.module_call import call_module, ordered_outputs
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.profiling.grid import trial_sizes
from serve_app.models.profiling.measure_published import KNOWN_BUILDERS
from serve_app.models.runtimes.torch_runtime import TorchRuntime
from serve_app.models.threads import one_thread
from serve_app.store.manifest import Manifest, ManifestKey
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import probe

#: The version of ONNX's operators.
_OPSET: Final = 18


def export_graph(store: ModelStore, key: ManifestKey, builder: str, folder: Path) -> tuple[Path, list[list[Any]]]:
    """Write the graph of a published module into a folder.

    Args:
        store: has the module.
        key: of its manifest.
        builder: of the module, for messages.
        folder: is empty.

    Returns:
        The path of the graph, and the outputs of the module for the inputs of ``trial_inputs``.

    Raises:
        StoreError: the module cannot be exported, or its process crashes.
    """
    arguments = {"root": str(store.root), "name": key.name, "stem": key.stem, "folder": str(folder)}
    counts = call_in_fresh_process(f"{__name__}:export_here", arguments, f"the export of {builder}")
    with np.load(folder / "answers.npz") as answers:
        return folder / "graph.onnx", [
            [answers[f"{trial}_{output}"] for output in range(counts["outputs"])] for trial in range(counts["trials"])
        ]


def trial_inputs(contract: Contract) -> list[dict[str, NDArray[Any]]]:
    """Return the inputs that a graph is compared on with its module: at two sizes of every free axis."""
    return [probe(contract, sizes, seed) for seed, sizes in enumerate(trial_sizes(contract.axes))]


def export_here(root: str, name: str, stem: str, folder: str) -> dict[str, Any]:
    """Export a module in this process; returns how many trials and outputs it has written."""
    store = ModelStore(Path(root))
    manifest = store.read(ManifestKey(name=name, stem=stem))
    contract = manifest.model.contract
    prepared = TorchRuntime().prepare(manifest, store)
    model = prepared.load()
    inputs = trial_inputs(contract)
    with one_thread(), torch.inference_mode():
        module = _InOrder(prepared.template.module, manifest, prepared.template.dtype)
        trials = [[torch.from_numpy(each[spec.name]) for spec in contract.inputs] for each in inputs]
        answers = [module(*tensors) for tensors in trials]
        reads_numbers = _export(module, trials[-1], contract, Path(folder) / "graph.onnx")
    if reads_numbers and not manifest.model.builder.startswith(KNOWN_BUILDERS):
        raise StoreError(f"what it does may depend on the numbers in its tensors ({reads_numbers})")
    arrays = {
        f"{trial}_{output}": tensor.numpy()
        for trial, outputs in enumerate(answers)
        for output, tensor in enumerate(outputs)
    }
    np.savez(Path(folder) / "answers.npz", allow_pickle=False, **arrays)
    model.unload()
    return {"trials": len(inputs), "outputs": len(contract.outputs)}


class _InOrder(nn.Module):
    """A module that takes the inputs of its contract by position, and returns the outputs so."""

    def __init__(self, module: nn.Module, manifest: Manifest, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._inputs: Sequence[TensorSpec] = manifest.model.inputs
        self._outputs: Sequence[TensorSpec] = manifest.model.outputs
        self._execution = manifest.execution
        self._dtype = dtype

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs, in the order of the contract."""
        results = call_module(self.module, self._inputs, tensors, self._execution, self._dtype)
        return tuple(ordered_outputs(results, self._outputs))


def _export(module: nn.Module, tensors: list[torch.Tensor], contract: Contract, path: Path) -> str:
    """Write a module as a graph; return how the trace has read numbers, and nothing if it has not."""
    axes = {
        spec.name: {at: axis for at, axis in enumerate(spec.axes) if axis}
        for spec in (*contract.inputs, *contract.outputs)
    }
    # Its fused operator of attention has no counterpart in ONNX.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            # The other exporter needs two more packages, and takes ten times as long.
            torch.onnx.export(
                module.eval(), tuple(tensors), str(path), dynamo=False, opset_version=_OPSET,
                input_names=[spec.name for spec in contract.inputs],
                output_names=[spec.name for spec in contract.outputs],
                dynamic_axes={name: free for name, free in axes.items() if free},
            )  # fmt: skip
    except Exception as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise StoreError(f"torch cannot export it ({first})") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    reads = torch.jit.TracerWarning  # type: ignore[attr-defined]
    return next((str(each.message).partition(".")[0] for each in seen if issubclass(each.category, reads)), "")

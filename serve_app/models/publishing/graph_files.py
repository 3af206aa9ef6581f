"""Write an ONNX graph as the files that its runtime loads in milliseconds."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from serve_app.core.catalog import ModelEntry, RuntimeName
from serve_app.core.contract import Contract
from serve_app.core.precision import Dtype
from serve_app.errors import StoreError
from serve_app.models.publishing.described import runs_row_by_row
from serve_app.models.runtimes import onnx_runtime, openvino_runtime
from serve_app.models.runtimes.session import reason_of
from serve_app.store.manifest import BlobFile
from serve_app.store.model_store import ModelStore

#: Initializers below this size stay within the graph.
_EXTERNAL_BYTES: Final = 1024

#: Stands in the graph for the name of the blob of weights, which is known only once they are written. As long as that
#: name, so that the bytes of a graph can be exchanged.
_PLACEHOLDER: Final = f"{'0' * 64}.weights"

#: Where a report of openvino names the operators that it cannot convert.
_NOT_CONVERTED: Final = re.compile(r"(?:Conversion is failed for|No conversion rule found for operations): (.+)")

#: Writes the files of the graph at a path; raises ``StoreError`` where the library cannot run it.
WriteGraph = Callable[[ModelStore, ModelEntry, Path, Contract], tuple[BlobFile, ...]]


def write_for_onnxruntime(store: ModelStore, entry: ModelEntry, path: Path, contract: Contract) -> tuple[BlobFile, ...]:
    """Write the optimized graph, and its weights as packed for this processor."""
    if entry.dtype != "float32":
        raise StoreError(
            f"{entry.builder}: onnxruntime computes in the types of the graph; leave dtype out, or add "
            "runtime: openvino"
        )
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "graph.onnx"
        options = onnx_runtime.session_options()
        options.optimized_model_filepath = str(optimized)
        for key, value in (
            ("session.optimized_model_external_initializers_file_name", _PLACEHOLDER),
            ("session.optimized_model_external_initializers_min_size_in_bytes", str(_EXTERNAL_BYTES)),
            ("session.save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(key, value)
        onnx_runtime.library().InferenceSession(str(path), options, providers=onnx_runtime.PROVIDERS)
        graph = optimized.read_bytes()
        weights = optimized.with_name(_PLACEHOLDER)
        files = _put_weights(store, weights, "weights")
        if files:
            graph = graph.replace(_PLACEHOLDER.encode(), files[0].name.encode())
        return (*files, _put_graph(store, graph, "onnx"))


def write_for_openvino(store: ModelStore, entry: ModelEntry, path: Path, contract: Contract) -> tuple[BlobFile, ...]:
    """Write the compiled graph, and the weights that it refers to."""
    core, ov = openvino_runtime.core(), openvino_runtime.library()
    texts = next((spec.name for spec in (*contract.inputs, *contract.outputs) if spec.datatype == "BYTES"), None)
    if texts is not None:
        raise StoreError(f"{entry.builder}: openvino has no texts, as in {texts!r}; write runtime: onnxruntime")
    dtype: Dtype = entry.dtype
    with tempfile.TemporaryDirectory() as folder:
        model, weights = Path(folder) / "model.xml", Path(folder) / "model.bin"
        try:
            ov.save_model(_at_one_size(core.read_model(str(path)), contract), str(model), compress_to_fp16=False)
            compiled = core.compile_model(
                core.read_model(str(model), str(weights)), openvino_runtime.DEVICE, openvino_runtime.settings(dtype)
            )
            graph = compiled.export_model().getvalue()
        except Exception as error:
            raise StoreError(f"{entry.builder}: {_why_not_converted(error)}; write runtime: onnxruntime") from error
        del compiled
        return (*_put_weights(store, weights, "bin"), _put_graph(store, graph, "blob"))


def _at_one_size(graph: Any, contract: Contract) -> Any:
    """Return a graph whose rows are executed one by one for batches of one: it need not be prepared for others."""
    if runs_row_by_row(contract):
        graph.reshape({spec.name: [1, *spec.shape[1:]] for spec in contract.inputs})
    return graph


def _why_not_converted(error: Exception) -> str:
    """Return which operators openvino cannot convert, with what it says of the first; otherwise all that it says."""
    text = str(error)
    operators = _NOT_CONVERTED.search(text)
    if operators is None:
        return f"openvino cannot convert it ({reason_of(error)})"
    reason = text[: operators.start()].partition(" with a message:")[2].partition("\n-- ")[0].strip()
    last = reason.splitlines()[-1].strip().rstrip(".") if reason else "no rule for them"
    return f"openvino cannot convert its operators {operators[1].strip()} ({last})"


WRITERS: Final[Mapping[RuntimeName, WriteGraph]] = {
    "onnxruntime": write_for_onnxruntime,
    "openvino": write_for_openvino,
}


def _put_weights(store: ModelStore, path: Path, ending: str) -> tuple[BlobFile, ...]:
    """Store a file of weights; a graph may have none."""
    if not path.is_file() or not path.stat().st_size:
        return ()
    return (store.put_blob(lambda place: _copy(path, place), ending=ending),)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _put_graph(store: ModelStore, content: bytes, ending: str) -> BlobFile:
    return store.put_blob(lambda place: _write_bytes(place, content), role="graph", ending=ending)


def _write_bytes(target: Path, content: bytes) -> None:
    target.write_bytes(content)

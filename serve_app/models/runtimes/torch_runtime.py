"""torch: maps the files of a model, and binds the tensors to a module without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest, StoreError
from serve_app.models.module_call import call_module, ordered_outputs
from serve_app.models.module_template import ModuleTemplate
from serve_app.models.readahead import ReadAhead
from serve_app.models.runtimes.base import OnUnload, StartReadAhead
from serve_app.models.runtimes.blob_files import map_blob
from serve_app.models.threads import threads_of_one
from serve_app.store.manifest import Manifest
from serve_app.store.model_store import ModelStore
from serve_app.tasks.tensors import NUMPY_TYPES, Tensors


class TorchModel:
    """A module with its weights bound.

    Args:
        template: the module, with its weights bound.
        readers: read the weights into the page cache meanwhile; an unload stops them.
        on_unload: called after the unload.
    """

    def __init__(
        self,
        template: ModuleTemplate,
        readers: Sequence[ReadAhead] = (),
        on_unload: OnUnload | None = None,
    ) -> None:
        self._readers = readers
        self._on_unload = on_unload
        model = template.manifest.model
        self.model_id = model.model_id
        self.weights_bytes = model.weights_bytes
        self._row_by_row = model.row_by_row
        self._inputs = model.contract.inputs
        self._outputs = model.contract.outputs
        self._template: ModuleTemplate | None = template

    def run(self, inputs: Tensors, threads: int = 0) -> dict[str, NDArray[Any]]:
        """Execute the model, see ``LoadedModel.run``."""
        template = self._template
        if template is None:
            raise StoreError(f"model {self.model_id!r} was unloaded; load it before running it")
        for reader in self._readers:
            reader.prioritize()
        # torch takes neither read-only nor negatively strided arrays without complaint.
        tensors = [
            torch.from_numpy(np.require(inputs[spec.name], NUMPY_TYPES[spec.datatype], ["C", "W"]))
            for spec in self._inputs
        ]
        with torch.inference_mode(), threads_of_one(threads):
            if not self._row_by_row:
                results = self._call(template, tensors)
            else:
                # One at a time: the workspace of one row is what the model is counted with, and on a CPU a batch of
                # images is hardly faster.
                rows = [
                    self._call(template, row)
                    for row in zip(*(torch.split(tensor, 1) for tensor in tensors), strict=True)
                ]
                results = rows[0] if len(rows) == 1 else [torch.cat(parts) for parts in zip(*rows, strict=True)]
            return {
                spec.name: np.array(result.numpy(), dtype=NUMPY_TYPES[spec.datatype])
                for spec, result in zip(self._outputs, results, strict=True)
            }

    def _call(self, template: ModuleTemplate, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        execution = template.manifest.execution
        try:
            results = call_module(template.module, self._inputs, tensors, execution, template.dtype)
        except IndexError as error:
            raise InvalidRequest(f"model {self.model_id!r} cannot run on these inputs ({error})") from error
        return ordered_outputs(results, self._outputs)

    def unload(self) -> None:
        """Give the memory back at once, see ``LoadedModel.unload``."""
        if self._template is not None:
            manifest = self._template.manifest
            for reader in self._readers:
                reader.stop()
            self._template.unbind_weights()
            self._template = None
            if self._on_unload is not None:
                self._on_unload(manifest, self._readers)


class PreparedModule:
    """A module without weights, to which a load binds them."""

    def __init__(self, template: ModuleTemplate, store: ModelStore) -> None:
        self.template = template
        self._store = store

    @property
    def manifest(self) -> Manifest:
        """What was published."""
        return self.template.manifest

    def load(self, read_ahead: StartReadAhead = ReadAhead, on_unload: OnUnload | None = None) -> TorchModel:
        """Map the files of the model and bind its weights, see ``PreparedModel.load``.

        Files that are not in the page cache are read in the background.
        """
        manifest = self.template.manifest
        model_id = manifest.model.model_id
        for file in manifest.files:
            self._store.require_verified(file, model_id)
        weights = [file for file in manifest.files if file.role == "weights"]
        mapped = [map_blob(self._store, file, model_id) for file in weights]
        readers = [
            read_ahead(self._store.blob_path(file.name), file.size_bytes)
            for file, (_, is_warm) in zip(weights, mapped, strict=True)
            if not is_warm
        ]
        self.template.bind_weights([file for file, _ in mapped])
        return TorchModel(self.template, readers, on_unload)


class TorchRuntime:
    """The runtime of modules that a builder makes again in every process."""

    def environment(self) -> str:
        """Return nothing: the stored tensors are those of any processor, see ``Runtime.environment``."""
        return ""

    def prepare(self, manifest: Manifest, store: ModelStore) -> PreparedModule:
        """Build the module without weights, see ``Runtime.prepare``."""
        return PreparedModule(ModuleTemplate(manifest, _structure(manifest, store)), store)


def _structure(manifest: Manifest, store: ModelStore) -> bytes | None:
    """Return what the store has of the structure of a module, if anything."""
    graph = next((file for file in manifest.files if file.role == "graph"), None)
    if graph is None:
        return None
    store.require_verified(graph, manifest.model.model_id)
    return store.blob_path(graph.name).read_bytes()

"""Programs that torch.export has written: ``export:FILE.pt2``.

The program is its own structure: a copy of the file without the weights is stored beside them, some kilobytes that a
worker reads once. A program may hold pickles, which can run any code when they are read; such a file is refused.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from serve_app.core.contract import BATCH, FREE, Axis, TensorSpec
from serve_app.core.reference import parse_reference
from serve_app.core.task import TaskSpec
from serve_app.errors import StoreError
from serve_app.models.builders.base import Metadata
from serve_app.models.builders.described_module import DescribedModule, constants_as_buffers
from serve_app.models.builders.refusals import foreign_reason
from serve_app.models.sources.pretrained import PRETRAINED, Pretrained

_DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}

#: The largest size that an axis without a limit is said to have.
_NO_LIMIT = 1 << 31


class ExportBuilder:
    """``export:FILE.pt2``, where FILE is a path or another reference.

    The interface is read from the program: the names, datatypes and shapes of its inputs, and the ranges of its axes.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, reference: str) -> None:
        self._reference = reference

    def pretrained_source(self) -> Pretrained:
        """Return where the file is."""
        reference = parse_reference(self._reference)
        file = Path(reference.place) if reference.kind == "file" else None
        return Pretrained(references=(self._reference,), file=file)

    def construct(self, weights: str) -> nn.Module:
        """Refuse: a program has its weights with it."""
        raise StoreError(
            f"export:{self._reference} cannot get the weights {weights!r}, a program brings its own; leave out "
            "weights, and name a file that can be read"
        )

    def pretrained(self, file: Path | None) -> nn.Module:
        """Read the program."""
        if file is None:
            return self.construct(PRETRAINED)
        _require_no_code(self._reference, file)
        return _Program(_load(self._reference, file))

    def metadata(self) -> Metadata:
        """Return what holds for every program; the module itself knows more, see ``DescribedModule``."""
        return Metadata(task=TaskSpec())


def rebuild_program(structure: bytes) -> nn.Module:
    """Make the module of a program from its structure; its weights take no memory."""
    return _Program(_load("of the store", io.BytesIO(structure)))


class _Program(DescribedModule):
    """Calls a program with the tensors among its inputs, in order."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self._values = [getattr(spec.arg, "value", None) for spec in _input_specs(program)]
        self._is_tensor = [
            hasattr(spec.arg, "name") and not hasattr(spec.arg, "value") for spec in _input_specs(program)
        ]
        self._structure_of_inputs = program.call_spec.in_spec
        self.metadata = _metadata(program)
        self.program = program.module()
        constants_as_buffers(self.program)
        self.structure = _without_weights(program)

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Call the program."""
        given = iter(tensors)
        leaves = [
            next(given) if is_tensor else value for is_tensor, value in zip(self._is_tensor, self._values, strict=True)
        ]
        arguments, keywords = pytree.tree_unflatten(leaves, self._structure_of_inputs)
        return self.program(*arguments, **keywords)


def _load(reference: str, file: Path | io.BytesIO) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(file)
    except Exception as error:
        # The library raises what it likes on damaged files.
        raise StoreError(
            f"export:{reference} cannot be read ({foreign_reason(error)}); write it with torch.export.save of the "
            "installed torch"
        ) from error


def _require_no_code(reference: str, file: Path) -> None:
    """Require that an archive has no pickle that can run code."""
    if not file.is_file():
        raise StoreError(f"export:{reference}: there is no file {file}; name one that torch.export.save has written")
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if any("/data/aotinductor/" in name for name in names):
                raise StoreError(
                    f"export:{reference} is a package of AOTInductor, which can never be unloaded; save the exported "
                    "program itself with torch.export.save"
                )
            if not any(name.endswith("/models/model.json") for name in names):
                raise StoreError(f"export:{reference} is no exported program; write it with torch.export.save")
            is_unsafe = any(_is_unsafe(name, archive) for name in names)
    except (OSError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"export:{reference} cannot be read ({error}); write it with torch.export.save of the installed torch"
        ) from error
    if is_unsafe:
        raise StoreError(
            f"export:{reference} holds pickled objects, which may run any code; export it from a module and examples "
            "that consist of plain tensors"
        )


def _is_unsafe(name: str, archive: zipfile.ZipFile) -> bool:
    if name.endswith("_config.json"):
        config = json.loads(archive.read(name)).get("config", {})
        return any(entry.get("use_pickle") for entry in config.values())
    if "/data/sample_inputs/" in name and archive.getinfo(name).file_size:
        try:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except Exception:
            return True
    return "custom_obj" in name


def _input_specs(program: Any) -> list[Any]:
    return [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]


def _metadata(program: Any) -> Metadata:
    """Read the inputs of a program, and the ranges of their free axes."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    ranges = {str(expression): limits for expression, limits in program.range_constraints.items()}
    names: dict[str, str] = {}
    axes: dict[str, Axis] = {}
    inputs = []
    for spec in _input_specs(program):
        value = values.get(getattr(spec.arg, "name", None))
        if not isinstance(value, torch.Tensor):
            continue
        name = spec.arg.name
        if value.dtype not in _DATATYPES:
            raise StoreError(f"input {name!r} is of {value.dtype}, for which the protocol has no datatype")
        for position, size in enumerate(value.shape):
            if not isinstance(size, int):
                is_batch = position == 0 and BATCH not in names.values()
                axis = names.setdefault(str(size), BATCH if is_batch else f"{name}_{position}")
                limits = _axis(axis, size, ranges)
                if limits is not None:
                    axes[axis] = limits
        inputs.append(
            TensorSpec(
                name=name,
                datatype=_DATATYPES[value.dtype],
                shape=tuple(size if isinstance(size, int) else FREE for size in value.shape),
                axes=tuple("" if isinstance(size, int) else names[str(size)] for size in value.shape),
            )
        )
    return Metadata(task=TaskSpec(), inputs=tuple(inputs), axes=tuple(axes.values()))


def _axis(name: str, size: Any, ranges: Mapping[str, Any]) -> Axis | None:
    """Return the limits of an axis; None if it has no upper one. Its size may be a multiple of a symbol."""
    multiple, symbol = size.node.expr.as_coeff_Mul()
    limits = ranges.get(str(symbol))
    if limits is None or limits.upper >= _NO_LIMIT:
        return None
    multiple = max(1, int(multiple))
    least = max(1, int(limits.lower))
    return Axis(name=name, least=least * multiple, most=int(limits.upper) * multiple, multiple=multiple)


def _without_weights(program: Any) -> bytes:
    """Return the file of a program whose tensors have one element that stands for all; the program is used up."""
    for table in (program.state_dict, program.constants):
        for name, value in table.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                hollow = torch.zeros(1, dtype=value.dtype).expand(value.shape)
                table[name] = nn.Parameter(hollow, requires_grad=False) if isinstance(value, nn.Parameter) else hollow
    program.example_inputs = None
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, file)
    return file.getvalue()

"""What a model is: as the catalog asks for it, and as the store has published it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from serve_app.core.contract import BATCH, Axis, Contract, SizeCost, TensorSpec, cost_at, expected_exec_s
from serve_app.core.contract_declaration import TensorDeclaration
from serve_app.core.precision import AGREEMENT, Dtype, Lowered, Precision, form_name, precisions, problem_of
from serve_app.core.reference import FORMS, is_reference, parse_reference
from serve_app.core.task import ImageInput, TaskSpec
from serve_app.core.versions import VersionRoute, split_key, version_key
from serve_app.errors import InvalidRequest

MODEL_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

#: The libraries that run models.
RuntimeName = Literal["torch", "onnxruntime", "openvino"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One line of the catalog: what to build, from which weights, for which family.

    Attributes:
        builder: ``torchvision:NAME``, ``timm:NAME``, ``transformers:NAME``, ``onnx:FILE``, ``export:FILE`` or
            ``package.module:factory``.
        weights: ``pretrained``, ``random:SEED``, or a reference to a file or folder of weights, see
            ``reference.py``.
        accuracy, input, task: may be left to the metadata of the weights; ``accuracy`` lies in 0..1.
        inputs, outputs: the tensors as far as the model does not say them itself.
        example: ``package.module:function`` that returns an example of the inputs, which then says what they are.
        limits: of the free axes.
        runtime: the library that runs it; ``auto``: the first that can.
        dtype: what it is published in.
        lowered: which forms of lower precision it may have; it is published in float32 then.
        agreement: on which share of probes these must agree with float32, in 0..1.
        min_copies: so many workers hold the model, at different locations as far as there are so many, whether or not
            it is requested.
        pinned: the model is in the memory of every worker.
        fingerprint: of what decides the content of the model, see ``store/fingerprint.py``; empty until it is known.
    """

    model_id: str
    builder: str
    weights: str = "pretrained"
    family: str | None = None
    accuracy: float | None = None
    input: ImageInput | None = None
    task: TaskSpec | None = None
    inputs: tuple[TensorDeclaration, ...] = ()
    outputs: tuple[TensorDeclaration, ...] = ()
    example: str | None = None
    limits: tuple[Axis, ...] = ()
    runtime: RuntimeName | Literal["auto"] = "auto"
    dtype: Dtype = "float32"
    lowered: Lowered = "no"
    agreement: float = AGREEMENT
    pinned: bool = False
    min_copies: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        _require(self.min_copies >= 0, f"min_copies must be >= 0, not {self.min_copies}")
        _require(
            MODEL_ID_PATTERN.fullmatch(self.model_id) is not None,
            f"model name {self.model_id!r} must be letters, digits, '.', '_' or '-'",
        )
        _require(
            self.family is None or MODEL_ID_PATTERN.fullmatch(self.family) is not None,
            f"family name {self.family!r} must be letters, digits, '.', '_' or '-'",
        )
        _require(":" in self.builder, f"builder {self.builder!r} must look like 'torchvision:resnet50'")
        _require(
            re.fullmatch(r"pretrained|random:\d{1,9}", self.weights) is not None or is_reference(self.weights),
            f"weights {self.weights!r} must be pretrained, random:SEED, {FORMS}",
        )
        kind, _, place = self.builder.partition(":")
        task = self.task or TaskSpec()
        for reference in (self.weights, place if kind in ("onnx", "export") else "", task.tokenizer, task.labels_from):
            if reference is not None and is_reference(reference):
                parse_reference(reference)
        _require(
            self.example is None or re.fullmatch(r"[\w.]+:[\w.]+", self.example) is not None,
            f"example {self.example!r} must name a function: package.module:function",
        )
        _require(self.accuracy is None or 0 <= self.accuracy <= 1, f"accuracy must lie in 0..1, not {self.accuracy}")
        _require(0 <= self.agreement <= 1, f"agreement must lie in 0..1, not {self.agreement}")
        problem = problem_of(self.lowered, self.dtype, self.runtime, self.builder)
        _require(problem is None, problem or "")

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that its compiled forms may have; the lower ones as far as they agree with float32."""
        return precisions(self.dtype, self.lowered)

    def allows(self, precision: str, agreement: float | None) -> bool:
        """Return whether a compiled form may serve it that agrees on such a share of probes; None: not measured."""
        if precision == self.dtype:
            return True
        return precision in self.precisions and agreement is not None and agreement >= self.agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """The numbers that decisions are made from: those of a model in one of its forms.

    Attributes:
        size_bytes: what one resident copy costs in memory, and what its eviction gives back: weights and buffers.
        tier: 0: the form in which the model is loaded for a request; more: one that it goes over to, see ``forms.py``.
    """

    model_id: str
    size_bytes: int
    load_s: float
    exec_s: float
    accuracy: float | None = None
    tier: int = 0

    def __post_init__(self) -> None:
        _require(self.size_bytes > 0, f"size_bytes of {self.model_id} must be positive, not {self.size_bytes}")
        for name in ("load_s", "exec_s"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"{name} of {self.model_id} must be >= 0, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """A model that the store holds: everything a router needs to know, without torch.

    Attributes:
        model_id: its key, which is its name for version 1; see ``core/versions.py``.
        fingerprint: of the catalog entry that it was published from.
        weights_requested, weights_actual: differ when pretrained weights could not be fetched.
        row_by_row: the rows of a batch are executed one after another, each in the workspace of one.
        workspace_bytes: what one execution needs beside the weights, while it runs; see ``memory_budget.py``.
        costs: measured at several sizes of the free axes; empty where the costs of one row say it all.
        joined_elements: requests that wait are executed together as long as their inputs have no more elements than
            this, which measurements say is faster; 0: one by one. See ``joined_executions.py``.
        prepared_bytes: what every worker keeps of it while it is not in memory.
        private_bytes: what of its memory is no page of a file; None: it was not measured, see ``own_bytes``.
    """

    model_id: str
    builder: str
    family: str | None
    weights_requested: str
    weights_actual: str
    dtype: str
    pinned: bool
    runtime: RuntimeName
    contract: Contract
    task: TaskSpec
    row_by_row: bool
    weights_bytes: int
    workspace_bytes: int
    costs: tuple[SizeCost, ...] = ()
    prepared_bytes: int = 0
    private_bytes: int | None = None
    profile: ModelProfile
    fingerprint: str = ""
    joined_elements: int = 0

    @property
    def name(self) -> str:
        """The name of the model, which all of its versions share."""
        return split_key(self.model_id)[0]

    @property
    def version(self) -> int:
        """The number of this version."""
        return split_key(self.model_id)[1]

    @property
    def form(self) -> str:
        """How it is in memory: see ``form_name``."""
        return form_name(self.runtime, self.dtype)

    @property
    def own_bytes(self) -> int:
        """What of its memory is no page of a file, and returns to the heap of the process with an unload."""
        if self.private_bytes is not None:
            return self.private_bytes
        return 0 if self.runtime == "torch" else self.weights_bytes

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs of the contract."""
        return self.contract.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs of the contract."""
        return self.contract.outputs

    @property
    def labels(self) -> tuple[str, ...]:
        """One label for each class; empty: classes are known by their numbers."""
        return self.task.labels

    @property
    def has_random_weights(self) -> bool:
        """Whether the answers mean nothing, because the catalog asks for random weights or gets them."""
        return self.weights_actual.startswith("random:")

    @property
    def fallback(self) -> bool:
        """Whether the weights are not the ones that the catalog asks for."""
        return self.weights_requested != self.weights_actual

    @property
    def usual_workspace_bytes(self) -> int:
        """What one execution needs at the middle of its limits, and the least batch; all there is without free axes."""
        if not self.costs:
            return self.workspace_bytes
        sizes = [
            axis.smallest if axis.name == BATCH else math.isqrt(axis.smallest * axis.largest)
            for axis in self.contract.axes
        ]
        return self.cost(sizes).workspace_bytes

    def cost(self, sizes: Sequence[int]) -> SizeCost:
        """Return what one request takes whose free axes have these sizes, in the order of ``contract.axes``."""
        if self.costs:
            return cost_at(self.costs, sizes)
        rows = math.prod(sizes) if self.row_by_row else 1
        return SizeCost(sizes=tuple(sizes), workspace_bytes=self.workspace_bytes, exec_s=rows * self.profile.exec_s)

    def times_longer(self, sizes: Sequence[int]) -> float:
        """Return how many times longer an execution at these sizes takes than one at the least ones."""
        if not self.costs:
            return float(math.prod(sizes)) if self.row_by_row else 1.0
        least_s = self.profile.exec_s
        return expected_exec_s(self.contract, self.costs, sizes) / least_s if least_s else 1.0


def runtime_of(entry: ModelEntry) -> RuntimeName:
    """Return the library that runs a model: the entry's; by default onnxruntime runs graphs, and torch modules."""
    if entry.runtime != "auto":
        return entry.runtime
    return "onnxruntime" if entry.builder.startswith("onnx:") else "torch"


def task_for(entry: ModelEntry, default: TaskSpec) -> TaskSpec:
    """Return the task of a model: the entry's, with the image preset and the labels of the weights where it has none.

    ``default`` is what the weights say. The preset of the entry, ``input``, goes before that of its task.
    """
    task = entry.task or default
    is_same_kind = task.kind == default.kind
    is_of_images = task.kind == "embedding" and task.tokenizer is None
    return replace(
        task,
        image=entry.input or task.image or (default.image if is_same_kind or is_of_images else None),
        labels=task.labels or (default.labels if is_same_kind or task.labels_from else ()),
        tokenizer=default.tokenizer if task.tokenizer else None,
        activation=task.activation or default.activation,
    )


class Catalog:
    """The published models of one deployment, by key, by name and by family.

    Args:
        models: every version of every model.
        routes: which version answers for a name; a name without a route has one version.
        problems: why a model of the catalog file cannot be served at all, by name.
        faster: the forms that each model may go over to, slowest first, by key; see ``forms.py``.
    """

    def __init__(
        self,
        models: tuple[PublishedModel, ...],
        routes: Mapping[str, VersionRoute] = MappingProxyType({}),
        problems: Mapping[str, str] = MappingProxyType({}),
        faster: Mapping[str, tuple[PublishedModel, ...]] = MappingProxyType({}),
    ) -> None:
        self._models = {model.model_id: model for model in models}
        self.routes = routes
        self.problems = problems
        self.faster = faster
        #: What a request may name, and which models that means.
        self._named: dict[str, tuple[PublishedModel, ...]] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._canaries: dict[str, tuple[PublishedModel, float]] = {}
        for model in models:
            self._versions[model.name] = (*self._versions.get(model.name, ()), model.version)
            self._named[f"{model.name}@{model.version}"] = (model,)
        names = dict.fromkeys(model.name for model in models)
        self._families: dict[str, tuple[PublishedModel, ...]] = {}
        for name in names:
            route = routes.get(name) or VersionRoute(current=self._versions[name][-1])
            current = self._models[version_key(name, route.current)]
            self._named[name] = (current,)
            if route.canary is not None:
                self._canaries[name] = self._models[version_key(name, route.canary)], route.canary_share
            if current.family is not None:
                self._families[current.family] = (*self._families.get(current.family, ()), current)
        clash = names.keys() & self._families.keys()
        _require(not clash, f"{sorted(clash)} name both a model and a family")
        self._named |= self._families

    def __len__(self) -> int:
        return len(self._models)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._models

    def __getitem__(self, model_id: str) -> PublishedModel:
        return self._models[model_id]

    @property
    def models(self) -> tuple[PublishedModel, ...]:
        """All versions of all published models, in catalog order."""
        return tuple(self._models.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models, in catalog order."""
        return tuple(self._versions)

    @property
    def families(self) -> tuple[str, ...]:
        """The names of all families."""
        return tuple(self._families)

    @property
    def canaries(self) -> Mapping[str, tuple[PublishedModel, float]]:
        """The canary of each model that has one, and its share of the requests that name no version."""
        return self._canaries

    def members(self, family: str) -> tuple[PublishedModel, ...]:
        """The functionally equivalent models of a family; empty if there is no such family."""
        return self._families.get(family, ())

    def named(self, name: str) -> tuple[PublishedModel, ...]:
        """What a request may mean by ``name``: a model, ``MODEL@VERSION``, or the members of a family; else nothing."""
        return self._named.get(name, ())

    def versions(self, name: str) -> tuple[int, ...]:
        """The versions of a model, oldest first; empty if there is no such model."""
        return self._versions.get(name, ())

    def answering(self) -> tuple[PublishedModel, ...]:
        """The versions that answer requests which name none: the current one of each model, and its canary."""
        return tuple(
            model for name in self._versions for model in (*self._named[name], *self._canaries.get(name, ())[:1])
        )

    def with_current(self, current: Mapping[str, int]) -> Catalog:
        """Return a catalog in which these versions answer for their names."""
        routes = {
            name: replace(route, current=current[name]) if name in current else route
            for name, route in self.routes.items()
        }
        return Catalog(self.models, routes, self.problems, self.faster)

    def profiles(self) -> dict[str, ModelProfile]:
        """Profile of every version of every model, by key."""
        return {model_id: model.profile for model_id, model in self._models.items()}


def most_accurate_first(models: tuple[PublishedModel, ...], min_accuracy: float | None) -> tuple[PublishedModel, ...]:
    """The members of a family that are accurate enough: those with real weights first, and the best of them first.

    The accuracy of a model is that of its real weights: where random ones stand in, it does not count.

    Raises:
        InvalidRequest: no member reaches ``min_accuracy``.
    """
    enough = [model for model in models if min_accuracy is None or _accuracy(model) >= min_accuracy]
    if not enough:
        best = max((_accuracy(model) for model in models), default=0.0)
        raise InvalidRequest(
            f"min_accuracy {min_accuracy} is out of reach: the most accurate model of that name has {best:.3f}"
        )
    return tuple(sorted(enough, key=lambda model: (model.has_random_weights, -(model.profile.accuracy or 0.0))))


def _accuracy(model: PublishedModel) -> float:
    return 0.0 if model.fallback else model.profile.accuracy or 0.0

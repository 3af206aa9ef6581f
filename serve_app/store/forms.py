"""Compiled forms: the same model, compiled for one version of a library and one kind of processor.

A form has a manifest of its own, below that of its model::

    root/forms/<name>/<fingerprint>-<content>/<form>-<digest of what it was made for>.json
    root/forms/<name>/<fingerprint>-<content>/<form>-<digest of what it was made for>.refused

The form is named after its library and what it computes in, see ``form_name``. The second file says why there is no
such form, so that publishing does not try it again and again. A machine looks for the forms that were made for it and
sees no others. The model as it was published runs anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from serve_app.core.catalog import PublishedModel, RuntimeName
from serve_app.core.forms import faster, key_of_tier, soonest
from serve_app.core.precision import Lowered, Precision, form_name
from serve_app.store.directory import StoreDirectory
from serve_app.store.manifest import Agreement, ManifestKey

#: What a compiled model depends on, by the library that runs it: its version and the processor.
Environments = Mapping[RuntimeName, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FormKind:
    """One way to compile a module: the library that runs it, and what it computes in."""

    runtime: RuntimeName
    precision: Precision = "float32"

    @property
    def form(self) -> str:
        """The name of such a form."""
        return form_name(self.runtime, self.precision)


#: All of them, in the order in which they are made. What comes later must be faster than what came before in float32.
KINDS = (
    FormKind(runtime="onnxruntime"),
    FormKind(runtime="openvino"),
    FormKind(runtime="openvino", precision="bfloat16"),
    FormKind(runtime="onnxruntime", precision="int8"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why there is no such form of a model; ``agreement`` is what it falls short by, if that is the reason."""

    reason: str
    agreement: Agreement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The forms of one model that serve it.

    Attributes:
        model: in the form in which it is loaded, with the memory that an execution needs in any of them.
        faster: in the forms that it goes over to, slowest first; none where it has but one.
        manifests: of the former, by the key of the model, and of all where there are several, by ``key_of_tier``.
    """

    model: PublishedModel
    faster: tuple[PublishedModel, ...]
    manifests: Mapping[str, ManifestKey]


def that_serve(forms: Sequence[PublishedModel], lowered: Lowered) -> list[PublishedModel]:
    """Return the forms that may serve a model: who asks for int8, and nothing else, gets it once it is there."""
    return [form for form in forms if form.dtype == lowered] or list(forms)


def choose(forms: Mapping[ManifestKey, PublishedModel]) -> Chosen:
    """Choose among all forms of one model, first as it was published."""
    served = soonest(list(forms.values()))
    others = faster(list(forms.values()), served)
    places = {model.form: place for place, model in forms.items()}
    manifests = {served.model_id: places[served.form]}
    if len(forms) > 1:
        manifests |= {key_of_tier(form.model_id, form.profile.tier): places[form.form] for form in (served, *others)}
    costs = tuple(
        replace(cost, workspace_bytes=max(each.workspace_bytes for each in (cost, *rest)))
        for cost, *rest in zip(served.costs, *(form.costs for form in others), strict=True)
    )
    workspace_bytes = max(form.workspace_bytes for form in (served, *others))
    model = replace(served, workspace_bytes=workspace_bytes, costs=costs)
    return Chosen(model=model, faster=others, manifests=manifests)


class Forms:
    """The files of all compiled forms in a store.

    Args:
        directory: the store.
    """

    def __init__(self, directory: StoreDirectory) -> None:
        self._root = directory.root / "forms"

    def key(
        self, model: ManifestKey, runtime: RuntimeName, made_for: str, precision: Precision = "float32"
    ) -> ManifestKey:
        """Return the place of a form, whether or not it exists."""
        digest = hashlib.sha256(made_for.encode()).hexdigest()[:16]
        return ManifestKey(name=model.name, stem=model.stem, form=f"{form_name(runtime, precision)}-{digest}")

    def keys(
        self, model: ManifestKey, environments: Environments, precisions: Collection[str] = ("float32",)
    ) -> dict[FormKind, ManifestKey]:
        """Return the places of all forms that a model may have for these environments, in the order of ``KINDS``."""
        return {
            kind: self.key(model, kind.runtime, environments[kind.runtime], kind.precision)
            for kind in KINDS
            if kind.runtime in environments and kind.precision in precisions
        }

    def path(self, key: ManifestKey) -> Path:
        """Return the path of the manifest of a form."""
        return self._folder(key) / f"{key.form}.json"

    def usable(
        self, model: ManifestKey, environments: Environments, precisions: Collection[str] = ("float32",)
    ) -> list[ManifestKey]:
        """Return the places of the forms that a model has for these environments."""
        return [key for key in self.keys(model, environments, precisions).values() if self.path(key).is_file()]

    def refusal(self, key: ManifestKey) -> Refusal | None:
        """Return why a form cannot be made; None if that is not known."""
        try:
            text = self._refusal_path(key).read_text()
        except OSError:
            return None
        try:
            raw = json.loads(text)
            agreement = Agreement(**raw["agreement"]) if raw["agreement"] else None
            return Refusal(reason=raw["reason"], agreement=agreement)
        except (ValueError, TypeError, KeyError):
            # Earlier versions have written the reason and nothing else.
            return Refusal(reason=text)

    def refuse(self, key: ManifestKey, refusal: Refusal) -> None:
        """Remember why a form cannot be made; a store that cannot be written is tried again next time."""
        with contextlib.suppress(OSError):
            self._folder(key).mkdir(parents=True, exist_ok=True)
            self.path(key).unlink(missing_ok=True)
            self._refusal_path(key).write_text(json.dumps(asdict(refusal)))

    def forget_refusal(self, key: ManifestKey) -> None:
        """Forget why a form could not be made."""
        with contextlib.suppress(OSError):
            self._refusal_path(key).unlink(missing_ok=True)

    def manifest_paths(self) -> tuple[Path, ...]:
        """Return the manifests of all forms of all models."""
        return tuple(path for path in sorted(self._root.glob("*/*/*.json")) if not path.name.startswith("."))

    def of(self, model: ManifestKey) -> tuple[ManifestKey, ...]:
        """Return the places of all forms of a model, made for whatever."""
        found = sorted(self._folder(model).glob("*.json"))
        return tuple(ManifestKey(name=model.name, stem=model.stem, form=path.stem) for path in found)

    def remove_orphans(self, models: Path) -> None:
        """Remove the forms of models that have no manifest below ``models`` any more."""
        for folder in self._root.glob("*/*"):
            if not (models / folder.parent.name / f"{folder.name}.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, key: ManifestKey) -> Path:
        return self._root / key.name / key.stem

    def _refusal_path(self, key: ManifestKey) -> Path:
        return self._folder(key) / f"{key.form}.refused"

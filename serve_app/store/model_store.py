"""The model store on disk: immutable blobs of weights, and a manifest for each thing that was ever published.

Layout::

    root/models/<name>/<fingerprint>-<content>.json   manifest; its atomic rename publishes the model
    root/blobs/<sha256>.<ending>        weights and graphs, named after their content, read-only, never changed
    root/forms/<name>/<fingerprint>-<content>/   the same model compiled for one library and processor, see ``forms.py``
    root/projects/<key>.json            the versions of one catalog's models, and which of them answer
    root/verified/<sha256>.json         stat signature of the blob's file when its content was last verified
    root/sources/<sha256>.json          digest of a local file that a catalog names, with its stat signature
    root/tmp/                           files being written, named after the process that writes them
    root/lock                           held by the one publisher that may write

A manifest is keyed by what was published: the fingerprint of the catalog entry, and what came of it. So catalogs that
share a store never answer for each other, and what they have in common is there once. Readers take no lock. A reader
sees a manifest whole or not at all. This module does not import torch: routers read the store too.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from serve_app.core.catalog import MODEL_ID_PATTERN, Catalog, ModelEntry, PublishedModel, task_for
from serve_app.core.versions import FIRST_VERSION, VersionRoute, version_key
from serve_app.errors import StoreError
from serve_app.store.blob_store import BlobStore, check_size
from serve_app.store.durable_files import explain_os_errors, fsync_path, is_alive, write_durably
from serve_app.store.fingerprint import Fingerprints
from serve_app.store.forms import Environments, Forms, choose, that_serve
from serve_app.store.manifest import Manifest, ManifestKey, is_allowed
from serve_app.store.projects import Projects, ProjectState

logger = logging.getLogger(__name__)

#: In the name of a manifest that no catalog entry has led to.
_NO_FINGERPRINT = "0" * 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a deployment serves: its catalog, and the manifest of each model by the model's key.

    The forms that a model goes over to are there by ``forms.key_of_tier``.
    """

    catalog: Catalog
    manifests: Mapping[str, ManifestKey]


class ModelStore(BlobStore):
    """Reads and writes one store directory; an instance may be used by several threads.

    Args:
        root: the directory; it is made by the first write.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._fingerprints = Fingerprints(self.root / "sources")
        self.projects = Projects(self)
        self.forms = Forms(self)
        self._committed: dict[str, ManifestKey] = {}

    # Manifests

    def published(self) -> tuple[str, ...]:
        """Return the names of all models that have a manifest, sorted."""
        return tuple(sorted({path.parent.name for path in self._manifest_paths()}))

    def has(self, model_id: str) -> bool:
        """Return whether the model has a manifest; ``check_sizes`` checks its files as well."""
        return bool(self.manifest_keys(model_id))

    def manifest_keys(self, model_id: str) -> tuple[ManifestKey, ...]:
        """Return every manifest of a model, the one that was published last first."""
        if MODEL_ID_PATTERN.fullmatch(model_id) is None:
            raise StoreError(f"{model_id!r} is not the name of a model")
        written = []
        for path in (self._models / model_id).glob("[0-9a-f]*-*.json"):
            try:
                written.append((path.stat().st_mtime_ns, path.stem))
            except FileNotFoundError:
                continue
        return tuple(ManifestKey(name=model_id, stem=stem) for _, stem in sorted(written, reverse=True))

    def manifest(self, model_id: str) -> Manifest:
        """Read the manifest of a model that was published last, by whichever catalog.

        Raises:
            StoreError: the model is not published, or its manifest is malformed.
        """
        keys = self.manifest_keys(model_id)
        if not keys:
            raise StoreError(f"model {model_id!r} is not in the store {self.root}; publish it first")
        return self.read(keys[0])

    def read(self, key: ManifestKey) -> Manifest:
        """Read one manifest.

        Raises:
            StoreError: it is not there, or malformed.
        """
        path = self._manifest_path(key)
        try:
            text = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(f"model {key.name!r} is not in the store {self.root}; publish it again") from error
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}; check the permissions of the store") from error
        manifest = Manifest.from_json(text, str(path))
        if manifest.model.model_id != key.name:
            raise StoreError(f"manifest {path} is of model {manifest.model.model_id!r}; publish {key.name!r} again")
        return manifest

    def check_sizes(self, model_id: str) -> None:
        """Check that every file of the model exists and has its size; costs one ``stat`` per file.

        Raises:
            StoreError: the model is not published, or a file is missing or has another size.
        """
        for file in self.manifest(model_id).files:
            check_size(file, self.blob_path(file.name), model_id)

    def commit(self, manifest: Manifest) -> ManifestKey:
        """Publish a model: once this method has returned it is in the store, even after a power failure.

        Raises:
            StoreError: a file of the manifest is not in the store, the disk is full or the store cannot be written.
        """
        model_id = manifest.model.model_id
        fingerprint = manifest.model.fingerprint or _NO_FINGERPRINT
        key = ManifestKey(name=model_id, stem=f"{fingerprint}-{manifest.content_id}")
        self._write(key, manifest)
        self._committed[model_id] = key
        return key

    def commit_form(self, key: ManifestKey, manifest: Manifest) -> None:
        """Publish a compiled form of a model, like ``commit``; ``key`` is of ``forms.key``.

        Raises:
            StoreError: see ``commit``.
        """
        self._write(key, manifest)
        self.forms.forget_refusal(key)

    def _write(self, key: ManifestKey, manifest: Manifest) -> None:
        model_id = manifest.model.model_id
        with self.exclusive(), self.temporary(".json") as temporary:
            for file in manifest.files:
                check_size(file, self.blob_path(file.name), model_id)
            with explain_os_errors(f"write the manifest of {model_id!r}", self.root):
                path = self._manifest_path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(temporary, manifest.to_json())
                temporary.replace(path)
                fsync_path(path.parent)
                fsync_path(path.parent.parent)

    def committed(self, model_id: str) -> ManifestKey | None:
        """Return what this instance has published last of a model."""
        return self._committed.get(model_id)

    # What a catalog asks for

    def fingerprinted(self, entries: Iterable[ModelEntry]) -> tuple[ModelEntry, ...]:
        """Return the entries with their fingerprints, which takes the local files that they name.

        The entries may then be used where those files are not. An entry whose files are missing has none.
        """
        return tuple(
            entry if entry.fingerprint else dataclasses.replace(entry, fingerprint=self._fingerprints.of(entry))
            for entry in entries
        )

    def find(self, entry: ModelEntry, state: ProjectState | None = None) -> ManifestKey | None:
        """Return what was published from an entry, the latest if that was done several times; None if it was not.

        What the project of ``state`` has published goes before what others have. Where a local file that the entry
        names is missing, what was published from an entry of the same names counts: the file is needed no more.
        """
        versions = state.models.get(entry.model_id) if state is not None else None
        own = (ManifestKey(name=entry.model_id, stem=versions.latest),) if versions is not None else ()
        keys = (*own, *self.manifest_keys(entry.model_id))
        (entry,) = self.fingerprinted((entry,))
        if entry.fingerprint:
            return next((key for key in keys if key.fingerprint == entry.fingerprint and self._has(key)), None)
        return next((key for key in keys if self._has_names_of(key, entry)), None)

    def catalog(self, entries: Sequence[ModelEntry]) -> Catalog:
        """Return those of ``entries`` that are published, in their order, each in one version; see ``select``."""
        return self.select(entries).catalog

    def select(
        self,
        entries: Sequence[ModelEntry],
        project: str = "",
        known: ProjectState | None = None,
        environments: Environments = MappingProxyType({}),
    ) -> Selection:
        """Return what a deployment of ``entries`` serves.

        Family, pinning, accuracy and task are those of the entry. A model whose entry was not published, or whose
        manifest is malformed, is logged and among the problems of the catalog, so that the others are served.

        Args:
            entries: the catalog file.
            project: whose versions are served; without its state, each entry is served as it is, as version 1.
            known: the state of the project when its deployment was configured, for nodes with stores of their own.
            environments: of this machine; models are served in the soonest of the forms that were made for these.
        """
        state = self.projects.read(project) if project else None
        if known is not None and (state is None or known.serial > state.serial):
            state = known
        models: list[PublishedModel] = []
        routes: dict[str, VersionRoute] = {}
        problems: dict[str, str] = {}
        manifests: dict[str, ManifestKey] = {}
        faster: dict[str, tuple[PublishedModel, ...]] = {}
        for entry in entries:
            try:
                versions, route = self._versions(entry, state)
                current = version_key(entry.model_id, route.current)
                read = {key: self._overlaid(key, versions[key], entry, route) for key in versions}
                if current not in read or read[current] is None:
                    self.read(versions[current])
            except StoreError as error:
                logger.error("model %s is left out: %s", entry.model_id, error)
                problems[entry.model_id] = str(error)
                continue
            keys = [key for key, model in read.items() if model is not None]
            for key in keys:
                chosen = choose(self._forms(key, versions[key], entry, route, environments))
                models.append(chosen.model)
                manifests |= chosen.manifests
                if chosen.faster:
                    faster[key] = chosen.faster
            if route.canary is not None and version_key(entry.model_id, route.canary) not in keys:
                route = dataclasses.replace(route, canary=None, canary_share=0.0)
            routes[entry.model_id] = route
        return Selection(catalog=Catalog(tuple(models), routes, problems, faster), manifests=manifests)

    def _versions(self, entry: ModelEntry, state: ProjectState | None) -> tuple[dict[str, ManifestKey], VersionRoute]:
        """Return the manifests of an entry by the keys of its versions, and which of them answers."""
        versions = state.models.get(entry.model_id) if state is not None else None
        if state is not None and versions is None:
            raise StoreError(f"{state.catalog} has not published it; run: edgeserve publish {entry.model_id}")
        if versions is not None:
            return {
                version_key(entry.model_id, version.number): self._here(entry.model_id, version.manifest)
                for version in versions.versions
            }, versions.route
        key = self.find(entry)
        if key is None:
            reason = "its entry changed since" if self.has(entry.model_id) else "it is not in the store"
            raise StoreError(f"{reason}; run: edgeserve publish {entry.model_id}")
        return {entry.model_id: key}, VersionRoute(current=FIRST_VERSION)

    def _forms(
        self, key: str, place: ManifestKey, entry: ModelEntry, route: VersionRoute, environments: Environments
    ) -> dict[ManifestKey, PublishedModel]:
        """Return a readable version in all forms that can serve it, first as it was published."""
        others = self.forms.usable(place, environments, entry.precisions) if entry.runtime == "auto" else []
        forms = {form: self._overlaid(key, form, entry, route) for form in (place, *others)}
        serving = that_serve([model for model in forms.values() if model is not None], entry.lowered)
        return {form: model for form, model in forms.items() if model in serving and model is not None}

    def _here(self, name: str, stem: str) -> ManifestKey:
        """Return the place of a version; a node with a store of its own has optimized the model for itself."""
        key = ManifestKey(name=name, stem=stem)
        if self._has(key):
            return key
        return next((each for each in self.manifest_keys(name) if each.fingerprint == key.fingerprint), key)

    def _overlaid(self, key: str, place: ManifestKey, entry: ModelEntry, route: VersionRoute) -> PublishedModel | None:
        """Return a published version with what its entry lays over it; None if it cannot be read, or must not serve."""
        try:
            manifest = self.read(place)
        except StoreError as error:
            logger.warning("a version of %s is left out: %s", entry.model_id, error)
            return None
        if place.form and not is_allowed(manifest, entry):
            return None
        model = manifest.model
        accuracy = model.profile.accuracy if entry.accuracy is None else entry.accuracy
        answers = key in (version_key(entry.model_id, number) for number in (route.current, route.canary or 0))
        return dataclasses.replace(
            model,
            model_id=key,
            family=entry.family,
            pinned=entry.pinned and answers,
            task=task_for(entry, manifest.default_task),
            # Manifests have counted workspace with the size once.
            profile=dataclasses.replace(
                model.profile, model_id=key, accuracy=accuracy, size_bytes=max(1, model.weights_bytes)
            ),
        )

    def _has(self, key: ManifestKey) -> bool:
        return self._manifest_path(key).is_file()

    def _has_names_of(self, key: ManifestKey, entry: ModelEntry) -> bool:
        try:
            model = self.read(key).model
        except StoreError:
            return False
        return (model.builder, model.weights_requested, model.dtype) == (entry.builder, entry.weights, entry.dtype)

    # Tidying up

    def sweep(self) -> int:
        """Remove temporary files of dead publishers and blobs that no manifest names; return the bytes freed.

        All blobs stay while any manifest cannot be read, because its references are not known.
        """
        freed = 0
        with self.exclusive(), explain_os_errors(f"tidy up {self.root}", self.root):
            for path in list(self._tmp.iterdir()):
                if not is_alive(path.name.partition("-")[0]):
                    size_bytes = path.stat().st_size
                    path.unlink()
                    freed += size_bytes
            self.forms.remove_orphans(self._models)
            try:
                used = self.referenced_blobs()
            except StoreError as error:
                logger.warning("unused weights are kept: %s", error)
                return freed
            return freed + sum(self.remove_blob(name) for name in self.blob_names() - used)

    def blob_names(self) -> set[str]:
        """Return the names of all blobs."""
        return {path.name for path in self._blobs.glob("*")}

    def referenced_blobs(self) -> set[str]:
        """Return the names of all blobs that a manifest names, be it of an earlier format.

        Raises:
            StoreError: a manifest cannot be read.
        """
        names = set()
        for path in (*self._manifest_paths(), *self.outdated_manifests(), *self.forms.manifest_paths()):
            try:
                content = json.loads(path.read_bytes())
                names |= {str(file["name"]) for file in content["files"]}
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise StoreError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
        return names

    def blobs_of(self, keys: Iterable[ManifestKey]) -> set[str]:
        """Return the names of all blobs of these manifests and of their forms.

        Raises:
            StoreError: one cannot be read.
        """
        present = [key for key in keys if self._has(key)]
        present += [form for key in present for form in self.forms.of(key)]
        return {file.name for key in present for file in self.read(key).files}

    def outdated_manifests(self) -> tuple[Path, ...]:
        """Return the manifests of earlier formats, which only earlier versions of EdgeServe read."""
        return tuple(path for path in sorted(self._models.glob("*.json")) if not path.name.startswith("."))

    def manifest_path(self, key: ManifestKey) -> Path:
        """Return the path of a manifest, whether or not it exists."""
        return self._manifest_path(key)

    def all_manifest_keys(self) -> tuple[ManifestKey, ...]:
        """Return every manifest of every model."""
        return tuple(ManifestKey(name=path.parent.name, stem=path.stem) for path in self._manifest_paths())

    def _manifest_paths(self) -> tuple[Path, ...]:
        return tuple(path for path in sorted(self._models.glob("*/*.json")) if not path.name.startswith("."))

    def _manifest_path(self, key: ManifestKey) -> Path:
        return self.forms.path(key) if key.form else self._models / key.name / f"{key.stem}.json"

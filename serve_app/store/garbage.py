"""Give back what of a store no project refers to any more."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from serve_app.core.catalog import ModelEntry
from serve_app.store.durable_files import explain_os_errors
from serve_app.store.manifest import ManifestKey
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project, ProjectState

#: A deployment records every minute which models it serves.
_IN_USE_S = 300.0
#: A project of another host, whose catalog cannot be seen from here, is abandoned when nothing has used it for so long.
_ABANDONED_S = 30 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What is given back, or would be.

    Attributes:
        versions: names and numbers of versions that the project forgets.
        projects: catalogs that are gone, and that no deployment uses.
        manifests: what no project has as a version.
        freed_bytes: on disk.
        kept_bytes: of the blobs that stay.
    """

    versions: tuple[tuple[str, int], ...]
    projects: tuple[str, ...]
    manifests: tuple[ManifestKey, ...]
    freed_bytes: int
    kept_bytes: int


def collect(
    store: ModelStore,
    project: Project,
    entries: Collection[ModelEntry],
    *,
    keep: int | None = None,
    dry_run: bool = False,
    on_wait: Callable[[], None] | None = None,
) -> Garbage:
    """Remove versions beyond ``keep``, and then every manifest and blob that no version of any project names.

    What stays: all versions of other projects, unless they are abandoned; of this project the versions that answer,
    the newest ``keep`` of each model in its catalog, and models that a running deployment still serves.

    Args:
        store: where.
        project: whose versions are trimmed.
        entries: its catalog.
        keep: versions of each model; None: all.
        dry_run: only say what would be removed.
        on_wait: called if a publisher holds the store.

    Raises:
        StoreError: the store cannot be written, or a state or manifest in it cannot be read.
    """
    with store.exclusive(on_wait=on_wait), explain_os_errors(f"tidy up {store.root}", store.root):
        states = {key: state for key in store.projects.known() if (state := store.projects.read(key)) is not None}
        is_known = project.key in states
        own = states.get(project.key) or ProjectState(catalog=project.catalog, host=project.host)
        trimmed = _trimmed(own, entries, store.projects.in_use(project.key, _IN_USE_S), keep)
        abandoned = tuple(
            key for key, state in states.items() if key != project.key and _is_abandoned(store, project, key, state)
        )
        if is_known:
            states[project.key] = trimmed
        kept = {
            ManifestKey(name=name, stem=version.manifest)
            for key, state in states.items()
            if key not in abandoned
            for name, model in state.models.items()
            for version in model.versions
        }
        if not is_known:
            # Its models may have been published for no project, and be served all the same.
            kept |= {found for entry in entries if (found := store.find(entry))}
        manifests = tuple(key for key in store.all_manifest_keys() if key not in kept)
        paths = [*map(store.manifest_path, manifests), *store.outdated_manifests()]
        used = store.blobs_of(kept)
        blobs = store.blob_names() - used
        garbage = Garbage(
            versions=_forgotten(own, trimmed),
            projects=tuple(states[key].catalog for key in abandoned),
            manifests=manifests,
            freed_bytes=sum(map(_size, paths)) + sum(_size(store.blob_path(name)) for name in blobs),
            kept_bytes=sum(_size(store.blob_path(name)) for name in used),
        )
        if not dry_run:
            # The states first: what they name must be there as long as they name it.
            for key in abandoned:
                store.projects.forget(key)
            if is_known:
                store.projects.update(project, lambda _: trimmed)
            for path in paths:
                path.unlink(missing_ok=True)
            store.sweep()
        return garbage


def _trimmed(
    state: ProjectState, entries: Collection[ModelEntry], in_use: Collection[str], keep: int | None
) -> ProjectState:
    """Return the state without the models that are neither in the catalog nor served, and without old versions."""
    wanted = {entry.model_id for entry in entries} | set(in_use)
    for name, versions in state.models.items():
        if name not in wanted:
            state = state.with_versions(name, None)
        elif keep is not None:
            state = state.with_versions(name, versions.trimmed(keep))
    return state


def _forgotten(before: ProjectState, after: ProjectState) -> tuple[tuple[str, int], ...]:
    left = {(name, number) for name, versions in after.models.items() for number in versions.numbers}
    return tuple(
        (name, number)
        for name, versions in before.models.items()
        for number in versions.numbers
        if (name, number) not in left
    )


def _is_abandoned(store: ModelStore, project: Project, key: str, state: ProjectState) -> bool:
    if store.projects.in_use(key, _IN_USE_S):
        return False
    if state.host == project.host:
        return not Path(state.catalog).is_file()
    return store.projects.used_s_ago(key) > _ABANDONED_S


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

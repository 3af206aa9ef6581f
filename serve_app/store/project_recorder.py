"""Makes what a publisher has published versions of its project."""

from __future__ import annotations

import time
from dataclasses import replace

from serve_app.core.catalog import ModelEntry
from serve_app.store.model_store import ModelStore
from serve_app.store.projects import Project, ProjectState, first_published


class ProjectRecorder:
    """Records one run of a publisher.

    Args:
        store: with the manifests.
        project: whose versions the models become; None: of no project, and nothing is recorded.
        canary: new versions answer this share of the requests; None: all of them.

    Attributes:
        versions: the new version of each model that had one before.
    """

    def __init__(self, store: ModelStore, project: Project | None, canary: float | None = None) -> None:
        self._store = store
        self._project = project
        self._canary = canary
        self.versions: dict[str, int] = {}

    def state(self) -> ProjectState | None:
        """Return the versions of the project so far; None if it has none."""
        return self._store.projects.read(self._project.key) if self._project is not None else None

    def record(self, entry: ModelEntry, *, is_new: bool) -> None:
        """Make the manifest of an entry a version, unless it is one; ``is_new``: the one just committed.

        Raises:
            StoreError: the store cannot be written.
        """
        if self._project is None:
            return
        state = self.state()
        key = self._store.committed(entry.model_id) if is_new else self._store.find(entry, state)
        if key is None:
            return
        stem, now_s = key.stem, time.time()

        def change(state: ProjectState) -> ProjectState:
            before = state.models.get(entry.model_id)
            if before is None:
                return state.with_versions(entry.model_id, first_published(stem, now_s))
            after = before.published(stem, now_s, self._canary if stem != before.latest else None)
            if after.next_number > before.next_number:
                self.versions[entry.model_id] = before.next_number
            return state.with_versions(entry.model_id, after)

        if state is None or change(state) != state:
            self._store.projects.update(self._project, change)

    def renew(self) -> None:
        """Have the deployments of the project look again: what they serve is there in other forms."""
        if self._project is not None:
            self._store.projects.update(self._project, lambda state: replace(state, serial=state.serial + 1))

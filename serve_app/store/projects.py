"""Projects: which versions of its models each catalog has published, and which of them answers.

A project is one catalog file on one host. Its state is one file of the store, replaced whole: publishers write it, and
the replicas of the project's deployments look at it every second. Projects share manifests and blobs, but no state, so
none answers for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from serve_app.core.versions import VersionRoute
from serve_app.errors import NotFound, StoreError
from serve_app.store.directory import StoreDirectory
from serve_app.store.durable_files import explain_os_errors, fsync_path, stat_signature, write_durably


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One published version: its number, its manifest, and when it was published in seconds since 1970."""

    number: int
    manifest: str
    published_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersions:
    """The versions of one model in one project.

    | event                                   | next                                                        |
    |-----------------------------------------|-------------------------------------------------------------|
    | published: what was published last      | as before, after a rollback too                             |
    | published: other content                | a new version is current, as soon as it is loaded           |
    | published: content of an earlier version| that version is current, as soon as it is loaded            |
    | published with a share                  | the new version is the canary                               |
    | ``rolled_back``                         | the version is current at once; no canary                   |
    | ``with_canary``                         | the version gets its share; share 1 makes it current        |
    | ``without`` a version                   | the version is gone; the current one cannot go              |

    Attributes:
        latest: the manifest that was published last.
        next_number: of the next version; numbers are never used again.
    """

    versions: tuple[Version, ...]
    current: int
    latest: str
    next_number: int
    at_once: bool = False
    canary: int | None = None
    canary_share: float = 0.0

    @property
    def route(self) -> VersionRoute:
        """Which version answers."""
        return VersionRoute(
            current=self.current, at_once=self.at_once, canary=self.canary, canary_share=self.canary_share
        )

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all versions, oldest first."""
        return tuple(version.number for version in self.versions)

    @property
    def latest_number(self) -> int | None:
        """The number of what was published last; None if that version was removed."""
        return next((each.number for each in self.versions if each.manifest == self.latest), None)

    def with_number(self, number: int) -> Version:
        """Return one version; raises ``NotFound`` if there is none of that number."""
        for version in self.versions:
            if version.number == number:
                return version
        raise NotFound(f"there is no version {number}; there are {', '.join(map(str, self.numbers))}")

    def published(self, manifest: str, now_s: float, canary_share: float | None = None) -> ModelVersions:
        """Take in that the project has published ``manifest``."""
        if manifest == self.latest and canary_share is None:
            return self
        content = manifest.rpartition("-")[2]
        same = next((each for each in self.versions if each.manifest.rpartition("-")[2] == content), None)
        if same is not None:
            versions = tuple(replace(each, manifest=manifest) if each is same else each for each in self.versions)
            changed, number = replace(self, versions=versions, latest=manifest), same.number
        else:
            number = self.next_number
            version = Version(number=number, manifest=manifest, published_s=now_s)
            changed = replace(
                self, versions=(*self.versions, version), latest=manifest, next_number=self.next_number + 1
            )
        if canary_share is not None:
            return changed.with_canary(number, canary_share)
        return replace(changed, current=number, at_once=False, canary=None, canary_share=0.0)

    def rolled_back(self, to: int | None = None) -> ModelVersions:
        """Make an earlier version current at once: ``to``, else the newest before the current one.

        Raises:
            NotFound: there is no such version.
        """
        earlier = [number for number in self.numbers if number < self.current]
        if to is None and not earlier:
            raise NotFound(f"version {self.current} is the first; there is none to roll back to")
        number = earlier[-1] if to is None else self.with_number(to).number
        return replace(self, current=number, at_once=True, canary=None, canary_share=0.0)

    def with_canary(self, number: int, share: float) -> ModelVersions:
        """Let a version answer a share of the requests; 0 ends the canary, and 1 makes it current."""
        self.with_number(number)
        if number == self.current or share <= 0.0:
            return replace(self, canary=None, canary_share=0.0)
        if share >= 1.0:
            return replace(self, current=number, at_once=False, canary=None, canary_share=0.0)
        return replace(self, canary=number, canary_share=share)

    def without(self, number: int) -> ModelVersions:
        """Forget a version; raises ``StoreError`` if it is the current one."""
        gone = self.with_number(number)
        if number == self.current:
            raise StoreError(f"version {number} answers requests; make another one current first, by rollback --to")
        versions = tuple(version for version in self.versions if version is not gone)
        kept = replace(self, versions=versions)
        return replace(kept, canary=None, canary_share=0.0) if number == self.canary else kept

    def trimmed(self, keep: int) -> ModelVersions:
        """Forget all but the newest ``keep`` versions; the current one and the canary stay in any case."""
        newest = set(self.numbers[-keep:] if keep else ()) | {self.current, self.canary}
        return replace(self, versions=tuple(version for version in self.versions if version.number in newest))


def first_published(manifest: str, now_s: float) -> ModelVersions:
    """Return the versions of a model that a project publishes for the first time."""
    version = Version(number=1, manifest=manifest, published_s=now_s)
    return ModelVersions(versions=(version,), current=1, latest=manifest, next_number=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectState:
    """What a project has published.

    Attributes:
        catalog, host: where its catalog file is.
        serial: how often the state has changed; of two copies the one with more changes counts.
    """

    catalog: str
    host: str
    models: Mapping[str, ModelVersions] = field(default_factory=dict)
    serial: int = 0

    def versions(self, model_id: str) -> ModelVersions:
        """Return the versions of a model; raises ``NotFound`` if the project has not published it."""
        if model_id not in self.models:
            raise NotFound(f"model {model_id!r} of {self.catalog} is not published; run: edgeserve publish {model_id}")
        return self.models[model_id]

    def with_versions(self, model_id: str, versions: ModelVersions | None) -> ProjectState:
        """Return the state with other versions of a model; None: with none."""
        models = {name: each for name, each in self.models.items() if name != model_id}
        return replace(self, models=models if versions is None else {**models, model_id: versions})


_ADAPTER = TypeAdapter(ProjectState)


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A catalog file, by the key of its state."""

    key: str
    catalog: str
    host: str

    @staticmethod
    def of(catalog: Path) -> Project:
        """Return the project of a catalog file of this machine."""
        path, host = str(catalog.resolve()), platform.node()
        return Project(key=hashlib.sha256(f"{host}:{path}".encode()).hexdigest()[:16], catalog=path, host=host)


class Projects:
    """The states of all projects of a store.

    Args:
        store: the directory.
    """

    def __init__(self, store: StoreDirectory) -> None:
        self._store = store
        self._folder = store.root / "projects"

    def known(self) -> tuple[str, ...]:
        """The keys of all projects, sorted."""
        return tuple(sorted(path.stem for path in self._folder.glob("*.json")))

    def signature(self, key: str) -> list[int]:
        """Return what changes with the state of a project; empty while it has none."""
        try:
            return stat_signature(self._path(key))
        except OSError:
            return []

    def written_ns(self, key: str) -> int:
        """Return when the state of a project last changed, in nanoseconds since 1970; 0 while it has none."""
        return max(self.signature(key)[2:], default=0) if key else 0

    def read(self, key: str) -> ProjectState | None:
        """Read the state of a project; None if it has published nothing.

        Raises:
            StoreError: the file is malformed.
        """
        path = self._path(key)
        try:
            return _ADAPTER.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"{error.error_count()} wrong values"
            raise StoreError(f"the versions in {path} cannot be read ({reason}); remove it and publish again") from None

    def update(self, project: Project, change: Callable[[ProjectState], ProjectState]) -> ProjectState:
        """Change the state of a project; nothing is written where nothing changes.

        Raises:
            StoreError: the store cannot be written, or the state cannot be read.
        """
        with self._store.exclusive():
            before = self.read(project.key) or ProjectState(catalog=project.catalog, host=project.host)
            after = change(before)
            if after != before:
                after = replace(after, serial=before.serial + 1)
                with (
                    self._store.temporary(".json") as temporary,
                    explain_os_errors("write versions", self._store.root),
                ):
                    self._folder.mkdir(exist_ok=True)
                    write_durably(temporary, json.dumps(dataclasses.asdict(after), indent=1).encode())
                    temporary.replace(self._path(project.key))
                    fsync_path(self._folder)
            return after

    def forget(self, key: str) -> None:
        """Remove the state of a project."""
        with self._store.exclusive():
            self._path(key).unlink(missing_ok=True)
            self._lease(key).unlink(missing_ok=True)

    def use(self, key: str, models: tuple[str, ...]) -> None:
        """Record that a deployment serves these models now; raises ``OSError`` where the store cannot be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lease(key).write_text(json.dumps(models))

    def in_use(self, key: str, within_s: float) -> frozenset[str]:
        """Return the models that a deployment has recorded within so many seconds."""
        lease = self._lease(key)
        try:
            if time.time() - lease.stat().st_mtime > within_s:
                return frozenset()
            return frozenset(json.loads(lease.read_bytes()))
        except (OSError, ValueError):
            return frozenset()

    def used_s_ago(self, key: str) -> float:
        """Return the seconds since a deployment used the project, or its state was written."""
        times = [path.stat().st_mtime for path in (self._lease(key), self._path(key)) if path.is_file()]
        return time.time() - max(times, default=0.0)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _lease(self, key: str) -> Path:
        return self._folder / f"{key}.lease"

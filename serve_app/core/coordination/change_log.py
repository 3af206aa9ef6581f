"""What has changed since a version."""

from __future__ import annotations

from collections.abc import KeysView, Mapping
from typing import Generic, TypeVar

from serve_app.core.links import Link

_Name = TypeVar("_Name")


class ChangeLog(Generic[_Name]):
    """Names with the version at which each has changed last, oldest first; versions never fall."""

    __slots__ = ("_versions",)

    def __init__(self) -> None:
        self._versions: dict[_Name, int] = {}

    def __contains__(self, name: _Name) -> bool:
        return name in self._versions

    def keys(self) -> KeysView[_Name]:
        """All names, oldest change first."""
        return self._versions.keys()

    def add(self, name: _Name, version: int) -> None:
        """Enter a change; it replaces an earlier one of the same name."""
        self._versions.pop(name, None)
        self._versions[name] = version

    def discard(self, name: _Name) -> None:
        """Forget a name."""
        self._versions.pop(name, None)

    def since(self, version: int) -> list[_Name]:
        """The names that have changed after ``version``, latest first."""
        found = []
        for name, changed in reversed(self._versions.items()):
            if changed <= version:
                break
            found.append(name)
        return found

    def trim(self, limit: int) -> int:
        """Forget the oldest changes beyond ``limit``; returns the version of the latest forgotten one, else 0."""
        forgotten = 0
        while len(self._versions) > limit:
            forgotten = self._versions.pop(next(iter(self._versions)))
        return forgotten


class MeasuredLinks:
    """The links that routers have measured, and the version at which each has changed last."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        #: By the location where they begin.
        self._changed: dict[str, ChangeLog[tuple[str, str]]] = {}

    @property
    def links(self) -> Mapping[tuple[str, str], Link]:
        """All of them, by the two locations."""
        return self._links

    def update(self, links: Mapping[tuple[str, str], Link], version: int) -> None:
        """Replace what was known of these links."""
        self._links |= links
        for ends in links:
            self._changed.setdefault(ends[0], ChangeLog()).add(ends, version)

    def since(self, location: str | None, version: int) -> dict[tuple[str, str], Link]:
        """The links from a location that have changed after ``version``; none from no location."""
        changed = None if location is None else self._changed.get(location)
        return {} if changed is None else {ends: self._links[ends] for ends in changed.since(version)}

"""What has changed since a version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from serve_app.core.links import Link

_Name = TypeVar("_Name")


class ChangeLog(dict[_Name, int]):
    """Names with the version at which each has changed last, oldest first; versions never fall.

    A dictionary itself, as every report looks names up.
    """

    __slots__ = ()

    def add(self, name: _Name, version: int) -> None:
        """Enter a change; it replaces an earlier one of the same name."""
        self.pop(name, None)
        self[name] = version

    def since(self, version: int) -> list[_Name]:
        """The names that have changed after ``version``, latest first."""
        found = []
        for name, changed in reversed(self.items()):
            if changed <= version:
                break
            found.append(name)
        return found

    def trim(self, limit: int) -> int:
        """Forget the oldest changes beyond ``limit``; returns the version of the latest forgotten one, else 0."""
        forgotten = 0
        while len(self) > limit:
            forgotten = self.pop(next(iter(self)))
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

"""Watches which versions of the models a project has published, so that a deployment follows while it serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from serve_app.serving.periodic import every
from serve_app.store.projects import Projects

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
#: How often a deployment records that it uses a project.
_RECORD_EVERY = 60


class VersionWatcher:
    """Looks at the state of one project, which takes a ``stat`` a second, and calls back when it has changed.

    Args:
        projects: of the store.
        project: the key; empty: there is nothing to watch.
        on_change: goes on with other versions.
        served: the names of the models that are served.
    """

    def __init__(
        self,
        projects: Projects,
        project: str,
        on_change: Callable[[], Awaitable[None]],
        served: Callable[[], tuple[str, ...]],
    ) -> None:
        self._projects = projects
        self._project = project
        self._on_change = on_change
        self._served = served
        self._seen = projects.signature(project) if project else []
        self._looks = 0
        self._looking = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(every(_LOOK_EVERY_S, self.look))

    def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def follow(self, project: str) -> None:
        """Look at another project from now on; its state is taken as seen."""
        self._project = project
        self._seen = await asyncio.to_thread(self._projects.signature, project) if project else []

    async def look(self) -> None:
        """Look once."""
        async with self._looking:
            if not self._project:
                return
            # In a thread: a file system of the network may hang.
            signature = await asyncio.to_thread(self._look, self._project)
            if signature != self._seen:
                logger.info("the published versions have changed")
                await self._on_change()
                self._seen = signature

    def _look(self, project: str) -> list[int]:
        if self._looks % _RECORD_EVERY == 0:
            try:
                self._projects.use(project, self._served())
            except OSError as error:
                logger.info("the store does not learn that it is in use: %s", error)
        self._looks += 1
        return self._projects.signature(project)

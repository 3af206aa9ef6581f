"""Build and run a foreign module in a process of its own first, which it may crash instead of the publisher."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import pickle
from typing import Any

from serve_app.core.catalog import ModelEntry
from serve_app.errors import EdgeServeError
from serve_app.models.builders import registry
from serve_app.models.profiling.fresh_process import call_in_fresh_process
from serve_app.models.publishing.publish_module import try_module

#: The module is tried with the values that it is built with; these weights are at hand everywhere.
_WEIGHTS = "random:0"


def require_no_crash(entry: ModelEntry) -> None:
    """Require that a factory's module can be built and called without an end of its process.

    Raises:
        StoreError: its process crashes, or runs out of memory.
    """
    if not registry.is_factory(entry.builder):
        return
    # Between processes of this program, over a socket that nobody else has.
    arguments = {"pickled": base64.b64encode(pickle.dumps(entry)).decode()}
    call_in_fresh_process(f"{__name__}:try_here", arguments, entry.builder)


def try_here(pickled: str) -> dict[str, Any]:
    """Build and run a module in this process; whatever else is wrong with it, the publisher finds out and says."""
    entry: ModelEntry = pickle.loads(base64.b64decode(pickled))
    with contextlib.suppress(EdgeServeError):
        try_module(entry, registry.build(dataclasses.replace(entry, weights=_WEIGHTS), _WEIGHTS))
    return {}

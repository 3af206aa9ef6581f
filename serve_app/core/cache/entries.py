"""One model in a cache."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.catalog import ModelProfile
from serve_app.core.vocabulary import ModelState


@dataclass(slots=True)
class CacheEntry:
    """One model that takes memory."""

    model: ModelProfile
    state: ModelState
    uses: int
    #: When a request last asked for it, or its last use ended.
    used_s: float
    #: Never a victim: the configuration says so.
    pinned: bool
    #: One of few copies that must exist; never a victim as long as all requests can be served beside it.
    protected: bool = False
    #: Takes no new requests: it is to be evicted as soon as it is idle.
    draining: bool = False
    #: Its load was started by no request.
    preload: bool = False
    #: And no request has asked for it since.
    speculative: bool = False
    #: The form that it is going over to, whose bytes are counted as well.
    incoming: ModelProfile | None = None
    #: The form in which it was loaded, if that is another one: it may go back to it.
    smaller: ModelProfile | None = None
    #: That form is being loaded in the place of a larger one: a load that takes no slot.
    shrinking: bool = False

    @property
    def size_bytes(self) -> int:
        """What it takes, in both forms while it goes over to another one."""
        return self.model.size_bytes + (self.incoming.size_bytes if self.incoming else 0)

    @property
    def unevictable(self) -> bool:
        """Whether it is no victim now."""
        return self.pinned or self.protected


def evictable(entry: CacheEntry) -> bool:
    """Whether a model could be evicted, were it not in use."""
    return entry.state is ModelState.READY or entry.speculative


def idle(entry: CacheEntry) -> bool:
    """Whether a model could be evicted now."""
    return not entry.uses and evictable(entry)

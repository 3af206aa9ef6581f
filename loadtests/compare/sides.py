"""What takes part, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from loadtests.compare.drive import Connection
from loadtests.compare.edgeserve import EdgeServe
from loadtests.compare.mlserver_side import MLServer
from loadtests.compare.multiplexed import Multiplexed
from loadtests.compare.processes import Memory
from loadtests.compare.zoo import Zoo


class Side(Protocol):
    """One server, deployed for one setting."""

    def start(self) -> None:
        """Come up and wait until it serves; raises ``SideFailed``."""

    def connect(self) -> Connection:
        """A client, for one thread."""

    def memory(self) -> Memory:
        """What its processes take."""

    def cpu_s(self) -> float:
        """Seconds of processor time that its processes have used."""

    def held_bytes(self) -> int:
        """Weights of the models in its memory now; raises ``RequestFailed``."""

    def stop(self) -> None:
        """End everything that it has started."""


OURS, MAPPED = "edgeserve", "edgeserve-mapped"
DEFAULT_PROXY, HAPROXY, TUNED = "multiplexed", "multiplexed-haproxy", "multiplexed-tuned"

#: In the order of the tables.
SIDES: dict[str, Callable[[Zoo], Side]] = {
    OURS: lambda zoo: EdgeServe(OURS, zoo, zoo.catalog),
    MAPPED: lambda zoo: EdgeServe(MAPPED, zoo, zoo.mapped_catalog),
    DEFAULT_PROXY: lambda zoo: Multiplexed(DEFAULT_PROXY, zoo, haproxy=False, tuned=False),
    HAPROXY: lambda zoo: Multiplexed(HAPROXY, zoo, haproxy=True, tuned=False),
    TUNED: lambda zoo: Multiplexed(TUNED, zoo, haproxy=True, tuned=True),
    "mlserver": MLServer,
}

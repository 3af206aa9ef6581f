"""The coordinator as a Ray actor, and how the others reach it. All rules are in ``core/coordination.py``."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping

import ray

from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.serving import code_version
from serve_app.serving.metrics import CoordinatorMetrics

#: Where the actor is found: one for the whole cluster.
NAMESPACE = "edgeserve"
NAME = "coordinator"

_METRICS_EVERY_S = 1.0
#: So many pairs of location and model have their rate in the metrics, or none.
_MAX_RATES = 10_000
_CODE_TIMEOUT_S = 5.0


class Coordinator:
    """Central, but off the request path: takes reports, gives views and orders."""

    def __init__(self, rules: CoordinatorRules) -> None:
        self._state = CoordinatorState(epoch=uuid.uuid4().hex, rules=rules)
        self._metrics = CoordinatorMetrics()
        self._counted_models: set[str] = set()
        self._measured_s = 0.0
        self._code = code_version.digest()

    def code(self) -> str:
        """The digest of the code that it has begun with; see ``code.py``."""
        return self._code

    def report(self, report: WorkerReport, epoch: str, version: int) -> ViewDelta:
        """Take a worker's report; answer with what it does not know yet, and what it should do."""
        now = time.monotonic()
        self._measure_if_due(now)
        return self._state.answer(report, epoch, version, now)

    def configure(self, rules: CoordinatorRules) -> None:
        """A participant says how it was told that coordinators work; the newest configuration counts."""
        self._state.configure(rules, time.monotonic())

    def depart(self, replica: str) -> None:
        """A worker says that it is shutting down."""
        self._state.depart(replica)

    def view(
        self, links: Mapping[tuple[str, str], Link], epoch: str, version: int, location: str | None = None
    ) -> ViewDelta:
        """Take the ways that a router has measured; answer with what it does not know yet."""
        self._state.measured(links)
        now = time.monotonic()
        self._measure_if_due(now)
        return self._state.view(epoch, version, now, location)

    def everything(self) -> ViewDelta:
        """Every worker's last report and all rates, for people to look at."""
        return self._state.everything(time.monotonic())

    def _measure_if_due(self, now: float) -> None:
        if now - self._measured_s >= _METRICS_EVERY_S:
            self._measured_s = now
            self._measure(now)

    def _measure(self, now: float) -> None:
        # Of more, nobody could look at all, and to tell them would take longer than all else.
        if self._state.rated <= _MAX_RATES:
            for location, rates in self._state.rates(now).items():
                for model_id, per_s in rates.items():
                    self._metrics.model_rate.set(per_s, tags={"location": location, "model": model_id})
        holders = self._state.holder_counts()
        for model_id in self._counted_models | holders.keys():
            self._metrics.model_holders.set(holders.get(model_id, 0), tags={"model": model_id})
        self._counted_models |= holders.keys()


def end() -> None:
    """End the coordinator, if there is one; whoever needs it starts another."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))


def end_outdated() -> None:
    """End a coordinator that has begun with other code than is on the disk now: it outlives what is deployed anew."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        is_current = ray.get(actor.code.remote(), timeout=_CODE_TIMEOUT_S) == code_version.digest()
    except ValueError:
        return
    except (AttributeError, ray.exceptions.RayError):
        # So old that it cannot be asked, or it does not answer.
        is_current = False
    if not is_current:
        end()

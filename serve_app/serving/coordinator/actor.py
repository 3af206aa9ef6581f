"""The coordinator as a Ray actor; its state machine is ``core/coordination/coordinator_state.py``."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping

import ray

from serve_app.core.cluster.reports import ViewDelta, WorkerReport
from serve_app.core.coordination.coordinator_state import CoordinatorState
from serve_app.core.coordination.events import LinksMeasured, Reader, ReaderSeen, RulesChanged, TimePassed, WorkerLeft
from serve_app.core.coordination.rules import CoordinatorRules
from serve_app.core.links import Link
from serve_app.serving import code_version
from serve_app.serving.metrics import CoordinatorMetrics

#: Where the actor is found: one for the whole cluster.
NAMESPACE = "edgeserve"
NAME = "coordinator"

_METRICS_EVERY_S = 1.0
#: Up to so many pairs of location and model have their rate in the metrics; with more pairs, none has.
_MAX_RATES = 10_000
_CODE_TIMEOUT_S = 5.0


class Coordinator:
    """Central, but off the request path: takes reports and answers with deltas and commands."""

    def __init__(self, rules: CoordinatorRules) -> None:
        self._state = CoordinatorState(epoch=uuid.uuid4().hex, rules=rules)
        self._metrics = CoordinatorMetrics()
        self._counted_models: set[str] = set()
        self._measured_s = 0.0
        self._code = code_version.digest()

    def code(self) -> str:
        """The digest of the code that this process has begun with; see ``code_version.py``."""
        return self._code

    def report(self, report: WorkerReport, epoch: str, version: int) -> ViewDelta:
        """Take a worker's report; answer with what is new to the worker, and with its commands."""
        now = time.monotonic()
        self._measure_if_due(now)
        return self._state.exchange(report, epoch, version, now)

    def configure(self, rules: CoordinatorRules) -> None:
        """Take the rules of a participant; the newest configuration counts."""
        self._state.handle(RulesChanged(rules=rules), time.monotonic())

    def deregister(self, replica: str) -> None:
        """Take note that a worker shuts down."""
        self._state.handle(WorkerLeft(replica=replica), time.monotonic())

    def read(
        self, links: Mapping[tuple[str, str], Link], epoch: str, version: int, location: str | None = None
    ) -> ViewDelta:
        """Take the links that a router has measured; answer with what is new to the router."""
        now, reader = time.monotonic(), Reader(location, None, epoch, version)
        self._measure_if_due(now)
        if links:
            self._state.handle(LinksMeasured(links=links), now)
        self._state.handle(ReaderSeen(reader), now)
        return self._state.delta(reader, now)

    def snapshot(self) -> ViewDelta:
        """Every worker's last report and all rates, for people to look at."""
        now = time.monotonic()
        self._state.handle(TimePassed(), now)
        return self._state.snapshot(now)

    def _measure_if_due(self, now: float) -> None:
        if now - self._measured_s >= _METRICS_EVERY_S:
            self._measured_s = now
            self._measure(now)

    def _measure(self, now: float) -> None:
        # More would be too many to look at, and to set them would take longer than everything else.
        if self._state.pairs <= _MAX_RATES:
            for location, rates in self._state.rates(now).items():
                for model_id, per_s in rates.items():
                    self._metrics.model_rate.set(per_s, tags={"location": location, "model": model_id})
        directory = self._state.directory
        holders = {model_id: len(directory.holders(model_id)) for model_id in directory.held_models()}
        for model_id in self._counted_models | holders.keys():
            self._metrics.model_holders.set(holders.get(model_id, 0), tags={"model": model_id})
        self._counted_models |= holders.keys()


def end() -> None:
    """End the coordinator, if there is one; the next participant that needs it starts another."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))


def end_outdated() -> None:
    """End a coordinator whose process has begun with other code than is on the disk now: it outlives deployments."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        is_current = ray.get(actor.code.remote(), timeout=_CODE_TIMEOUT_S) == code_version.digest()
    except ValueError:
        return
    except (AttributeError, ray.exceptions.RayError):
        # It is too old to have the method, or does not answer.
        is_current = False
    if not is_current:
        end()

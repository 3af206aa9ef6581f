"""Which model serves a request: the one that it names, or a member of the family that it names."""

from __future__ import annotations

from serve_app.core.catalog import PublishedModel, most_accurate_first
from serve_app.core.contract import BATCH
from serve_app.core.links import Topology
from serve_app.core.routing.choose import RoutingRequest, choose
from serve_app.core.routing.displacement_cost import exec_s
from serve_app.core.routing.router_view import RouterView
from serve_app.core.routing.rules import RoutingRules
from serve_app.core.vocabulary import Forwarding
from serve_app.errors import DeadlineExceeded, InvalidRequest
from serve_app.serving.router.request import InferenceRequest
from serve_app.tasks.base import RawInput
from serve_app.tasks.tensors import Tensors


def require_in_time(model: PublishedModel, request: InferenceRequest, view: RouterView) -> PublishedModel:
    """Return the model; raise ``DeadlineExceeded`` if no worker is fast enough for the deadline by far."""
    if request.deadline_s is not None:
        fastest_s = min([exec_s(model.profile, report) for report in view.workers()] or [0.0])
        fastest_s *= times_longer(request.payload, model)
        # Measured times vary; only what is out of reach by far is rejected untried.
        if fastest_s / 2 > request.deadline_s:
            raise DeadlineExceeded(
                f"model {model.model_id} takes about {fastest_s * 1000:.0f} ms, longer than the deadline of "
                f"{request.deadline_s * 1000:g} ms; raise deadline_ms or ask for a family"
            )
    return model


def select_member(
    members: tuple[PublishedModel, ...],
    request: InferenceRequest,
    view: RouterView,
    rules: RoutingRules,
    links: Topology,
) -> PublishedModel:
    """Return the most accurate member of a family that fits, and is expected to meet the deadline.

    Args:
        members: of the family.
        request: names the family.
        view: what the router knows of the cluster.
        rules: for the choice.
        links: between locations, as measured.

    Raises:
        InvalidRequest: no member is accurate enough.
        DeadlineExceeded: no member is expected to meet the deadline.
    """
    candidates = most_accurate_first(members, request.min_accuracy)
    may_forward = request.forwarding is not Forwarding.NEVER
    workers = view.workers() if may_forward else view.workers_at(request.location)
    fitting = [model for model in candidates if request.fits(model)] or candidates
    fitting = [model for model in fitting if any(report.can_hold(model.profile) for report in workers)] or fitting
    if request.deadline_s is None:
        return fitting[0]
    for model in fitting:
        if choose(routing_request(request, model), view, rules, links).expected_s <= request.deadline_s:
            return model
    raise DeadlineExceeded(
        f"no model of {request.name} is expected to answer within {request.deadline_s * 1000:g} ms; "
        "raise deadline_ms or lower min_accuracy"
    )


def routing_request(request: InferenceRequest, model: PublishedModel) -> RoutingRequest:
    """Return what the choice needs of a request."""
    return RoutingRequest(
        model=model.profile,
        here=request.location,
        payload_bytes=request.payload_bytes,
        forwarding=request.forwarding,
        times_longer=times_longer(request.payload, model),
    )


def times_longer(payload: Tensors | RawInput, model: PublishedModel) -> float:
    """Return how many times longer a model executes on these tensors than on those of the least sizes.

    What a task makes of raw input has no sizes before a worker has read it: it counts as the least ones.
    """
    if isinstance(payload, RawInput) or not (model.costs or model.row_by_row):
        return 1.0
    if not model.costs:
        first = model.contract.inputs[0]
        array = payload.get(first.name)
        if array is not None and first.axes and first.axes[0] == BATCH:
            return float(array.shape[0])
    try:
        sizes = model.contract.sizes({name: array.shape for name, array in payload.items()})
    except InvalidRequest:
        # A member of a family that takes other tensors; it is refused by its worker.
        return 1.0
    return model.times_longer(sizes)

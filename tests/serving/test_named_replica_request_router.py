"""Which replica Serve sends a call to, and when such a call fails; no cluster runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

#: Ray's own, of another library, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def replica(name: str) -> Any:
    from ray.serve._private.common import DeploymentID
    from ray.serve.request_router import ReplicaID

    return SimpleNamespace(replica_id=ReplicaID(name, deployment_id=DeploymentID(name="Worker", app_name="paris")))


@pytest.fixture
def router() -> Any:
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID

    from serve_app.serving.transport.named_replica_request_router import NamedReplicaRequestRouter

    made = NamedReplicaRequestRouter(
        deployment_id=DeploymentID(name="Worker", app_name="paris"), handle_source=DeploymentHandleSource.REPLICA
    )
    made.initialize_state()
    return made


def call(number: int, replica: str | None) -> Any:
    from ray.serve._private.common import RequestMetadata
    from ray.serve.request_router import PendingRequest

    metadata = RequestMetadata(request_id=str(number), internal_request_id=str(number))
    return PendingRequest(args=[], kwargs={"replica": replica}, metadata=metadata)


async def test_a_call_goes_to_the_replica_that_it_names(router: Any) -> None:
    first, second = replica("first"), replica("second")
    assert await router.choose_replicas([first, second], call(1, "second")) == [[second]]


async def test_a_call_without_a_name_goes_to_any_replica(router: Any) -> None:
    replicas = [replica("first"), replica("second")]
    (chosen,) = await router.choose_replicas(replicas, call(1, None))
    assert sorted(each.replica_id.unique_id for each in chosen) == ["first", "second"]


async def test_a_call_to_a_replica_that_does_not_exist_fails(router: Any) -> None:
    from ray.serve.exceptions import ReplicaUnavailableError

    pending = call(1, "second")
    await router.choose_replicas([replica("first")], pending)
    with pytest.raises(ReplicaUnavailableError):
        await pending.future


async def test_a_replica_that_could_not_be_reached_is_lost_for_a_while(router: Any) -> None:
    first = replica("first")
    router.on_replica_actor_unavailable(first.replica_id)
    pending = call(1, "first")
    await router.choose_replicas([first], pending)
    assert pending.future.exception() is not None
    router.LOST_S = 0.0
    assert await router.choose_replicas([first], call(2, "first")) == [[first]]


async def test_the_death_of_a_replica_fails_the_calls_that_wait_for_it_and_no_others(router: Any) -> None:
    calls = {name: call(number, name) for number, name in enumerate(("first", "second"))}
    for pending in calls.values():
        router._add_pending_request_to_indices(pending)
    router.on_replica_actor_died(replica("first").replica_id)
    assert calls["first"].future.exception() is not None
    assert not calls["second"].future.done()

"""Which failures of a call mean that the worker is lost, so that another worker gets the request."""

from __future__ import annotations

import grpc
import pytest

from serve_app.serving.transport.worker_pool import WorkerLost

#: Ray's own, of another library, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


async def failing(code: grpc.StatusCode) -> None:
    raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


async def test_a_call_that_a_replica_cancels_as_it_ends_counts_as_a_lost_worker() -> None:
    from serve_app.serving.transport.worker_client import reply_of

    with pytest.raises(WorkerLost):
        await reply_of(failing(grpc.StatusCode.CANCELLED))


async def test_a_call_that_the_transport_refuses_is_a_fault() -> None:
    from serve_app.serving.transport.worker_client import reply_of

    with pytest.raises(grpc.aio.AioRpcError):
        await reply_of(failing(grpc.StatusCode.RESOURCE_EXHAUSTED))

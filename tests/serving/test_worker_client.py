"""Which failures of a call say that the worker is lost, so that another one is asked."""

from __future__ import annotations

import grpc
import pytest

from serve_app.serving.transport.worker_pool import WorkerLost

#: Ray's own, of another library, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


async def failing(code: grpc.StatusCode) -> None:
    raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


async def test_a_call_that_a_worker_cuts_off_because_its_time_is_over_is_made_elsewhere() -> None:
    from serve_app.serving.transport.worker_client import _call

    with pytest.raises(WorkerLost):
        await _call(failing(grpc.StatusCode.CANCELLED))


async def test_a_call_that_the_transport_refuses_is_a_fault_wherever_it_is_made() -> None:
    from serve_app.serving.transport.worker_client import _call

    with pytest.raises(grpc.aio.AioRpcError):
        await _call(failing(grpc.StatusCode.RESOURCE_EXHAUSTED))

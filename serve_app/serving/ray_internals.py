"""Everything of Ray that EdgeServe uses without being Ray's public interface, each with its reason.

No other module of the package touches a private name of Ray. ``tests/serving/test_ray_internals.py`` holds one test for
each name, so that an upgrade of Ray that changes one fails by that name.

Functions import Ray when they are called: the command line imports this module and must start without Ray.
"""

from __future__ import annotations

from collections.abc import Iterable
from logging import Handler, getLogger
from typing import Any, Final

#: Name of the logger that Serve sets up in every replica (``ray.serve._private.constants.SERVE_LOGGER_NAME``).
SERVE_LOGGER: Final = "ray.serve"

#: Resource that the head node alone has (``ray._common.constants.HEAD_NODE_RESOURCE_NAME``). A part of it places an
#: actor on the head; scheduling by node id would need the id of a head that may not run yet.
HEAD_NODE_RESOURCE: Final = "node:__internal_head__"

#: File below Ray's temporary folder with the address of the cluster of this machine
#: (``ray._common.utils.get_ray_address_file``). Ray reads it only while connecting, and waits for a dead cluster then.
ADDRESS_FILE: Final = "ray_current_cluster"

#: Module that is the command ``ray``; run with ``python -m``, it needs no ``ray`` on the PATH.
COMMAND_MODULE: Final = "ray.scripts.scripts"


def set_version(deployment: Any, version: str) -> Any:
    """Set the version of a Serve deployment (``Deployment._version``), and return the deployment.

    Serve replaces the replicas of a deployment whose version has changed. ``Deployment.options(version=...)`` has been
    removed; without a version, Serve replaces all replicas each time an application is deployed.
    """
    deployment._version = version
    return deployment


def replica_hosts(applications: Iterable[str]) -> set[str]:
    """Return the addresses of all hosts that run replicas of these applications (``_get_global_client``).

    The public ``serve.status()`` counts replicas but does not place them.
    """
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"]
    return {
        replica["node_ip"]
        for name in set(applications) & details.keys()
        for deployment in details[name]["deployments"].values()
        for replica in deployment["replicas"]
        # A replica that has not started has no host yet.
        if replica.get("node_ip")
    }


def delete_application(name: str) -> None:
    """Have Serve delete an application, without waiting (``serve.delete(_blocking=)``).

    A replica drains for half a minute; the public call waits for that, one application after another.
    """
    from ray import serve

    serve.delete(name, _blocking=False)


def deployment_handle(deployment: str, application: str) -> Any:
    """Return a handle to a deployment that may not exist yet (``get_deployment_handle(_check_exists=)``).

    Locations start at the same time. The public call raises for a deployment that is still starting, and its check
    blocks the event loop.
    """
    from ray import serve

    return serve.get_deployment_handle(deployment, app_name=application, _check_exists=False)


def pending_requests(request_router: Any) -> list[Any]:
    """Return the requests to which no replica is assigned yet (``RequestRouter._pending_requests_by_id``).

    Serve passes a pending request to a router only while there are candidates for it; a request
    for a replica that has died must fail although no other replica exists.
    """
    return list(request_router._pending_requests_by_id.values())


def discard_pending_request(request_router: Any, pending_request: Any) -> None:
    """Forget a request that has failed (``RequestRouter._remove_pending_request_from_indices``).

    Serve forgets a pending request when a replica is assigned to it; nothing public ends one without a replica.
    """
    request_router._remove_pending_request_from_indices(pending_request)


def serve_log_handlers() -> list[Handler]:
    """Return the handlers that write to the log file of this replica.

    Serve sets up its own loggers only, and says where the file is nowhere else.
    """
    return getLogger(SERVE_LOGGER).handlers

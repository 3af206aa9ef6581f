"""Names of Ray that are not its public interface: one test each, so that an upgrade of Ray fails by a name.

Nothing here starts a cluster.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.serving import ray_internals
from serve_app.serving.launch.local_ray import FAST_INGRESS

#: Ray's own, of another library, as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PACKAGE = Path(__file__).parents[2] / "serve_app"


def test_deployment_version_is_kept_by_serve() -> None:
    from ray import serve

    deployment = serve.deployment(name="Any")(type("Any", (), {}))
    assert deployment.version is None
    assert ray_internals.set_version(deployment, "1").version == "1"
    assert deployment.options(num_replicas=2).version == "1"


def test_get_global_client_has_the_details_of_replicas() -> None:
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationDetails, DeploymentDetails, ReplicaDetails, ServeInstanceDetails

    client = inspect.signature(_get_global_client, eval_str=True).return_annotation.__args__[0]
    assert callable(client.get_serve_details)
    path = (ServeInstanceDetails, "applications"), (ApplicationDetails, "deployments"), (DeploymentDetails, "replicas")
    assert all(field in model.model_fields for model, field in (*path, (ReplicaDetails, "node_ip")))


def test_delete_takes_blocking() -> None:
    from ray import serve

    assert "_blocking" in inspect.signature(serve.delete).parameters


def test_get_deployment_handle_takes_check_exists() -> None:
    from ray import serve

    assert {"app_name", "_check_exists"} <= inspect.signature(serve.get_deployment_handle).parameters.keys()


def test_request_router_has_pending_requests_by_id() -> None:
    from ray.serve.request_router import RequestRouter

    assert "self._pending_requests_by_id: Dict[str, PendingRequest]" in inspect.getsource(RequestRouter)


def test_request_router_has_remove_pending_request_from_indices() -> None:
    from ray.serve.request_router import RequestRouter

    assert [*inspect.signature(RequestRouter._remove_pending_request_from_indices).parameters] == [
        "self", "pending_request",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "hook", ["choose_replicas", "initialize_state", "on_replica_actor_died", "on_replica_actor_unavailable"]
)
def test_request_router_calls_the_hook(hook: str) -> None:
    from ray.serve.request_router import RequestRouter

    assert callable(getattr(RequestRouter, hook))


def test_pending_request_has_should_backoff_kwargs_and_future() -> None:
    from ray.serve.request_router import PendingRequest

    parameters = inspect.signature(PendingRequest, eval_str=True).parameters
    assert {"args", "kwargs", "future", "routing_context"} <= parameters.keys()
    assert "should_backoff" in parameters["routing_context"].annotation.__dataclass_fields__


def test_serve_logger_has_its_name() -> None:
    from ray.serve._private.constants import SERVE_LOGGER_NAME

    assert SERVE_LOGGER_NAME == ray_internals.SERVE_LOGGER


def test_head_node_resource_has_its_name() -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert HEAD_NODE_RESOURCE_NAME == ray_internals.HEAD_NODE_RESOURCE


def test_address_file_lies_below_the_temporary_folder(tmp_path: Path) -> None:
    from ray._common.utils import get_ray_address_file

    assert Path(get_ray_address_file(str(tmp_path))) == tmp_path / ray_internals.ADDRESS_FILE


def test_command_module_is_there() -> None:
    assert importlib.util.find_spec(ray_internals.COMMAND_MODULE) is not None


@pytest.mark.parametrize("variable", [name for name in FAST_INGRESS if name.startswith("RAY_SERVE_")])
def test_serve_reads_the_environment_variable(variable: str) -> None:
    from ray.serve._private import constants

    assert f'"{variable}"' in inspect.getsource(constants)


def test_ray_reads_the_other_environment_variables() -> None:
    from ray._common.usage import usage_constants
    from ray._private import accelerators

    others = {name for name in FAST_INGRESS if not name.startswith("RAY_SERVE_")}
    assert others == {
        usage_constants.USAGE_STATS_ENABLED_ENV_VAR,
        accelerators.RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR,
    }


def private_names_of_ray(path: Path) -> Iterator[str]:
    """Private modules and names that a file imports from Ray, and private arguments that it passes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "ray":
                yield from (part for part in (*module.split("."), *(name.name for name in names)) if part[0] == "_")
            case ast.Import(names=names):
                for name in names:
                    parts = name.name.split(".")
                    yield from (part for part in parts if parts[0] == "ray" and part[0] == "_")
            case ast.Call(keywords=keywords):
                yield from (keyword.arg for keyword in keywords if keyword.arg and keyword.arg[0] == "_")


def test_no_other_module_touches_private_names_of_ray() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): sorted(set(names))
        for path in sorted((PACKAGE / "serving").rglob("*.py"))
        if (names := [*private_names_of_ray(path)])
    }
    assert found == {"serving/ray_internals.py": ["_blocking", "_check_exists", "_get_global_client"]}

"""Models and their state: health, metadata and the model repository extension of the Open Inference Protocol."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import Request
from fastapi.responses import Response

from serve_app import __version__
from serve_app.serving import oip
from serve_app.serving.api.endpoints import Endpoints
from serve_app.serving.api.error_responses import JsonResponse
from serve_app.serving.router.model_problems import problem_of, unusable_reason


class RepositoryEndpoints(Endpoints):
    """The handlers of requests about models."""

    async def server(self, request: Request) -> Response:
        """Open Inference Protocol: the server and its extensions."""
        extensions = (*oip.EXTENSIONS, "model_repository")
        return JsonResponse(oip.server_metadata("edgeserve", __version__, extensions))

    async def live(self, request: Request) -> Response:
        """Open Inference Protocol: whether the process runs."""
        return JsonResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Open Inference Protocol: whether a worker of the location is there to serve."""
        location = self._reader.location(request)
        is_ready = self._router.is_ready(location)
        return JsonResponse({"ready": is_ready}, _ready_status(is_ready))

    async def model(self, request: Request) -> Response:
        """Open Inference Protocol: one model's tensors, versions, family, accuracy and weights."""
        models = self._reader.models(request)
        versions = self._router.catalog.versions(models[0].name)
        content = oip.model_metadata(models[0], tuple(map(str, versions)))
        content["parameters"]["version"] = str(models[0].version)
        problem = problem_of(models, self._router.view.workers())
        if problem is not None:
            content["parameters"]["problem"] = problem
        return JsonResponse(content)

    async def model_ready(self, request: Request) -> Response:
        """Open Inference Protocol: whether a model can be served, from memory or after a load."""
        name = request.path_params["model"]
        problem = self._router.catalog.problems.get(name)
        if problem is None:
            problem = problem_of(self._reader.models(request), self._router.view.workers())
        content = {"name": name, "ready": problem is None, **({} if problem is None else {"reason": problem})}
        return JsonResponse(content, _ready_status(problem is None))

    async def repository_index(self, request: Request) -> Response:
        """Model repository extension: every model, and whether this location holds it."""
        location = self._reader.location(request)
        ready = self._router.ready_models(location)
        index = [
            {
                "name": model.name,
                "version": str(model.version),
                "state": "READY" if model.model_id in ready else "UNAVAILABLE",
                "reason": unusable_reason(model, self._router.view.workers()) or "",
            }
            for model in self._router.catalog.models
        ]
        index += [
            {"name": name, "version": "", "state": "UNAVAILABLE", "reason": problem}
            for name, problem in self._router.catalog.problems.items()
        ]
        return JsonResponse(index)

    async def load(self, request: Request) -> Response:
        """Model repository extension: load a model at this location."""
        await self._router.load(self._reader.location(request), request.path_params["model"])
        return JsonResponse({})

    async def unload(self, request: Request) -> Response:
        """Model repository extension: unload a model at this location."""
        await self._router.unload(self._reader.location(request), request.path_params["model"])
        return JsonResponse({})


def _ready_status(is_ready: bool) -> HTTPStatus:
    return HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE

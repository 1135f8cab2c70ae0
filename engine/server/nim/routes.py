"""The paths of NVIDIA's endpoint and what answers them."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..access import Access
from ..bodies import read_object
from ..events import PieceStream
from ..failures import Failure
from ..protocol import Protocol
from ..service import Model, Service
from ..settings import Settings
from .asked import read_chat
from .document import PATHS, SCHEMAS
from .replies import Answer, problem_of, status_of

__all__ = ["protocol"]


def protocol(service: Service, settings: Settings, access: Access) -> Protocol:
    """`/v1/vlm/{publisher}/{model}`, `/v1/health/live` and `/v1/health/ready`."""

    async def chat(http: HttpRequest) -> Response:
        model = _model(service, http.path_params["publisher"], http.path_params["model"])
        asked = await read_chat(await read_object(http, settings), access)
        answer = Answer()
        if asked.stream:
            return PieceStream(await service.begin(model, asked.request, http), answer.events, problem_of)
        reply = await service.generate(model, asked.request, http)
        return JSONResponse(answer.whole(reply.candidates[0], reply.usage))

    async def live(http: HttpRequest) -> Response:
        return JSONResponse({"object": "health.response", "message": "Service is live."})

    async def ready(http: HttpRequest) -> Response:
        return JSONResponse({"object": "health.response", "message": "Service is ready."})

    return Protocol(
        name="nim",
        routes=[
            Route("/v1/vlm/{publisher}/{model}", chat, methods=["POST"]),
            Route("/v1/health/live", live, methods=["GET"]),
            Route("/v1/health/ready", ready, methods=["GET"]),
        ],
        owns=lambda path: path.startswith(("/v1/vlm/", "/v1/health/")),
        write_failure=_write_failure,
        openapi=PATHS,
        schemas=SCHEMAS,
        open_paths=frozenset(["/v1/health/live", "/v1/health/ready"]),
    )


def _model(service: Service, publisher: str, name: str) -> Model:
    """The bundle of this name, or the only one there is. Raises Failure."""
    by_name = {model.name: model for model in service.models}
    found = by_name.get(f"{publisher}/{name}") or by_name.get(name)
    return found or (service.models[0] if len(service.models) == 1 else service.model(f"{publisher}/{name}"))


def _write_failure(failure: Failure) -> Response:
    return JSONResponse(problem_of(failure), status_of(failure), media_type="application/problem+json")

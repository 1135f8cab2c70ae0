"""The paths of OpenAI's API and what answers them."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..access import Access
from ..bodies import read_object
from ..events import PieceStream
from ..failures import Failure
from ..protocol import Protocol
from ..service import DEFAULT_MODEL, Service
from ..settings import Settings
from .config import model_of, read_chat
from .document import paths, schemas
from .replies import Answer, error_of, model_card

__all__ = ["protocol"]


def protocol(service: Service, settings: Settings, access: Access) -> Protocol:
    """`/v1/models` and `/v1/chat/completions`."""

    async def list_models(http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(model) for model in service.models]})

    async def get_model(http: HttpRequest) -> Response:
        return JSONResponse(model_card(model_of(service, http.path_params["model"])))

    async def complete(http: HttpRequest) -> Response:
        asked = await read_chat(await read_object(http, settings), service, access)
        answer = Answer(asked)
        if asked.stream:
            return PieceStream(await service.begin(asked.model, asked.request, http), answer.events, error_of)
        return JSONResponse(answer.completion(await service.generate(asked.model, asked.request, http)))

    names = list(dict.fromkeys([*(model.name for model in service.models), DEFAULT_MODEL]))
    return Protocol(
        name="openai",
        routes=[
            Route("/v1/models", list_models, methods=["GET"]),
            Route("/v1/models/{model:path}", get_model, methods=["GET"]),
            Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
        owns=_owns,
        write_failure=_write_failure,
        openapi=paths(names),
        schemas=schemas(names),
    )


def _owns(path: str) -> bool:
    """Paths under /v1 that are neither Vertex AI's, nor NVIDIA's, nor end in a verb behind a colon."""
    if not path.startswith("/v1/") or path.startswith(("/v1/projects/", "/v1/vlm/", "/v1/health/")):
        return False
    return not (path.startswith("/v1/models/") and ":" in path)


def _write_failure(failure: Failure) -> Response:
    return JSONResponse(error_of(failure), failure.status)

"""The application: all protocols at once, and what the server says about itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .access import Access
from .failures import Failure
from .gate import Gate, respond
from .metrics import CONTENT_TYPE
from .openapi import document
from .protocol import Protocol
from .service import Service
from .settings import Settings

__all__ = ["PROTOCOLS", "create_app"]

MakeProtocol = Callable[[Service, Settings, Access], Protocol]

PROTOCOLS = ("gemini", "openai", "nim")


def create_app(service: Service, settings: Settings, makers: Sequence[MakeProtocol] | None = None) -> Starlette:
    """The ASGI application of `service`, which speaks the protocols that `makers` make, by default all there are.

    Raises InputError for folders and hosts in the settings that are none.
    """
    access = Access(settings)
    if makers is None:
        modules = [importlib.import_module(f".{name}", __package__) for name in PROTOCOLS]
        makers = [module.protocol for module in modules]
    protocols = [make(service, settings, access) for make in makers]
    described = document(protocols)

    async def health(http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "models": [model.name for model in service.models]})

    async def metrics(http: HttpRequest) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def failed(http: HttpRequest, error: Exception) -> Response:
        """Unknown paths and methods."""
        assert isinstance(error, HTTPException)
        allowed = (error.headers or {}).get("Allow")
        if allowed is None:
            failure = Failure(error.status_code, "there is nothing at this path", kind="not_found")
        elif http.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": f"{allowed}, OPTIONS"})
        else:
            failure = Failure(405, f"{http.method} is not allowed here, only {allowed}", kind="method")
        response = respond(protocols, http.url.path, failure)
        if allowed is not None:
            response.headers["allow"] = allowed
        return response

    async def openapi(http: HttpRequest) -> Response:
        return JSONResponse(described)

    own = [Route("/health", health), Route("/metrics", metrics), Route("/openapi.json", openapi)]
    routes = [*own, *(route for protocol in protocols for route in protocol.routes)]
    gate = Middleware(Gate, protocols=protocols, settings=settings, metrics=service.metrics)  # pyright: ignore
    app = Starlette(routes=routes, middleware=[gate], exception_handlers={HTTPException: failed})
    # A redirection would name the address that the client has used, which behind a proxy leads nowhere.
    app.router.redirect_slashes = False
    return app

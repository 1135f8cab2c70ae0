"""The paths of the Gemini API and of Vertex AI, and what answers them.

    /v1beta, /v1alpha, /v1      models, models/M, models/M:generateContent, :streamGenerateContent, :countTokens
    /v1beta1, /v1               the same below publishers/google and projects/P/locations/L/publishers/google

OpenAI's API has /v1/models and /v1/models/M too. They are answered in Google's form if the request comes from one of
Google's clients, which say so in headers of their own; errors there that no endpoint raises are OpenAI's.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Awaitable, Callable, Collection, Sequence

from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Scope

from ...manifest import Manifest
from ..access import Access
from ..bodies import Fields, read_object
from ..events import Framing, PieceStream
from ..failures import Failure
from ..protocol import Protocol
from ..service import Model, Service
from ..settings import Settings
from .config import Asked, read_count, read_request
from .document import GEMINI, PROJECTS, PUBLISHED, SCHEMAS, paths
from .replies import Writer, count_json, error_json, model_json, publisher_model_json

__all__ = ["protocol"]

_GOOGLE_HEADERS = ("x-goog-api-key", "x-goog-api-client")
_VERBS = ("generateContent", "streamGenerateContent", "countTokens")
_PAGE, _LARGEST_PAGE = 50, 1000
_ARRAY = Framing(media_type="application/json", opening="[", between=",\r\n", closing="]")
_EVENTS = Framing(media_type="text/event-stream", before="data: ", after="\r\n\r\n")
_OWN = re.compile(r"/v1(?:beta1?|alpha)(/.*)?|/v1/(projects|publishers|tunedModels)(/.*)?|/v1/models/[^/]+:[^/]*")

Endpoint = Callable[[HttpRequest], Awaitable[Response]]


def owns(path: str) -> bool:
    """Whether a path is one of Google's. /v1/models and /v1/models/M are OpenAI's, whose clients know no other."""
    return _OWN.fullmatch(path) is not None


def write_failure(failure: Failure) -> Response:
    """An error in Google's form."""
    return JSONResponse(error_json(failure), failure.status, _headers(failure))


def _headers(failure: Failure) -> dict[str, str]:
    return {} if failure.retry_after is None else {"retry-after": str(failure.retry_after)}


def protocol(service: Service, settings: Settings, access: Access) -> Protocol:
    """The protocol."""
    return Protocol(
        name="gemini",
        routes=_Endpoints(service, settings, access).routes(),
        owns=owns,
        write_failure=write_failure,
        openapi=paths([model.name for model in service.models]),
        schemas=SCHEMAS,
    )


class _GoogleRoute(Route):
    """A path that another protocol has too: for requests of Google's clients only."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD") or not any(name in headers for name in _GOOGLE_HEADERS):
            return Match.NONE, {}
        return super().matches(scope)


class _Endpoints:
    """What answers the paths."""

    def __init__(self, service: Service, settings: Settings, access: Access):
        self._service = service
        self._settings = settings
        self._access = access

    def routes(self) -> list[Route]:
        """All paths; the more special ones come first."""
        list_models, get_model = _answered(self.list_models), _answered(self.get_model)
        list_published, get_published = _answered(self.list_published), _answered(self.get_published)
        return [
            *(route for models in (*GEMINI, *PUBLISHED, *PROJECTS) for route in self._verbs(models)),
            *(Route(models, list_published) for models in PUBLISHED),
            *(Route(f"{models}/{{model}}", get_published) for models in PUBLISHED),
            *(Route(models, list_models) for models in GEMINI[:-1]),
            *(Route(f"{models}/{{model}}", get_model) for models in GEMINI[:-1]),
            _GoogleRoute("/v1/models", list_models),
            _GoogleRoute("/v1/models/{model}", get_model),
        ]

    def _verbs(self, models: str) -> list[Route]:
        return [
            Route(f"{models}/{{model}}:generateContent", _answered(self.generate), methods=["POST"]),
            Route(f"{models}/{{model}}:streamGenerateContent", self.stream, methods=["POST"]),
            Route(f"{models}/{{model}}:countTokens", _answered(self.count), methods=["POST"]),
            Route(f"{models}/{{model}}:{{verb}}", _answered(_unknown_verb), methods=["POST"]),
        ]

    # --- replies

    async def generate(self, http: HttpRequest) -> Response:
        """A whole reply."""
        _check_query(http, {"alt": ("json",)})
        model, asked = await self._asked(http)
        reply = await self._service.generate(model, await asked.request(self._access), http)
        return JSONResponse(Writer(asked, model).reply(reply))

    async def stream(self, http: HttpRequest) -> Response:
        """A reply in pieces: events with alt=sse, otherwise one JSON array, which an error is the only item of."""
        listed = http.query_params.get("alt") != "sse"
        try:
            _check_query(http, {"alt": ("json", "sse")})
            model, asked = await self._asked(http)
            chunks = await self._service.begin(model, await asked.request(self._access), http)
        except Failure as failure:
            body = error_json(failure)
            return JSONResponse([body] if listed else body, failure.status, _headers(failure))
        return PieceStream(chunks, Writer(asked, model).pieces, error_json, _ARRAY if listed else _EVENTS)

    async def count(self, http: HttpRequest) -> Response:
        """The tokens of a prompt."""
        _check_query(http, {"alt": ("json",)})
        model, asked = await self._asked(http, read_count)
        return JSONResponse(
            count_json(await self._service.count_tokens(model, await asked.request(self._access), http))
        )

    async def _asked(
        self, http: HttpRequest, read: Callable[[Fields, Manifest, Collection[str]], Asked] = read_request
    ) -> tuple[Model, Asked]:
        """The model of the path and what is asked of it."""
        name = http.path_params["model"]
        model = self._service.model(name)
        body = await read_object(http, self._settings)
        fields, names = Fields(body, both_cases=True), {name, model.name}
        return model, await asyncio.to_thread(read, fields, model.engine.manifest, names)  # a body may be long

    # --- models

    async def list_models(self, http: HttpRequest) -> Response:
        """The bundles that are served."""
        page, following = self._page(http)
        return JSONResponse({"models": [model_json(model) for model in page]} | following)

    async def get_model(self, http: HttpRequest) -> Response:
        _check_query(http, {"alt": ("json",)})
        return JSONResponse(model_json(self._service.model(http.path_params["model"])))

    async def list_published(self, http: HttpRequest) -> Response:
        """The same as Vertex AI writes it."""
        page, following = self._page(http)
        return JSONResponse({"publisherModels": [publisher_model_json(model) for model in page]} | following)

    async def get_published(self, http: HttpRequest) -> Response:
        _check_query(http, {"alt": ("json",)})
        return JSONResponse(publisher_model_json(self._service.model(http.path_params["model"])))

    def _page(self, http: HttpRequest) -> tuple[Sequence[Model], dict[str, str]]:
        """The page of models that the query asks for, and where the next begins."""
        _check_query(http, {"alt": ("json",), "pageSize": None, "pageToken": None})
        models = self._service.models
        size = _number(http, "pageSize", _PAGE) or _PAGE
        first = _number(http, "pageToken", 0)
        if first > len(models):
            raise Failure(400, f"pageToken is {first}, it must be a nextPageToken of this list", field="pageToken")
        end = first + min(size, _LARGEST_PAGE)
        return models[first:end], ({"nextPageToken": str(end)} if end < len(models) else {})


def _answered(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose errors are in Google's form, also at a path that another protocol owns."""

    @functools.wraps(endpoint)
    async def answer(http: HttpRequest) -> Response:
        try:
            return await endpoint(http)
        except Failure as failure:
            return write_failure(failure)

    return answer


async def _unknown_verb(http: HttpRequest) -> Response:
    verb = http.path_params["verb"]
    raise Failure(404, f"there is no method {verb[:40]!r}, only {', '.join(_VERBS)}", kind="not_found")


def _check_query(http: HttpRequest, known: dict[str, Collection[str] | None]) -> None:
    """Refuse parameters of the query that are not known, or given twice, by name; `key` is the caller's key."""
    known = {"prettyPrint": ("false",), **known}  # JavaScript clients send it; replies are in one line
    seen: set[str] = set()
    for name, value in http.query_params.multi_items():
        if name not in known and name != "key":
            raise Failure(400, f"the query parameter {name[:40]!r} is not known", field=name[:40])
        if name in seen:
            raise Failure(400, f"the query parameter {name} is given twice", field=name)
        seen.add(name)
        values = known.get(name)
        if values is not None and value not in values:
            raise Failure(400, f"{name} is {value[:40]!r}, expected one of {', '.join(values)}", field=name)


def _number(http: HttpRequest, name: str, default: int) -> int:
    """A count in the query."""
    text = http.query_params.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Failure(400, f"{name} is {text[:40]!r}, expected an integer between 0 and 999999999", field=name)
    return int(text)

"""The paths of NVIDIA's endpoint, and what goes in and out, in OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from .asked import MAX_TEXT, MAX_TOKENS, TEMPERATURE, TOP_P

__all__ = ["PATHS", "SCHEMAS"]

_Schema = dict[str, Any]

_TEXT: _Schema = {"type": "string"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/NIM{name}"}


def _fields(properties: dict[str, _Schema], *required: str) -> _Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


def _share(default: float) -> _Schema:
    return {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1, "default": default}


_BOUNDED: _Schema = {"type": "string", "maxLength": MAX_TEXT}
_PARTS = [
    _fields({"type": {"const": "text"}, "text": _BOUNDED}, "type", "text"),
    _fields({"type": {"const": "image_url"}, "image_url": _fields({"url": _BOUNDED}, "url")}, "type", "image_url"),
]
_MESSAGE = _fields(
    {
        "role": {"const": "user"},
        "content": {
            "description": 'Pictures may be written into texts: <img src="data:image/png;base64,..." />',
            "anyOf": [_TEXT, {"type": "array", "items": {"anyOf": _PARTS}}],
        },
    },
    "role",
    "content",
)
_REQUEST = _fields(
    {
        "messages": {"type": "array", "minItems": 1, "maxItems": 1, "items": _MESSAGE},
        "temperature": _share(TEMPERATURE),
        "top_p": _share(TOP_P),
        "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_TOKENS, "default": MAX_TOKENS},
        "stream": {"type": ["boolean", "null"], "default": False},
    },
    "messages",
)
_SAID = _fields({"role": {"const": "assistant"}, "content": _TEXT}, "role", "content")
_USAGE = _fields(
    dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
)


def _reply(said: str, ends: list[str | None], *required: str) -> _Schema:
    choice = _fields(
        {"index": {"const": 0}, said: _SAID, "finish_reason": {"enum": ends}}, "index", said, "finish_reason"
    )
    choices = {"type": "array", "items": choice, "minItems": 1, "maxItems": 1}
    return _fields(
        {"id": {"type": "string", "format": "uuid"}, "choices": choices, "usage": _USAGE}, "id", "choices", *required
    )


SCHEMAS: dict[str, _Schema] = {
    "NIMChatRequest": _REQUEST,
    "NIMChatCompletion": _reply("message", ["stop", "length"], "usage"),
    "NIMChatChunk": _reply("delta", ["stop", "length", None]),
    "NIMProblem": _fields(
        {"type": _TEXT, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT},
        "type",
        "title",
        "status",
        "detail",
    ),
    "NIMHealth": _fields({"object": {"const": "health.response"}, "message": _TEXT}, "object", "message"),
}

_EVENT: _Schema = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A NIMChatChunk, a NIMProblem, or [DONE]."}},
}
_EXAMPLE = {"messages": [{"role": "user", "content": "describe"}], "max_tokens": 4}
_ERRORS = {
    401: "A key is needed.",
    403: "The request names something that the server does not read, or the server by a wrong name.",
    404: "There is no such model.",
    408: "The body has not arrived in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "The body is wrong: the detail says where.",
    429: "Too many requests wait; Retry-After says when to come again.",
    500: "The server failed.",
    503: "The server is shutting down.",
}


def _json(schema: _Schema) -> _Schema:
    return {"application/json": {"schema": schema}}


def _errors(*statuses: int) -> _Schema:
    problem = {"application/problem+json": {"schema": _ref("Problem")}}
    return {str(status): {"description": _ERRORS[status], "content": problem} for status in statuses}


def _chat(operation: str, summary: str, *names: str) -> _Schema:
    parameters = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
    success = {
        "description": "A reply, or events.",
        "content": {**_json(_ref("ChatCompletion")), "text/event-stream": {"schema": _EVENT}},
    }
    post = {
        "operationId": operation,
        "tags": ["NIM"],
        "summary": summary,
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("ChatRequest"), "example": _EXAMPLE}},
        },
        "responses": {"200": success, **_errors(*_ERRORS)},
    }
    return {"post": post}


def _health(operation: str, summary: str) -> _Schema:
    return {
        "get": {
            "operationId": operation,
            "tags": ["NIM"],
            "summary": f"{summary} Needs no key.",
            "security": [],
            "responses": {"200": {"description": "It is.", "content": _json(_ref("Health"))}, **_errors(403)},
        }
    }


PATHS: dict[str, Any] = {
    "/v1/vlm/{publisher}/{model}": _chat(
        "nim_chat", "An answer of the bundle of this name, or of the only one.", "publisher", "model"
    ),
    "/v1/health/live": _health("nim_live", "Whether the server is there."),
    "/v1/health/ready": _health("nim_ready", "Whether models are loaded, which they are before it listens."),
}

"""The paths of OpenAI's API, and what goes in and out, in OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...calls import CHOICES
from ...decoding import MAX_CANDIDATES
from ...engine import DEFAULT_MAX_TOKENS
from ...logprobs import MAX_LOGPROBS
from ...sampling import REPETITION
from .config import EFFORTS, MAX_STOPS, MAX_TOOLS

__all__ = ["paths", "schemas"]

_Schema = dict[str, Any]

_TEXT: _Schema = {"type": "string"}
_FLAG: _Schema = {"type": "boolean"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_NULL: _Schema = {"type": "null"}
_OBJECT: _Schema = {"type": "object"}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/OpenAI{name}"}


def _list(items: _Schema, **limits: int) -> _Schema:
    return {"type": "array", "items": items, **limits}


def _fields(required: dict[str, _Schema], optional: dict[str, _Schema] | None = None) -> _Schema:
    """An object with these fields and no others; optional ones may be null."""
    nullable = {name: {"anyOf": [schema, _NULL]} for name, schema in (optional or {}).items()}
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **nullable},
        "additionalProperties": False,
    }


def _number(low: float, high: float) -> _Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _part(kind: str, required: dict[str, _Schema]) -> _Schema:
    return _fields({"type": {"const": kind}, **required})


_TEXT_PART = _part("text", {"text": _TEXT})
_PARTS: dict[str, _Schema] = {
    "text": _TEXT_PART,
    "image_url": _part(
        "image_url",
        {
            "image_url": _fields(
                {"url": {"type": "string", "description": "data:image/png;base64,... (others: --allow-host)"}},
                {
                    "detail": {
                        "enum": ["auto", "low", "high", "original"],
                        "description": "The budget of soft tokens: the bundle's default, its smallest, its largest.",
                    }
                },
            )
        },
    ),
    "input_audio": _part("input_audio", {"input_audio": _fields({"data": _TEXT, "format": {"enum": ["wav", "mp3"]}})}),
    "file": _part("file", {"file": _fields({"file_data": _TEXT}, {"filename": _TEXT})}),
}


def _message(role: str, *parts: _Schema) -> _Schema:
    return _fields({"role": {"const": role}, "content": {"anyOf": [_TEXT, _list({"anyOf": parts})]}})


_CALL = _fields(
    {"id": _TEXT, "type": {"const": "function"}, "function": _fields({"name": _TEXT, "arguments": _TEXT})},
    {"index": {"type": "integer"}},
)
_MESSAGES = [
    _message("system", _TEXT_PART),
    _message("developer", _TEXT_PART),
    _message("user", *_PARTS.values()),
    _fields(
        {"role": {"const": "assistant"}},
        {
            "content": {"anyOf": [_TEXT, _list({"anyOf": [_TEXT_PART, _part("refusal", {"refusal": _TEXT})]})]},
            "refusal": _TEXT,
            "reasoning_content": _TEXT,
            "tool_calls": _list(_CALL),
        },
    ),
    _fields(
        {
            "role": {"const": "tool"},
            "tool_call_id": _TEXT,
            "content": {"anyOf": [_TEXT, _list(_TEXT_PART)]},
        },
        {"name": _TEXT},
    ),
]
_TOOL = _fields(
    {
        "type": {"const": "function"},
        "function": _fields({"name": _TEXT}, {"description": _TEXT, "parameters": _OBJECT, "strict": _FLAG}),
    }
)
_CHOSEN = {"type": {"const": "function"}, "function": _fields({"name": _TEXT})}
_ALLOWED = _fields({"mode": {"enum": ["auto", "required"]}, "tools": _list(_fields(_CHOSEN), minItems=1)})
_CHOICES = [
    {"enum": list(CHOICES)},
    _fields(_CHOSEN),
    _fields({"type": {"const": "allowed_tools"}, "allowed_tools": _ALLOWED}),
]
_FORMATS = [
    _fields({"type": {"enum": ["text", "json_object"]}}),
    _fields(
        {
            "type": {"const": "json_schema"},
            "json_schema": _fields({"name": {"type": "string", "maxLength": 64}, "schema": _OBJECT}, {"strict": _FLAG}),
        }
    ),
]

_REQUEST = _fields(
    {"messages": _list({"anyOf": _MESSAGES}, minItems=1)},
    {
        "max_completion_tokens": {"type": "integer", "minimum": 1, "default": DEFAULT_MAX_TOKENS},
        "max_tokens": {"type": "integer", "minimum": 1, "description": "The same as max_completion_tokens."},
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "top_k": {"type": "integer", "minimum": -1, "maximum": 2**31 - 1, "description": "0 and -1 are all tokens."},
        "min_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(*REPETITION),
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
            "additionalProperties": _number(-100, 100),
        },
        "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
        "stop": {"anyOf": [_TEXT, _list(_TEXT, maxItems=MAX_STOPS)]},
        "n": {"type": "integer", "minimum": 1, "maximum": MAX_CANDIDATES},
        "logprobs": _FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS},
        "response_format": {"anyOf": _FORMATS},
        "tools": _list(_TOOL, maxItems=MAX_TOOLS),
        "tool_choice": {"anyOf": _CHOICES},
        "parallel_tool_calls": {"type": "boolean", "description": "false: the reply ends with the first call."},
        "reasoning_effort": {"enum": list(EFFORTS), "description": "none is off, everything else is on."},
        "stream": _FLAG,
        "stream_options": _fields({}, {"include_usage": _FLAG, "include_obfuscation": {"const": False}}),
        "user": {"type": "string", "description": "A label, as the three below; it changes nothing."},
        "safety_identifier": {"type": "string", "maxLength": 128},
        "prompt_cache_key": _TEXT,
        "metadata": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 512}},
        "store": {"const": False},
        "modalities": {"const": ["text"]},
        "service_tier": {"enum": ["auto", "default"]},
    },
)

_LOGPROB = {
    "type": "object",
    "required": ["token", "bytes", "logprob"],
    "properties": {
        "token": _TEXT,
        "bytes": _list({"type": "integer", "minimum": 0, "maximum": 255}),
        "logprob": {"type": "number", "maximum": 0},
    },
}
_LOGPROBS = {
    "anyOf": [
        _NULL,
        {
            "type": "object",
            "required": ["content"],
            "properties": {
                "content": _list(
                    {**_LOGPROB, "properties": {**_LOGPROB["properties"], "top_logprobs": _list(_ref("Logprob"))}}
                )
            },
        },
    ]
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": {"type": "object", "additionalProperties": _COUNT},
        "completion_tokens_details": {"type": "object", "additionalProperties": _COUNT},
    },
}
_SAID = {
    "role": {"const": "assistant"},
    "content": {"type": ["string", "null"]},
    "reasoning_content": _TEXT,
    "tool_calls": _list({"type": "object", "required": ["id", "type", "function"]}),
}
_ENDS = ["stop", "length", "tool_calls"]


def _completion(kind: str, said: str, message: _Schema, ends: list[str | None]) -> _Schema:
    choice = {
        "type": "object",
        "required": ["index", said, "finish_reason"],
        "properties": {"index": _COUNT, said: message, "finish_reason": {"enum": ends}, "logprobs": _LOGPROBS},
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices"],
        "properties": {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "system_fingerprint": _TEXT,
            "service_tier": {"const": "default"},
            "choices": _list(choice),
            "usage": {"anyOf": [_ref("Usage"), _NULL]},
        },
    }


_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "modalities": {**_list(_TEXT), "description": "What the bundle takes: text, image, video, audio."},
        "context_length": {**_COUNT, "description": "Tokens of prompt and reply together."},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_SCHEMAS: dict[str, _Schema] = {
    "OpenAIChatCompletion": _completion(
        "chat.completion", "message", {"type": "object", "required": ["role", "content"], "properties": _SAID}, [*_ENDS]
    ),
    "OpenAIChatChunk": _completion(
        "chat.completion.chunk", "delta", {"type": "object", "properties": _SAID}, [*_ENDS, None]
    ),
    "OpenAILogprob": _LOGPROB,
    "OpenAIUsage": _USAGE,
    "OpenAIModel": _MODEL,
    "OpenAIModels": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": _list(_ref("Model"))},
    },
    "OpenAIError": _ERROR,
}


def _json(schema: _Schema) -> _Schema:
    return {"application/json": {"schema": schema}}


def _responses(success: _Schema, *errors: int) -> _Schema:
    described = {
        400: "The request is wrong: the message says where.",
        401: "A key is needed.",
        403: "The request names something that the server does not read, or the server by a wrong name.",
        404: "There is no such model.",
        408: "The body has not arrived in time.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        429: "Too many requests wait; Retry-After says when to come again.",
        500: "The server failed.",
        503: "The server is shutting down.",
    }
    failures = {str(status): {"description": described[status], "content": _json(_ref("Error"))} for status in errors}
    return {"200": success, **failures}


_EVENT: _Schema = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "An OpenAIChatChunk, an OpenAIError, or [DONE]."}},
}
_ERRORS = (400, 401, 403, 404, 413, 415, 429, 500, 503)


def schemas(names: Sequence[str]) -> dict[str, _Schema]:
    """What the paths refer to; `names` are those of the models."""
    request = {
        **_REQUEST,
        "required": ["model", "messages"],
        "properties": {"model": {"enum": list(names)}, **_REQUEST["properties"]},
    }
    return {"OpenAIChatRequest": request, **_SCHEMAS}


def paths(names: Sequence[str]) -> dict[str, Any]:
    """The paths; `names` are those of the models."""
    listed = _get("openai_list_models", "The models that are served.", "Models", 401, 403)
    one = _get("openai_get_model", "One model.", "Model", 401, 403, 404)
    one["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"enum": list(names)}}]
    example = {"model": names[0], "messages": [{"role": "user", "content": "describe"}], "max_tokens": 4}
    asked = {"application/json": {"schema": _ref("ChatRequest"), "example": example}}
    answers = {**_json(_ref("ChatCompletion")), "text/event-stream": {"schema": _EVENT}}
    chat = {
        "operationId": "openai_chat_completions",
        "tags": ["OpenAI"],
        "summary": "An answer to a conversation, whole or as server-sent events that end with [DONE].",
        "requestBody": {"required": True, "content": asked},
        "responses": _responses({"description": "A completion, or events.", "content": answers}, *_ERRORS),
    }
    return {"/v1/models": {"get": listed}, "/v1/models/{model}": {"get": one}, "/v1/chat/completions": {"post": chat}}


def _get(operation: str, summary: str, schema: str, *errors: int) -> dict[str, Any]:
    return {
        "operationId": operation,
        "tags": ["OpenAI"],
        "summary": summary,
        "responses": _responses({"description": "It.", "content": _json(_ref(schema))}, *errors),
    }

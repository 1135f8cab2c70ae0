"""The paths in OpenAPI 3.1. Requests are described in camelCase; snake_case is read too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...logprobs import MAX_LOGPROBS
from ..service import DEFAULT_MODEL
from .config import MAX_CANDIDATES, MAX_PENALTY, MAX_STOPS, MAX_TEMPERATURE, MIME_TYPES, MODES, THINKING, THRESHOLDS
from .media import LEVELS, MAX_FPS, PART_LEVELS

__all__ = ["GEMINI", "PROJECTS", "PUBLISHED", "SCHEMAS", "paths"]

GEMINI = ("/v1beta/models", "/v1alpha/models", "/v1/models")
PUBLISHED = ("/v1beta1/publishers/google/models", "/v1/publishers/google/models")
PROJECTS = tuple(
    published.replace("/publishers", "/projects/{project}/locations/{location}/publishers") for published in PUBLISHED
)

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_OPEN: Schema = {"type": "object"}

_SECONDS: Schema = {**_TEXT, "pattern": r"^[0-9]{1,12}(\.[0-9]{1,9})?s$"}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/Gemini{name}"}


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _object(*required: str, **properties: Schema) -> Schema:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": list(required)} if required else {})


def _answer(*required: str, **properties: Schema) -> Schema:
    """What is written may have more some day."""
    return {"type": "object", "properties": properties, "required": list(required)}


def _between(low: float, high: float, kind: str = "number") -> Schema:
    return {"type": kind, "minimum": low, "maximum": high}


_SEEN: dict[str, Schema] = {
    "mediaResolution": _ref("PartMediaResolution"),
    "videoMetadata": _ref("VideoMetadata"),
}
_FIELDS: dict[str, Schema] = {
    "contents": _list(_ref("Content"), minItems=1),
    "systemInstruction": _ref("SystemInstruction"),
    "tools": _list(_ref("Tool")),
    "toolConfig": _ref("ToolConfig"),
    "safetySettings": _list(_ref("SafetySetting")),
    "generationConfig": _ref("GenerationConfig"),
    "model": {**_TEXT, "description": "The model of the path once more."},
    "labels": {**_OPEN, "description": "They change nothing."},
}

SCHEMAS: dict[str, Schema] = {
    "GeminiRequest": _object("contents", **_FIELDS),
    "GeminiCountRequest": {
        "oneOf": [
            _object("contents", **_FIELDS),
            _object("generateContentRequest", generateContentRequest=_ref("Request"), model=_FIELDS["model"]),
        ]
    },
    "GeminiContent": _object(
        "parts", role={"enum": ["user", "model", "function"]}, parts=_list(_ref("Part"), minItems=1)
    ),
    "GeminiSystemInstruction": _object(role=_TEXT, parts=_list(_object("text", text=_TEXT))),
    "GeminiPart": {
        "oneOf": [
            _object("text", text=_TEXT, thought=_FLAG),
            _object("inlineData", inlineData=_ref("Blob"), **_SEEN),
            _object("fileData", fileData=_ref("FileData"), **_SEEN),
            _object("functionCall", functionCall=_object("name", id=_TEXT, name=_TEXT, args=_OPEN)),
            _object(
                "functionResponse",
                functionResponse=_object("name", "response", id=_TEXT, name=_TEXT, response=_OPEN),
            ),
        ]
    },
    "GeminiBlob": _object(
        "mimeType", "data", mimeType=_TEXT, data={**_TEXT, "contentEncoding": "base64"}, displayName=_TEXT
    ),
    "GeminiFileData": _object("fileUri", mimeType=_TEXT, fileUri=_TEXT, displayName=_TEXT),
    "GeminiPartMediaResolution": {
        "oneOf": [_object("level", level={"enum": list(PART_LEVELS)}), _object("numTokens", numTokens=_COUNT)],
        "description": "numTokens is the token budget of one picture, one of those that the bundle has.",
    },
    "GeminiVideoMetadata": _object(
        startOffset=_SECONDS,
        endOffset=_SECONDS,
        fps={"type": "number", "exclusiveMinimum": 0, "maximum": MAX_FPS},
    ),
    "GeminiTool": _object(functionDeclarations=_list(_ref("FunctionDeclaration"))),
    "GeminiFunctionDeclaration": _object(
        "name",
        name=_TEXT,
        description=_TEXT,
        parameters=_ref("Schema"),
        parametersJsonSchema=_OPEN,
        response=_ref("Schema"),
        responseJsonSchema=_OPEN,
    ),
    "GeminiSchema": {**_OPEN, "description": "Google's form of schemas, types in capitals."},
    "GeminiToolConfig": _object(
        functionCallingConfig=_object(mode={"enum": list(MODES)}, allowedFunctionNames=_list(_TEXT))
    ),
    "GeminiSafetySetting": {
        **_object("category", "threshold", category=_TEXT, threshold={"enum": list(THRESHOLDS)}, method=_TEXT),
        "description": "There is no classifier: a threshold that would block has no effect, and the reply says so.",
    },
    "GeminiGenerationConfig": _object(
        temperature=_between(0, MAX_TEMPERATURE),
        topP=_between(0, 1),
        topK={"type": "integer", "minimum": 1},
        candidateCount=_between(1, MAX_CANDIDATES, "integer"),
        maxOutputTokens={"type": "integer", "minimum": 1},
        stopSequences=_list({**_TEXT, "minLength": 1}, maxItems=MAX_STOPS),
        presencePenalty=_between(-MAX_PENALTY, MAX_PENALTY),
        frequencyPenalty=_between(-MAX_PENALTY, MAX_PENALTY),
        seed={"type": "integer"},
        responseMimeType={"enum": list(MIME_TYPES)},
        responseSchema=_ref("Schema"),
        responseJsonSchema=_OPEN,
        responseModalities=_list({"const": "TEXT"}),
        responseLogprobs=_FLAG,
        logprobs=_between(0, MAX_LOGPROBS, "integer"),
        mediaResolution={"enum": list(LEVELS)},
        thinkingConfig=_object(
            includeThoughts=_FLAG, thinkingBudget={"enum": [0, -1]}, thinkingLevel={"enum": list(THINKING)}
        ),
    ),
    "GeminiReply": _answer(
        "candidates",
        "modelVersion",
        "responseId",
        "createTime",
        candidates=_list(_ref("Candidate")),
        promptFeedback=_answer(blockReasonMessage=_TEXT),
        usageMetadata=_ref("Usage"),
        modelVersion=_TEXT,
        responseId=_TEXT,
        createTime=_TEXT,
    ),
    "GeminiCandidate": _answer(
        "content",
        "index",
        content=_answer("role", "parts", role={"const": "model"}, parts=_list(_OPEN, minItems=1)),
        index=_COUNT,
        finishReason={"enum": ["STOP", "MAX_TOKENS", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL"]},
        finishMessage=_TEXT,
        tokenCount=_COUNT,
        avgLogprobs=_NUMBER,
        logprobsResult=_answer(
            "chosenCandidates",
            "logProbabilitySum",
            chosenCandidates=_list(_ref("Token")),
            topCandidates=_list(_answer("candidates", candidates=_list(_ref("Token")))),
            logProbabilitySum=_NUMBER,
        ),
    ),
    "GeminiToken": _answer(
        "token", "tokenId", "logProbability", token=_TEXT, tokenId=_COUNT, logProbability=_NUMBER
    ),
    "GeminiUsage": _answer(
        "promptTokenCount",
        "candidatesTokenCount",
        "totalTokenCount",
        promptTokenCount=_COUNT,
        candidatesTokenCount=_COUNT,
        thoughtsTokenCount=_COUNT,
        cachedContentTokenCount=_COUNT,
        totalTokenCount=_COUNT,
        promptTokensDetails=_list(_ref("Modality")),
        candidatesTokensDetails=_list(_ref("Modality")),
    ),
    "GeminiModality": _answer(
        "modality",
        "tokenCount",
        modality={"enum": ["TEXT", "IMAGE", "VIDEO", "AUDIO", "DOCUMENT"]},
        tokenCount=_COUNT,
    ),
    "GeminiCount": _answer(
        "totalTokens", totalTokens=_COUNT, promptTokensDetails=_list(_ref("Modality"))
    ),
    "GeminiModel": _answer(
        "name",
        name=_TEXT,
        version=_TEXT,
        displayName=_TEXT,
        description=_TEXT,
        inputTokenLimit=_COUNT,
        outputTokenLimit=_COUNT,
        supportedGenerationMethods=_list(_TEXT),
    ),
    "GeminiModels": _answer("models", models=_list(_ref("Model")), nextPageToken=_TEXT),
    "GeminiPublisherModel": _answer("name", name=_TEXT, versionId=_TEXT, displayName=_TEXT, description=_TEXT),
    "GeminiPublisherModels": _answer(
        "publisherModels", publisherModels=_list(_ref("PublisherModel")), nextPageToken=_TEXT
    ),
    "GeminiError": _answer(
        "error", error=_answer("code", "message", "status", code=_COUNT, message=_TEXT, status=_TEXT)
    ),
}  # fmt: skip

_EVENT: Schema = {
    **_answer("data", data={**_TEXT, "contentMediaType": "application/json"}),
    "description": "One event: data is a piece of the reply.",
}
_EXAMPLE: Schema = {
    "contents": [{"role": "user", "parts": [{"text": "describe"}]}],
    "generationConfig": {"maxOutputTokens": 4},
}
_ERRORS = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503")


def paths(names: Sequence[str]) -> dict[str, Any]:
    """The path items, for models of these names."""
    found = _listing(GEMINI[0], "geminiBeta", "Models", names) | _listing(GEMINI[1], "geminiAlpha", "Models", names)
    for place, name in (
        *zip(GEMINI, ("geminiBeta", "geminiAlpha", "gemini"), strict=True),
        *zip(PUBLISHED, ("vertexBeta", "vertex"), strict=True),
        *zip(PROJECTS, ("vertexBetaProject", "vertexProject"), strict=True),
    ):
        found |= _verbs(place, name, names)
        if place in PUBLISHED:
            found |= _listing(place, name, "PublisherModels", names)
    return found


def _verbs(models: str, name: str, names: Sequence[str]) -> dict[str, Any]:
    parameters = [_in_path("model", enum=[*dict.fromkeys([*names, DEFAULT_MODEL])])]
    if "{project}" in models:
        parameters += [_in_path("project"), _in_path("location")]
    path = f"{models}/{{model}}"
    stream = _posted(f"{name}Stream", "A reply in pieces.", _ref("Request"), {
        "application/json": {"schema": _list(_ref("Reply"))}, "text/event-stream": {"schema": _EVENT},
    })  # fmt: skip
    stream["parameters"] = [_in_query("alt", {"enum": ["json", "sse"]}, "sse for events, otherwise one JSON array.")]
    # Before a stream has begun, its error is the one item of the array.
    failed = {"application/json": {"schema": {"oneOf": [_ref("Error"), _list(_ref("Error"))]}}}
    stream["responses"] |= {status: {"description": "An error.", "content": failed} for status in _ERRORS}
    return {
        f"{path}:generateContent": {
            "parameters": parameters,
            "post": _posted(f"{name}Generate", "A whole reply.", _ref("Request"), _json(_ref("Reply"))),
        },
        f"{path}:streamGenerateContent": {"parameters": parameters, "post": stream},
        f"{path}:countTokens": {
            "parameters": parameters,
            "post": _posted(f"{name}Count", "The tokens of a prompt.", _ref("CountRequest"), _json(_ref("Count"))),
        },
    }


def _listing(path: str, name: str, listed: str, names: Sequence[str]) -> dict[str, Any]:
    pages = [
        _in_query("pageSize", _between(0, 999_999_999, "integer"), "Models of one page."),
        _in_query("pageToken", _TEXT, "nextPageToken of the page before."),
    ]
    return {
        path: {
            "get": {"operationId": f"{name}List", "summary": "The bundles that are served.", "parameters": pages}
            | _responses(_json(_ref(listed)))
        },
        f"{path}/{{model}}": {
            "parameters": [_in_path("model", enum=[*dict.fromkeys([*names, DEFAULT_MODEL])])],
            "get": {"operationId": f"{name}Get", "summary": "One of them."}
            | _responses(_json(_ref(listed.removesuffix("s")))),
        },
    }


def _posted(name: str, summary: str, body: Schema, answer: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": body, "example": _EXAMPLE}}
    request = {"required": True, "content": content}
    return {"operationId": name, "summary": summary, "requestBody": request} | _responses(answer)


def _responses(answer: dict[str, Any]) -> dict[str, Any]:
    failed = {"description": "An error.", "content": _json(_ref("Error"))}
    return {"responses": {"200": {"description": "Done.", "content": answer}} | dict.fromkeys(_ERRORS, failed)}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _in_path(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {**_TEXT, **more}}


def _in_query(name: str, schema: Schema, description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}

"""Replies, pieces of replies and errors as Google writes them."""

from __future__ import annotations

import datetime
import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...engine import Engine
from ...logprobs import Logprob
from ...reply import Candidate, Chunk, Reply, Usage
from ...tools import ToolCall
from ..failures import Failure
from ..service import Model
from .config import MAX_TEMPERATURE, Asked

__all__ = ["Writer", "count_json", "error_json", "model_json", "publisher_model_json"]

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_FINISH = {"stop_id": "STOP", "stop_text": "STOP", "length": "MAX_TOKENS", "context": "MAX_TOKENS"}
_LEAST = -9999.0  # of a token that the model rules out: JSON has no infinity


class Writer:
    """Writes the reply to one request, whole or in pieces."""

    def __init__(self, asked: Asked, model: Model):
        now = datetime.datetime.now(datetime.UTC)
        self._asked = asked
        self._context = model.engine.manifest.context
        self._id = secrets.token_urlsafe(16)
        self._calls = itertools.count()
        self._begun = False
        self._frame = {
            "modelVersion": model.name,
            "responseId": self._id,
            "createTime": now.isoformat().replace("+00:00", "Z"),
        }

    def reply(self, reply: Reply) -> dict[str, Any]:
        """A whole reply."""
        candidates = [self._whole(index, candidate) for index, candidate in enumerate(reply.candidates)]
        return self._response(candidates) | {"usageMetadata": usage_json(reply.usage)}

    def pieces(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """The piece of a stream, none for a chunk with nothing in it that was asked for.

        The last one says of all candidates how they ended.
        """
        parts = self._parts(chunk.text, chunk.thought, chunk.tool_calls)
        scores = logprobs_json(chunk.logprobs) if chunk.logprobs else {}
        if chunk.reply is None:
            if parts or scores:
                yield self._response([_candidate(chunk.candidate, parts) | scores])
            return
        ended = [
            _candidate(index, parts if index == chunk.candidate else []) | self._end(candidate)
            for index, candidate in enumerate(chunk.reply.candidates)
        ]
        ended[chunk.candidate] |= scores
        yield self._response(ended) | {"usageMetadata": usage_json(chunk.reply.usage)}

    def _response(self, candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
        note = {}
        if self._asked.unenforced and not self._begun:
            note = {"promptFeedback": {"blockReasonMessage": self._asked.unenforced}}
        self._begun = True
        return {"candidates": list(candidates)} | note | self._frame

    def _whole(self, index: int, candidate: Candidate) -> dict[str, Any]:
        written = _candidate(index, self._parts(candidate.text, candidate.thought, candidate.tool_calls))
        scores = logprobs_json(candidate.logprobs) if candidate.logprobs is not None else {}
        return written | self._end(candidate) | scores

    def _parts(self, text: str, thought: str, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        if thought and self._asked.thoughts:
            parts.append({"text": thought, "thought": True})
        if text:
            parts.append({"text": text})
        return parts + [{"functionCall": self._call(call)} for call in calls]

    def _call(self, call: ToolCall) -> dict[str, Any]:
        # Results are told apart by the id if one function is called several times.
        return {"id": f"{self._id}-{next(self._calls)}", "name": call.name, "args": dict(call.arguments)}

    def _end(self, candidate: Candidate) -> dict[str, Any]:
        """Why a candidate ended, and how long it is."""
        end: dict[str, Any] = {"finishReason": _FINISH[candidate.finish_reason], "tokenCount": len(candidate.token_ids)}
        undeclared = next((call.name for call in candidate.tool_calls if call.name not in self._asked.functions), None)
        if candidate.finish_reason == "context":
            end["finishMessage"] = f"the context of {self._context} tokens is full"
        elif candidate.finish_reason != "length" and candidate.malformed_calls:
            end["finishReason"] = "MALFORMED_FUNCTION_CALL"
            end["finishMessage"] = f"a call cannot be read: {candidate.malformed_calls[0].reason}"
        elif candidate.finish_reason != "length" and undeclared is not None:
            end["finishReason"] = "UNEXPECTED_TOOL_CALL"
            end["finishMessage"] = f"the function {undeclared!r} is not declared"
        if candidate.logprobs:
            end["avgLogprobs"] = _sum(candidate.logprobs) / len(candidate.logprobs)
        return end


def _candidate(index: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
    # Google's client takes a chat with content without parts for broken, and forgets its turn.
    return {"content": {"role": "model", "parts": parts or [{"text": ""}]}, "index": index}


def logprobs_json(logprobs: Sequence[Logprob]) -> dict[str, Any]:
    """The field of a candidate about its tokens."""
    result: dict[str, Any] = {
        "logProbabilitySum": _sum(logprobs),
        "chosenCandidates": [_token_json(chosen) for chosen in logprobs],
    }
    if any(chosen.top for chosen in logprobs):
        result["topCandidates"] = [{"candidates": [_token_json(top) for top in chosen.top]} for chosen in logprobs]
    return {"logprobsResult": result}


def _token_json(entry: Logprob) -> dict[str, Any]:
    return {"token": entry.text, "tokenId": entry.id, "logProbability": max(entry.logprob, _LEAST)}


def _sum(logprobs: Sequence[Logprob]) -> float:
    return sum(max(chosen.logprob, _LEAST) for chosen in logprobs)


def usage_json(usage: Usage) -> dict[str, Any]:
    """usageMetadata. Google counts thoughts apart from the candidates."""
    candidates = usage.completion_tokens - usage.thought_tokens
    written: dict[str, Any] = {
        "promptTokenCount": usage.prompt_tokens,
        "candidatesTokenCount": candidates,
        "totalTokenCount": usage.prompt_tokens + usage.completion_tokens,
        "promptTokensDetails": _details(usage.by_modality),
        "candidatesTokensDetails": _details({"text": candidates}),
    }
    if usage.thought_tokens:
        written["thoughtsTokenCount"] = usage.thought_tokens
    if usage.cached_tokens:
        written["cachedContentTokenCount"] = usage.cached_tokens
    return written


def count_json(counts: Mapping[str, int]) -> dict[str, Any]:
    """The answer of countTokens."""
    details = _details({name: count for name, count in counts.items() if name != "total"})
    return {"totalTokens": counts["total"], "promptTokensDetails": details}


def _details(by_modality: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"modality": name.upper(), "tokenCount": count} for name, count in by_modality.items() if count]


def model_json(model: Model) -> dict[str, Any]:
    """A model as the Gemini API lists it."""
    manifest = model.engine.manifest
    sampling = manifest.sampling
    written: dict[str, Any] = {
        "name": f"models/{model.name}",
        "version": manifest.revision or "1",
        "displayName": model.name,
        "description": _description(model.engine),
        "inputTokenLimit": manifest.context,
        "outputTokenLimit": manifest.context,
        "supportedGenerationMethods": ["generateContent", "streamGenerateContent", "countTokens"],
        "temperature": sampling.temperature,
        "maxTemperature": MAX_TEMPERATURE,
    }
    optional = {"topP": sampling.top_p, "topK": sampling.top_k}
    return written | {name: value for name, value in optional.items() if value is not None}


def publisher_model_json(model: Model) -> dict[str, Any]:
    """A model as Vertex AI lists it."""
    manifest = model.engine.manifest
    return {
        "name": f"publishers/google/models/{model.name}",
        "versionId": manifest.revision or "1",
        "displayName": model.name,
        "description": _description(model.engine),
    }


def _description(engine: Engine) -> str:
    manifest = engine.manifest
    return f"{manifest.family}, {manifest.precision}; takes {', '.join(manifest.modalities)}"


def error_json(failure: Failure) -> dict[str, Any]:
    """The body of an error, of the types in google.rpc that Google's clients know."""
    details: list[dict[str, Any]] = []
    if failure.field is not None:
        violation = {"field": failure.field, "description": failure.message}
        details.append({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [violation]})
    if failure.retry_after is not None:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{failure.retry_after}s"})
    error: dict[str, Any] = {"code": failure.status, "message": failure.message, "status": _status(failure.status)}
    return {"error": error | ({"details": details} if details else {})}


def _status(status: int) -> str:
    return _STATUS.get(status, "INVALID_ARGUMENT" if status < 500 else "INTERNAL")

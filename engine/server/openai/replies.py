"""Replies, pieces of replies and errors as OpenAI writes them."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from ...logprobs import Logprob
from ...reply import Candidate, Chunk, Reply, Usage
from ...tools import ToolCall
from ..failures import Failure
from ..service import Model
from .config import Asked

__all__ = ["Answer", "error_of", "fingerprint", "model_card"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_CODES = {
    "context": "context_length_exceeded",
    "unauthorized": "invalid_api_key",
    "busy": "rate_limit_exceeded",
    "method": "method_not_allowed",
    "too_large": "request_too_large",
}


class Answer:
    """One completion, as a whole or piece by piece; both have one id and one time."""

    def __init__(self, asked: Asked):
        self._asked = asked
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._fingerprint = fingerprint(asked.model)
        self._calls: dict[int, int] = {}  # how many each candidate has given out; those that have begun are in it

    def completion(self, reply: Reply) -> dict[str, Any]:
        """A whole reply."""
        choices = [self._choice(index, candidate) for index, candidate in enumerate(reply.candidates)]
        return self._envelope("chat.completion", choices) | {"usage": _usage(reply.usage)}

    def events(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """What is sent of a piece: first the role, then what has become certain, at last why each candidate ends.

        Only the whole reply says why candidates end, so that all of them end together.
        """
        index = chunk.candidate
        if index not in self._calls:
            self._calls[index] = 0
            yield self._event(index, {"role": "assistant", "content": ""})
        yield from self._pieces(index, chunk)
        if chunk.reply is None:
            return
        for index, candidate in enumerate(chunk.reply.candidates):
            yield self._event(index, {}, self._finish_reason(candidate))
        if self._asked.include_usage:
            yield self._envelope("chat.completion.chunk", []) | {"usage": _usage(chunk.reply.usage)}

    def _pieces(self, index: int, chunk: Chunk) -> Iterator[dict[str, Any]]:
        delta: dict[str, Any] = {}
        if chunk.thought:
            delta["reasoning_content"] = chunk.thought
        if chunk.text:
            delta["content"] = chunk.text
        if chunk.tool_calls:
            numbered = enumerate(chunk.tool_calls, self._calls[index])
            delta["tool_calls"] = [{"index": number, **_call(call)} for number, call in numbered]
            self._calls[index] += len(chunk.tool_calls)
        if delta or chunk.logprobs:
            yield self._event(index, delta or {"content": ""}, logprobs=chunk.logprobs)

    def _choice(self, index: int, candidate: Candidate) -> dict[str, Any]:
        calls = candidate.tool_calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": candidate.text if candidate.text or not calls else None,
            "refusal": None,
        }
        if candidate.thought:
            message["reasoning_content"] = candidate.thought
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return {
            "index": index,
            "message": message,
            "finish_reason": self._finish_reason(candidate),
            "logprobs": None if candidate.logprobs is None else _logprobs(candidate.logprobs),
        }

    def _event(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Sequence[Logprob] = ()
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "logprobs": _logprobs(logprobs) if logprobs else None,
        }
        event = self._envelope("chat.completion.chunk", [choice])
        return event | {"usage": None} if self._asked.include_usage else event

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        envelope = {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model.name,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }
        return envelope | {"service_tier": "default"} if self._asked.tier else envelope

    def _finish_reason(self, candidate: Candidate) -> str:
        if candidate.finish_reason in ("length", "context"):
            return "length"
        return "tool_calls" if candidate.tool_calls else "stop"


def model_card(model: Model) -> dict[str, Any]:
    """A model in a list of models, and what its bundle says about it."""
    manifest = model.engine.manifest
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "siglance",
        "modalities": list(manifest.modalities),
        "context_length": manifest.context,
    }


def fingerprint(model: Model) -> str:
    """Changes when the bundle does, or the device: with one and the same seed it promises one and the same reply."""
    engine = model.engine
    files = engine.manifest.files
    facts = ",".join([*(files[name].sha256 for name in sorted(files)), str(engine.runtime.device)])
    return f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def error_of(failure: Failure) -> dict[str, Any]:
    """A failure in OpenAI's shape."""
    kind = "server_error" if failure.status >= 500 else _TYPES.get(failure.status, "invalid_request_error")
    code = _CODES.get(failure.kind)
    if failure.kind == "not_found":
        code = "model_not_found" if failure.field == "model" else "not_found"
    return {"error": {"message": failure.message, "type": kind, "param": failure.field, "code": code}}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    """Pictures, pages and frames are all images here."""
    by = usage.by_modality
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "text_tokens": by.get("text", 0),
            "image_tokens": by.get("image", 0) + by.get("document", 0) + by.get("video", 0),
            "audio_tokens": by.get("audio", 0),
        },
        "completion_tokens_details": {"reasoning_tokens": usage.thought_tokens},
    }


def _logprobs(logprobs: Sequence[Logprob]) -> dict[str, Any]:
    content = [_logprob(one) | {"top_logprobs": [_logprob(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def _logprob(one: Logprob) -> dict[str, Any]:
    return {"token": one.text, "bytes": list(one.bytes), "logprob": one.logprob}

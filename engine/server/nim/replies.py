"""Replies, pieces of replies and errors as NVIDIA writes them."""

from __future__ import annotations

import http
import uuid
from collections.abc import Iterator
from typing import Any

from ...reply import Candidate, Chunk, Usage
from ..failures import Failure

__all__ = ["Answer", "problem_of", "status_of"]


class Answer:
    """One reply, as a whole or piece by piece; both have one id."""

    def __init__(self):
        self._id = str(uuid.uuid4())

    def whole(self, candidate: Candidate, usage: Usage) -> dict[str, Any]:
        """A whole reply."""
        message = {"role": "assistant", "content": candidate.text}
        return self._envelope({"message": message, "finish_reason": _finish_reason(candidate)}) | _usage(usage)

    def events(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """What is sent of a piece: its text; behind the last one, why the reply ends and what it took."""
        if chunk.text:
            delta = {"role": "assistant", "content": chunk.text}
            yield self._envelope({"delta": delta, "finish_reason": None})
        if chunk.reply is not None:
            [candidate] = chunk.reply.candidates
            end = {"delta": {"role": "assistant", "content": ""}, "finish_reason": _finish_reason(candidate)}
            yield self._envelope(end) | _usage(chunk.reply.usage)

    def _envelope(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"id": self._id, "choices": [{"index": 0, **choice}]}


def status_of(failure: Failure) -> int:
    """NVIDIA answers a body that does not follow its schema with 422."""
    return 422 if failure.status == 400 else failure.status


def problem_of(failure: Failure) -> dict[str, Any]:
    """A failure as problem details (RFC 9457), whose `detail` NVIDIA's clients print."""
    status = status_of(failure)
    try:
        title = http.HTTPStatus(status).phrase
    except ValueError:
        title = "Error"
    return {"type": "about:blank", "title": title, "status": status, "detail": failure.message}


def _finish_reason(candidate: Candidate) -> str:
    return "length" if candidate.finish_reason in ("length", "context") else "stop"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
    }

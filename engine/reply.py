"""What the engine gives back: encoded images, pieces of a stream, whole replies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from .boxes import Box
from .sampling import Effective

__all__ = ["Chunk", "EncodedImage", "Reply", "StageClock", "Timings", "Usage"]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """An image that has been through the vision tower; pass it instead of the image to ask again for free.

    `soft_tokens` is float32 [n, D]; `size` is (height, width) of the upright image in pixels, or of the page in points;
    `bundle` is the weights' SHA-256 of the bundle that made it, because soft tokens of one model mean nothing to
    another; `modality` is "image" or "document".
    """

    soft_tokens: np.ndarray
    size: tuple[int, int]
    bundle: str
    modality: str = "image"

    def __len__(self) -> int:
        """Number of soft tokens."""
        return len(self.soft_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts. The stop token that ends a reply is not part of it and not counted.

    `by_modality` splits the prompt: "image" counts the soft tokens of pictures, "document" those of pages of documents
    (absent if there are none), "text" everything else.
    """

    prompt_tokens: int
    completion_tokens: int
    by_modality: dict[str, int]
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds of wall time by stage.

    decode_file: reading images to upright RGB; resize: resizing and cutting into patches; vision: the vision graph;
    prefill: embedding and decoder over the prompt; first_token: from the start of the request to the first token;
    per_token: mean time between tokens after the first, 0 for a reply of one; total: the whole request.
    """

    decode_file: float
    resize: float
    vision: float
    prefill: float
    first_token: float
    per_token: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply.

    finish_reason: "stop_id" (the model ended its turn), "stop_text" (a stop string), "length" (`max_tokens`) or
    "context" (no room left). `boxes` are in pixels of the upright images. `truncated` says that a list of boxes was
    cut off. `sampling` holds the values that were really used, seed included. `providers` are onnxruntime's, by graph.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    boxes: tuple[Box, ...]
    truncated: bool
    sampling: Effective
    device: str
    providers: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream: text that has become certain, and the ids drawn since the piece before.

    The last one carries the whole `reply`; the pieces joined are its text and its ids.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    reply: Reply | None = None


@dataclass(slots=True)
class StageClock:
    """Adds up wall time by stage."""

    started: float = field(default_factory=perf_counter)
    first_token: float | None = None
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + perf_counter() - begin

    def token(self) -> None:
        """A token has been drawn."""
        if self.first_token is None:
            self.first_token = perf_counter()

    def timings(self, tokens: int) -> Timings:
        """The report, for a reply of which `tokens` tokens were drawn (the stop token too)."""
        now = perf_counter()
        first = self.first_token or now
        milliseconds = {
            name: 1e3 * self.stages.get(name, 0.0) for name in ("decode_file", "resize", "vision", "prefill")
        }
        return Timings(
            **milliseconds,
            first_token=1e3 * (first - self.started),
            per_token=1e3 * (now - first) / (tokens - 1) if tokens > 1 else 0.0,
            total=1e3 * (now - self.started),
        )

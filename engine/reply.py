"""What the engine gives back: encoded images, pieces of a stream, whole replies."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import ParamSpec

import numpy as np

from .boxes import Box
from .errors import Cancelled
from .logprobs import Logprob
from .sampling import Effective
from .tools import MalformedCall, ToolCall

__all__ = [
    "Candidate",
    "Chunk",
    "EncodedImage",
    "EncodedSound",
    "EncodedVideo",
    "Reply",
    "StageClock",
    "Timings",
    "Usage",
    "whole_reply",
]

_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """An image that has been through the vision tower; pass it in place of the image to ask again at no cost.

    Attributes:
        soft_tokens: float32 [n, D]. Read-only, because caches hold the same array.
        size: (height, width) of the upright image in pixels, or of the page in points.
        bundle: SHA-256 of the graphs and weights that made it: soft tokens of one model mean nothing to another.
        modality: "image" or "document".
        content: the key of the patches that the vision tower was given.
    """

    soft_tokens: np.ndarray = field(repr=False)
    size: tuple[int, int]
    bundle: str = field(repr=False)
    modality: str = "image"
    content: bytes = field(default=b"", repr=False)

    def __len__(self) -> int:
        """Number of soft tokens."""
        return len(self.soft_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedVideo:
    """The chosen frames of a video, each encoded, and their times in seconds: what a chat remembers of a video."""

    frames: tuple[EncodedImage, ...] = field(repr=False)
    times: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return self.frames[0].size

    @property
    def bundle(self) -> str:
        return self.frames[0].bundle

    @property
    def modality(self) -> str:
        return "video"


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSound:
    """A clip that has been through the audio graph; see `EncodedImage`. `seconds` is its length."""

    soft_tokens: np.ndarray = field(repr=False)
    seconds: float
    bundle: str = field(repr=False)
    content: bytes = field(default=b"", repr=False)

    def __len__(self) -> int:
        """Number of soft tokens."""
        return len(self.soft_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts. The stop token that ends a reply is not part of it and not counted.

    Attributes:
        prompt_tokens: of the prompt, soft tokens included.
        completion_tokens: of all candidates together.
        by_modality: splits `prompt_tokens`: "image" counts the soft tokens of pictures, "document", "video" and "audio"
            those of pages, frames and sounds (absent if there are none), "text" everything else.
        cached_tokens: of the prompt, those whose state an earlier request had left.
        forced_tokens: of the completion, those that were not sampled because the grammar left no choice.
        thought_tokens: of the completion, those of thoughts, with their markers.
    """

    prompt_tokens: int
    completion_tokens: int
    by_modality: dict[str, int]
    cached_tokens: int = 0
    forced_tokens: int = 0
    thought_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds of wall time by stage.

    Attributes:
        decode_file: reading images to upright RGB, sounds to samples.
        resize: resizing images and cutting them into patches.
        vision, audio: the vision and audio graphs.
        prefill: the embed and decoder graphs over the prompt.
        first_token: from the start of the request to the first token.
        per_token: mean time between tokens after the first, 0 for a reply of one token.
        total: the whole request.
    """

    decode_file: float
    resize: float
    vision: float
    audio: float
    prefill: float
    first_token: float
    per_token: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of the replies to a prompt.

    Attributes:
        text: the answer alone, without thoughts and calls.
        token_ids: all ids of the reply, those of thoughts and calls included, without the stop token.
        finish_reason: "stop_id" (the model ended its turn or waits for results, or the grammar lets nothing follow),
            "stop_text" (a stop string), "length" (`max_tokens`) or "context" (no room left).
        boxes: in pixels of the upright images.
        truncated: whether a list of boxes was cut off, the text ends before its grammar does, or the reply ends inside
            a thought or a call.
        logprobs: one for each of `token_ids`, None unless asked for.
        forced_tokens: how many were not sampled because the grammar left no choice.
        seed: gives this candidate again, as a single reply.
        thought: what the model thought.
        thought_finished: False where the reply ends inside a thought, so that the answer is missing.
        thought_tokens: tokens of thoughts, with their markers.
        tool_calls: in their order.
        malformed_calls: calls that could not be parsed; the text of each is also part of `text`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    boxes: tuple[Box, ...]
    truncated: bool
    logprobs: tuple[Logprob, ...] | None
    forced_tokens: int
    seed: int
    thought: str = ""
    thought_finished: bool = True
    thought_tokens: int = 0
    tool_calls: tuple[ToolCall, ...] = ()
    malformed_calls: tuple[MalformedCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole reply: one or several candidates. Most fields of the first can be read from the reply itself.

    Attributes:
        candidates: at least one.
        prompt_token_ids: the prompt as it ran.
        usage, timings: what it took.
        sampling: the values that were really used, with the seed of the first candidate.
        device: "cpu" or "cuda:N".
        providers: onnxruntime's execution providers, by graph.
    """

    candidates: tuple[Candidate, ...]
    prompt_token_ids: tuple[int, ...]
    usage: Usage
    timings: Timings
    sampling: Effective
    device: str
    providers: dict[str, list[str]]

    @property
    def text(self) -> str:
        return self.candidates[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.candidates[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.candidates[0].finish_reason

    @property
    def boxes(self) -> tuple[Box, ...]:
        return self.candidates[0].boxes

    @property
    def truncated(self) -> bool:
        return self.candidates[0].truncated

    @property
    def logprobs(self) -> tuple[Logprob, ...] | None:
        return self.candidates[0].logprobs

    @property
    def thought(self) -> str:
        return self.candidates[0].thought

    @property
    def thought_finished(self) -> bool:
        return self.candidates[0].thought_finished

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self.candidates[0].tool_calls

    @property
    def malformed_calls(self) -> tuple[MalformedCall, ...]:
        return self.candidates[0].malformed_calls


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream: the text that has become certain, and the ids since the piece before.

    Candidates follow one another; `candidate` is the index. The pieces of one, joined, are its text, thought, calls,
    ids and `logprobs` (empty unless asked for). The very last piece carries the whole `reply`.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    reply: Reply | None = None
    candidate: int = 0
    logprobs: tuple[Logprob, ...] = ()
    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def whole_reply(
    stream: Callable[_Arguments, Generator[Chunk, None, None]], name: str = "generate"
) -> Callable[_Arguments, Reply]:
    """The function `name` that takes what `stream` takes and returns the reply that its last chunk carries."""

    @functools.wraps(stream)
    def generate(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> Reply:
        reply = None
        for chunk in stream(*arguments, **options):
            reply = chunk.reply
        assert reply is not None
        return reply

    generate.__name__, generate.__qualname__ = name, stream.__qualname__.replace(stream.__name__, name)
    generate.__doc__ = f"Like `{stream.__name__}`, which has the arguments, but return the whole reply."
    generate.__annotations__ = stream.__annotations__ | {"return": "Reply"}
    signature = inspect.signature(stream).replace(return_annotation="Reply")  # what `help` shows
    generate.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return generate


@dataclass(slots=True)
class StageClock:
    """Adds up wall time by stage. No stage begins, and no step of the model, once the request is `cancelled`."""

    started: float = field(default_factory=perf_counter)
    first_token: float | None = None
    tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    cancelled: Callable[[], bool] | None = None

    def check(self) -> None:
        """Raise Cancelled if the request is."""
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("the request has been cancelled")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.check()
        begin = perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + perf_counter() - begin

    def token(self) -> None:
        """A token has been drawn or forced, of the reply or the stop token behind it."""
        self.tokens += 1
        if self.first_token is None:
            self.first_token = perf_counter()

    def timings(self) -> Timings:
        """The report."""
        now = perf_counter()
        first = self.first_token or now
        milliseconds = {
            name: 1e3 * self.stages.get(name, 0.0) for name in ("decode_file", "resize", "vision", "audio", "prefill")
        }
        return Timings(
            **milliseconds,
            first_token=1e3 * (first - self.started),
            per_token=1e3 * (now - first) / (self.tokens - 1) if self.tokens > 1 else 0.0,
            total=1e3 * (now - self.started),
        )

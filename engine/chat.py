"""A conversation that remembers its turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

from .calls import ToolChoice
from .decoding import Rules, make_rules
from .encoder_inputs import EncoderInput, PreparedPrompt
from .encoding import encoded_picture, encoded_sound
from .errors import InputError, PromptError
from .grammar import Grammar
from .parts import PartLike, Turn, Words
from .prefix_cache import Pin
from .preprocessing import PromptOptions, ReadTurn
from .reply import Chunk, EncodedImage, EncodedSound, EncodedVideo, StageClock, whole_reply
from .reuse import Reuse
from .sampling import Sampling
from .sounds import PreparedSound
from .tools import ToolLike, ToolResult

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Chat"]

Said = PartLike | ToolResult | Sequence[PartLike | ToolResult]


class Chat:
    """A conversation with an engine; `Engine.chat` makes one.

    A turn is added to the history when its reply is complete. One that fails, or whose stream is closed before its end,
    leaves the conversation as it was. Media are read once and stay in the history encoded, so files may change or
    disappear; the prompt of a turn continues from the decoder state of the turn before. One turn runs at a time.

    A reply that calls tools is answered with their results: `chat.send([ToolResult(call.name, ...), ...])`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int,
        image_tokens: int | None = None,
        tools: Sequence[ToolLike] = (),
        tool_choice: ToolChoice = "auto",
        thinking: bool = False,
        cache: bool = True,
    ):
        """See `Engine.chat`."""
        if not engine._preprocessor.has_roles:
            raise PromptError("a chat needs a chat template with roles, which this bundle does not have")
        self.system = system
        self.image_tokens = image_tokens
        self._engine = engine
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._tools = tuple(tools)
        self._tool_choice = tool_choice
        self._thinking = thinking
        self._cache = cache
        self._turns: tuple[Turn, ...] = ()
        self._pin: Pin | None = None  # holds the states of the latest turn in the engine's cache
        self._running = Lock()

    @property
    def history(self) -> tuple[Turn, ...]:
        """The user's and the assistant's turns, in the form that `Engine.generate` takes, without the system text.

        Texts are `Text`, media `EncodedImage`, `EncodedVideo` and `EncodedSound`. Results of tools are turns of their
        own. Thoughts are in it only beside the calls that they led to.
        """
        return self._turns

    def reset(self) -> None:
        """Forget all turns; the system text and the options stay. Raises InputError while a reply is streaming."""
        with self._one_at_a_time():
            self._turns, self._pin = (), None

    def stream(
        self,
        parts: Said,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        image_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Collection[int] = (),
        format: Grammar | None = None,
        logprobs: int | None = None,
        tool_choice: ToolChoice | None = None,
    ) -> Generator[Chunk, None, None]:
        """Send a turn and get the reply in chunks. The last one carries the whole reply and completes the turn.

        Nothing runs before the first `next()`. Closing the generator before the last chunk cancels the turn.

        Args:
            parts: a part or a list of parts: the user's turn, or the results of the latest reply's calls.
            sampling, max_tokens, image_tokens, tool_choice: see `Engine.stream`; None is the chat's own.
            stop, stop_ids, format, logprobs: see `Engine.stream`.

        Raises InputError and ModelOutputError like `Engine.stream`, and InputError while another reply is streaming.
        """
        with self._one_at_a_time():
            engine, clock = self._engine, StageClock()
            rules = make_rules(
                engine.manifest,
                engine.runtime.vocabulary,
                engine._constraints,
                engine._markers,
                sampling=self._sampling if sampling is None else sampling,
                max_tokens=self._max_tokens if max_tokens is None else max_tokens,
                stop=stop,
                stop_ids=stop_ids,
                format=format,
                candidates=1,
                logprobs=logprobs,
                tools=self._tools,
                tool_choice=self._tool_choice if tool_choice is None else tool_choice,
                parallel_tool_calls=True,
                thinking=self._thinking,
            )
            yield from self._turn(parts, self.image_tokens if image_tokens is None else image_tokens, rules, clock)

    send = whole_reply(stream, "send")

    def _turn(self, parts: Said, image_tokens: int | None, rules: Rules, clock: StageClock) -> Iterator[Chunk]:
        engine, pin = self._engine, Pin()
        reuse = dataclasses.replace(engine._reuse, pin=pin) if self._cache else engine._reuse.off()
        conversation = [*self._turns, _turn_of(parts)]
        turns = engine._preprocessor.read(conversation, clock, self.system, image_tokens, known=reuse.files)
        options = PromptOptions(tools=rules.calls.tools, thinking=rules.thinking)
        prepared = engine._prepare(turns, clock, reuse, options)
        for chunk in engine._answer(prepared, rules, clock, reuse):
            if chunk.reply is not None:
                said = self._settled(turns[-1], prepared, clock, reuse)
                self._turns += (said, Turn.of(chunk.reply))
                self._pin = pin
            yield chunk

    def _settled(self, turn: ReadTurn, prepared: PreparedPrompt, clock: StageClock, reuse: Reuse) -> Turn:
        """The turn as it stays in the history: without files, its media encoded."""
        views: list[list[EncoderInput]] = [[] for _ in prepared.media]
        for span, view in zip(prepared.prompt.spans, prepared.views, strict=True):
            views[span.media_index].append(view)
        media = {id(medium): seen for medium, seen in zip(prepared.media, views, strict=True)}
        role, parts = turn
        settled: list[Words | EncodedImage | EncodedVideo | EncodedSound] = []
        for part in parts:
            if isinstance(part, Words):
                settled.append(part)
                continue
            seen = media[id(part)]
            values = [self._engine._encode(view, clock, reuse) for view in seen]
            if isinstance(part, PreparedSound):
                settled.append(encoded_sound(self._engine.manifest, part, seen[0], values[0]))
            else:
                settled.append(encoded_picture(self._engine.manifest, part, seen, values))
        return Turn(role, settled)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            raise InputError("a reply of this chat is still streaming: read it to its end, or close it")
        try:
            yield
        finally:
            self._running.release()


def _turn_of(parts: Said) -> Turn:
    """Results are a tool's turn, everything else is the user's."""
    listed = parts if isinstance(parts, (list, tuple)) else [parts]
    return Turn("tool" if any(isinstance(part, ToolResult) for part in listed) else "user", parts)

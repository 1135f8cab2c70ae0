"""The ids of a reply told apart: the answer, thoughts, and calls of tools.

A model marks its thoughts and calls with special tokens, which are no text:

    <|channel>thought\\n ... \\n<channel|>      a thought; the name of its channel is not part of it
    <|tool_call>call:NAME{...}<tool_call|>     a call, see `tool_format`

They are told apart by ids, never by text: what a model writes about its markers, letter by letter, stays what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .errors import BundleError
from .manifest import ReplyFacts
from .text import TextStream
from .tool_format import CONTROL_TOKENS, QUOTE, CallError, parse_call
from .tools import MalformedCall, ToolCall

__all__ = ["Markers", "Piece", "ReplyParts", "control_tokens"]

_LABEL = "thought\n"  # the name of the channel
_APART = "\n\n"  # between two thoughts
_ANSWER, _THOUGHT, _CALL = "answer", "thought", "call"


def control_tokens(facts: ReplyFacts) -> frozenset[str]:
    """Tokens that are never text in a bundle with these reply facts."""
    calls = () if facts.tool_call is None else (*facts.tool_call, *CONTROL_TOKENS)
    return frozenset((*(facts.thought or ()), *calls))


class Markers(NamedTuple):
    """Ids of the tokens that open and close thoughts and calls, and of the quote token inside calls; -1 for none."""

    thought: int = -1
    thought_end: int = -1
    call: int = -1
    call_end: int = -1
    quote: int = -1

    @classmethod
    def read(cls, tokenizer: Tokenizer, facts: ReplyFacts) -> Markers:
        """The markers that the manifest names. Raises BundleError for one that the tokenizer does not have."""
        thought = (-1, -1) if facts.thought is None else (_id_of(tokenizer, name) for name in facts.thought)
        names = () if facts.tool_call is None else (*facts.tool_call, QUOTE)
        return cls(*thought, *(_id_of(tokenizer, name) for name in names))

    def open_thought(self, prompt: np.ndarray, turn_ends: Collection[int]) -> list[int] | None:
        """The ids behind the marker of a thought that a prompt, int64 [L], leaves open; None if it leaves none open."""
        if self.thought < 0:
            return None
        edges = np.flatnonzero(np.isin(prompt, [self.thought, self.thought_end, *turn_ends]))
        if not edges.size or prompt[edges[-1]] != self.thought:
            return None
        return prompt[edges[-1] + 1 :].tolist()


def _id_of(tokenizer: Tokenizer, name: str) -> int:
    id = tokenizer.token_to_id(name)
    if id is None:
        raise BundleError(f"the manifest has replies with {name!r}, which the tokenizer does not have")
    return id


class Piece(NamedTuple):
    """What has become certain of a reply."""

    text: str = ""
    thought: str = ""
    calls: tuple[ToolCall, ...] = ()


class ReplyParts:
    """The parts of one reply, from its ids.

    Laws, for any ids: the joined `text` is the text that `TextStream` would give for the ids of the answer alone, with
    the text of each malformed call at its place; stop strings are looked for there and nowhere else. A thought is the
    text of its ids without the name of its channel and without white space around it; a blank line sets two apart. A
    call that opens inside a thought ends the thought. Any token but text and quotes inside a call makes it malformed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        markers: Markers,
        stop: Sequence[str],
        hidden_ids: Collection[int],
        begun: Sequence[int] | None = None,
        *,
        held_calls: bool = False,
    ):
        """`hidden_ids` are not text; `begun` are those of the thought in which the prompt ends, None for no thought.

        `held_calls` says that calls are held to a grammar, see `parse_call`.
        """
        self.calls: list[ToolCall] = []
        self.malformed: list[MalformedCall] = []
        self.thoughts = 0  # how many have begun
        self.thought_tokens = 0  # with their markers
        self._tokenizer = tokenizer
        self._markers = markers
        self._hidden = frozenset(hidden_ids)
        self._held_calls = held_calls
        self._where = _ANSWER
        self._answer = TextStream(tokenizer, stop, self._hidden)
        self._thought = _Thoughts(tokenizer, self._hidden)
        self._call = _Call(tokenizer)
        if begun is not None:
            self._open_thought()
            for id in begun:
                self._thought.push(id)
            self._thought.forget()

    @property
    def in_answer(self) -> bool:
        return self._where == _ANSWER

    @property
    def in_thought(self) -> bool:
        return self._where == _THOUGHT

    @property
    def in_call(self) -> bool:
        return self._where == _CALL

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._answer.stopped

    def push(self, id: int) -> Piece:
        """Add the next id."""
        markers = self._markers
        if self.in_call:
            return self._push_to_call(id)
        if id == markers.call:
            thought = self._close_thought()
            self._open_call()
            return Piece(thought=thought)
        self.thought_tokens += self.in_thought or id == markers.thought
        if id == markers.thought:
            thought = self._close_thought()
            self._open_thought()
            return Piece(thought=thought)
        if self.in_thought:
            return Piece(thought=self._close_thought() if id == markers.thought_end else self._thought.push(id))
        return Piece(self._answer.push(id))

    def finish(self) -> Piece:
        """The reply is over; `in_thought` and `in_call` go on to say where it ended."""
        thought = self._thought.close(finished=False) if self.in_thought else ""
        text = self._malformed("the reply ends inside of the call") if self.in_call else ""
        return Piece(text + self._answer.finish(), thought)

    def _open_thought(self) -> None:
        self._where = _THOUGHT
        self.thoughts += 1
        self._thought.open()

    def _close_thought(self) -> str:
        closed = self._thought.close(finished=True) if self.in_thought else ""
        self._where = _ANSWER
        return closed

    def _open_call(self) -> None:
        self._where, self._call = _CALL, _Call(self._tokenizer)

    def _push_to_call(self, id: int) -> Piece:
        markers, call = self._markers, self._call
        if id == markers.call:
            text = self._malformed("another call begins inside of the call")
            if self.stopped:  # by a stop string in what has turned out to be text: nothing begins behind that
                self._where = _ANSWER
            else:
                self._open_call()
            return Piece(text)
        if id == markers.call_end:
            self._where = _ANSWER
            return self._close_call()
        if id == markers.quote:
            call.quote()
        elif id in self._hidden:
            call.spoil(self._tokenizer.id_to_token(id) or str(id))
        else:
            call.ids.append(id)
        return Piece()

    def _close_call(self) -> Piece:
        try:
            read = self._call.read(self._held_calls)
        except CallError as error:
            return Piece(self._malformed(str(error)))
        self.calls.append(read)
        return Piece(calls=(read,))

    def _malformed(self, reason: str) -> str:
        """A call that cannot be read is text of the answer; returns what of it is certain."""
        self.malformed.append(MalformedCall(self._call.text(), reason))
        return self._answer.insert(self.malformed[-1].text)


class _Thoughts:
    """The text of all thoughts of a reply, as it becomes certain."""

    def __init__(self, tokenizer: Tokenizer, hidden_ids: Collection[int]):
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        self._given = False  # text of any thought
        self.open()

    def open(self) -> None:
        self._stream = TextStream(self._tokenizer, (), self._hidden_ids)
        self._label: str | None = ""  # what may be the beginning of the label, None behind it
        self._begun = False
        self._space: list[str] = []  # counts if text follows

    def forget(self) -> None:
        """What has been pushed was not of the reply."""
        self._given = self._begun = False
        self._space = []

    def push(self, id: int) -> str:
        return self._trimmed(self._without_label(self._stream.push(id)))

    def close(self, finished: bool) -> str:
        text = self._without_label(self._stream.finish())
        # Whatever could still have become the label is the label in a thought that is cut off. In a whole one only the
        # label without its line break is.
        if finished and self._label and self._label != _LABEL.rstrip():
            text = self._label
        return self._trimmed(text)

    def _without_label(self, text: str) -> str:
        if self._label is None or not text:
            return text
        self._label += text
        if self._label != _LABEL and _LABEL.startswith(self._label):
            return ""
        text, self._label = self._label.removeprefix(_LABEL), None
        return text

    def _trimmed(self, text: str) -> str:
        """The text without white space where the thought begins and, as long as nothing follows, behind it."""
        if not text or text.isspace():
            if self._begun:
                self._space.append(text)
            return ""
        text = "".join(self._space) + (text if self._begun else text.lstrip())
        certain = text.rstrip()
        apart = _APART if self._given and not self._begun else ""
        self._begun = self._given = True
        self._space = [text[len(certain) :]]
        return apart + certain


class _Call:
    """The ids of a call that is being written."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._segments: list[str] = []
        self._spoiled: str | None = None
        self.ids: list[int] = []

    def quote(self) -> None:
        self._segments.append(self._tokenizer.decode(self.ids, skip_special_tokens=False))
        self.ids = []

    def spoil(self, token: str) -> None:
        """A token stands inside that no call has."""
        self._spoiled = self._spoiled or token

    def read(self, held: bool) -> ToolCall:
        """Raises CallError."""
        if self._spoiled is not None:
            raise CallError(f"the token {self._spoiled} stands inside of the call")
        return parse_call(self._all(), held=held)

    def text(self) -> str:
        return '"'.join(self._all())

    def _all(self) -> list[str]:
        return [*self._segments, self._tokenizer.decode(self.ids, skip_special_tokens=False)]

"""Messages as a prompt takes them: checked, and merged into turns.

Adjacent text parts are one text, and adjacent messages of one role one turn. A turn that mixes text and media keeps
their order. A turn of the assistant may end in calls of tools; the turn behind it has their results.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PromptError
from .manifest import PanAndScanFacts, PromptFacts
from .tools import ToolCall, ToolResult, strings, swapped

__all__ = [
    "Media",
    "Message",
    "MessageTurn",
    "Part",
    "Text",
    "Thought",
    "checked_parts",
    "join",
    "merged_turns",
    "plain_parts",
    "sole_turn",
    "template_messages",
]

# Adjacent messages of one role, and system text in front of a user turn, are joined with what Gemma 3's own template
# puts between system and user.
_JOINT = "\n\n"


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """The place of a medium; `soft_tokens` is the number of embedding rows its encoder gives for it.

    `crops` are the numbers of rows of its crops, for an image that is shown in crops too (pan and scan). `frames` are
    those of a video: the text in front of each and its number of rows, `soft_tokens` is their sum.
    """

    kind: str = "image"
    soft_tokens: int
    crops: tuple[int, ...] = ()
    frames: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Thought:
    """What the model thought before its calls. Templates that know thoughts keep those of the turn that goes on."""

    text: str


Part = Text | Media | Thought | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `role` is "system", "user", "assistant" ("model" is the same) or "tool"; `parts` keep their order.

    Thoughts and calls are the assistant's, calls behind everything else. Results are all that a tool says.
    """

    role: str
    parts: str | Sequence[Part]


@dataclass(frozen=True, slots=True)
class MessageTurn:
    """Adjacent messages of one role: the index of the first, and their parts with no two texts side by side.

    `parts` are what the turn says; thoughts, calls and results are apart.
    """

    index: int
    role: str
    parts: list[Text | Media]
    thought: str = ""
    calls: tuple[ToolCall, ...] = ()
    results: tuple[ToolResult, ...] = ()

    def followed_by(self, other: MessageTurn) -> MessageTurn:
        """Both in one turn; texts that meet are set apart."""
        meet = bool(self.parts and other.parts)
        meet = meet and isinstance(self.parts[-1], Text) and isinstance(other.parts[0], Text)
        return MessageTurn(
            self.index,
            self.role,
            join([*self.parts, *([Text(_JOINT)] if meet else []), *other.parts]),
            _JOINT.join(filter(None, (self.thought, other.thought))),
            self.calls + other.calls,
            self.results + other.results,
        )

    def texts(self) -> Iterator[str]:
        """All text from outside."""
        yield from (part.text for part in self.parts if isinstance(part, Text))
        yield self.thought
        for call in self.calls:
            yield from (call.name, *strings(call.arguments))
        for result in self.results:
            yield from (result.name, *strings(result.fields))

    def content(self, swap: Callable[[str], str]) -> str | list[dict[str, str]]:
        """What the turn says as templates of these families read it: plain text unless there are media."""
        content = [
            {"type": "text", "text": swap(part.text)} if isinstance(part, Text) else {"type": part.kind}
            for part in self.parts
        ]
        return content if any(item["type"] != "text" for item in content) else "".join(item["text"] for item in content)


def template_messages(
    turns: Sequence[MessageTurn], swap: Callable[[str], str], *, attach_results: bool = False, mark: str = ""
) -> list[dict[str, Any]]:
    """The messages that a chat template reads, text from outside swapped.

    Calls are a message of their own, because templates write them in front of what the same message says. Results are
    messages with the role "tool", or they are attached to the message of their calls, as "tool_responses". What the
    assistant says about attached results is in that message too: templates that close the turn behind each message
    would part them. `mark` is put where calls follow something in one turn.
    """
    messages: list[dict[str, Any]] = []
    numbers = itertools.count()
    calling: dict[str, Any] = {}
    for turn in turns:
        if turn.role == "tool":
            messages += _results(turn, calling, swap, attach_results)
            continue
        said = {"role": turn.role, "content": turn.content(swap)}
        answered = calling if turn.role == "assistant" and "tool_responses" in calling else None
        calling = {"role": turn.role, "content": ""}
        calling["tool_calls"] = [
            {
                "id": f"call_{next(numbers)}",
                "type": "function",
                "function": {"name": call.name, "arguments": swapped(call.arguments, swap)},
            }
            for call in turn.calls
        ]
        if turn.calls:
            said["content"] = _marked(said["content"], mark)
        spoken = [said] if turn.parts or not turn.calls else []
        if answered is not None and (turn.calls or (turn.parts and not turn.thought)):
            answered["content"], spoken = said["content"], []
        spoken += [calling] if turn.calls else []
        if turn.thought:
            spoken[-1]["reasoning_content"] = swap(turn.thought)
        messages += spoken
    return messages


def _marked(content: str | list[dict[str, str]], mark: str) -> str | list[dict[str, str]]:
    return content + mark if isinstance(content, str) else [*content, *([{"type": "text", "text": mark}] * bool(mark))]


def _results(
    turn: MessageTurn, calling: dict[str, Any], swap: Callable[[str], str], attach: bool
) -> list[dict[str, Any]]:
    """The messages of a turn of results, behind the message of their calls."""
    if attach:
        calling["tool_responses"] = [
            {"name": result.name, "response": swapped(result.fields, swap)} for result in turn.results
        ]
        return []
    open_calls = list(calling["tool_calls"])
    messages = []
    for result in turn.results:
        call = next(call for call in open_calls if call["function"]["name"] == result.name)
        open_calls.remove(call)
        content = swapped(result.fields, swap)
        messages.append({"role": "tool", "tool_call_id": call["id"], "name": result.name, "content": content})
    return messages


def sole_turn(messages: Sequence[Message]) -> str | Sequence[Part]:
    """The parts of the only user message. Raises PromptError for anything that needs roles."""
    if len(messages) != 1 or messages[0].role != "user":
        roles = ", ".join(message.role for message in messages)
        raise PromptError(
            f"a prompt without a chat template has no roles: it is one user message and no system text, not {roles}"
        )
    return messages[0].parts


def merged_turns(
    messages: Sequence[Message], facts: PromptFacts, pan_and_scan: PanAndScanFacts | None = None
) -> list[MessageTurn]:
    """Checked messages, merged into turns."""
    if not messages:
        raise PromptError("the conversation has no messages")
    turns: list[MessageTurn] = []
    for index, message in enumerate(messages):
        role = {"model": "assistant"}.get(message.role, message.role)
        if role not in ("system", "user", "assistant", "tool"):
            raise PromptError(
                f"message {index}: unknown role {message.role!r} (known: system, user, assistant, model, tool)"
            )
        turn = _turn(index, role, checked_parts(message.parts, facts, pan_and_scan, f"message {index}"))
        if role == "user" and not any(isinstance(part, Media) or part.text.strip() for part in turn.parts):
            raise PromptError(f"message {index}: a user message needs text or a medium")
        if role == "system":
            if any(turn.role != "system" for turn in turns):
                raise PromptError(f"message {index}: a system message must come before all others")
            if any(isinstance(part, Media) for part in turn.parts):
                raise PromptError(f"message {index}: a system message holds text only")
        if turns and turns[-1].role == role:
            turns[-1] = turns[-1].followed_by(turn)
        else:
            turns.append(turn)
    _check_results(turns)
    if turns[-1].role == "assistant":
        raise PromptError(f"message {len(messages) - 1}: the conversation ends with the assistant, nothing to answer")
    return turns


def _turn(index: int, role: str, parts: Sequence[Part]) -> MessageTurn:
    """One message as a turn. Raises PromptError for a part that its role does not have."""
    allowed = {"assistant": (Text, Media, Thought, ToolCall), "tool": (ToolResult,)}.get(role, (Text, Media))
    calls: list[ToolCall] = []
    for place, part in enumerate(parts):
        if not isinstance(part, allowed):
            raise PromptError(f"message {index}, part {place}: a message of role {role!r} has no {type(part).__name__}")
        if isinstance(part, ToolCall):
            calls.append(part)
        elif calls and not (isinstance(part, Text) and not part.text):
            raise PromptError(f"message {index}, part {place}: nothing but calls may follow a call")
    results = tuple(part for part in parts if isinstance(part, ToolResult))
    if role == "tool" and not results:
        raise PromptError(f"message {index}: a tool message needs a result")
    thought = _JOINT.join(part.text for part in parts if isinstance(part, Thought))
    said = join(part for part in parts if isinstance(part, (Text, Media)))
    return MessageTurn(index, role, said, thought, tuple(calls), results)


def _check_results(turns: Sequence[MessageTurn]) -> None:
    """Every call has its result in the turn behind it, and no result is without a call."""
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        results = following.results if following is not None else ()
        calls = Counter(call.name for call in turn.calls)
        answered = Counter(result.name for result in results)
        for name in calls - answered:
            raise PromptError(f"message {turn.index}: the call of {name!r} needs a result in the message behind it")
        for name in answered - calls:
            assert following is not None
            raise PromptError(
                f"message {following.index}: the result of {name!r} answers no call of the turn before it"
            )
    if turns[0].results:
        raise PromptError(f"message 0: the result of {turns[0].results[0].name!r} answers no call")


def checked_parts(parts: Any, facts: PromptFacts, pan_and_scan: PanAndScanFacts | None, where: str) -> list[Part]:
    """The parts of a message, whatever a caller passed; `where` begins the message of an error."""
    if isinstance(parts, str):
        parts = [Text(parts)]
    if not isinstance(parts, Sequence):
        raise PromptError(f"{where}: the content is {type(parts).__name__}, expected text or a list of parts")
    for index, part in enumerate(parts):
        place = f"{where}, part {index}"
        if isinstance(part, (Text, Thought)) and isinstance(part.text, str):
            try:
                part.text.encode()
            except UnicodeEncodeError as error:
                raise PromptError(f"{place}: not valid Unicode at character {error.start}") from None
        elif isinstance(part, Media):
            if part.kind not in facts.placeholders:
                raise PromptError(f"{place}: this model has no {'vision' if part.kind == 'image' else part.kind} input")
            if (part.kind == "video") != bool(part.frames) or any(length < 1 for _, length in part.frames):
                raise PromptError(f"{place}: a video needs frames of at least 1 soft token, and nothing else has any")
            if part.soft_tokens < 1:
                what = {"image": "an image", "audio": "a sound"}.get(part.kind, part.kind)
                raise PromptError(f"{place}: {what} needs at least 1 soft token, not {part.soft_tokens}")
            if part.crops and (pan_and_scan is None or min(part.crops) < 1):
                raise PromptError(
                    f"{place}: this model takes no such crops of an image: {list(part.crops)} soft tokens"
                )
        elif not isinstance(part, (ToolCall, ToolResult)):
            holds = f" of {type(part.text).__name__}" if isinstance(part, (Text, Thought)) else ""
            raise PromptError(f"{place}: expected Text or Media, not {type(part).__name__}{holds}")
    return list(parts)


def plain_parts(parts: Any, facts: PromptFacts, pan_and_scan: PanAndScanFacts | None, where: str) -> list[Text | Media]:
    """The parts of a prompt without roles: text and media, empty texts too."""
    plain: list[Text | Media] = []
    for index, part in enumerate(checked_parts(parts, facts, pan_and_scan, where)):
        if not isinstance(part, (Text, Media)):
            raise PromptError(f"{where}, part {index}: without a chat template there is no {type(part).__name__}")
        plain.append(part)
    return plain


def join(parts: Iterable[Text | Media]) -> list[Text | Media]:
    """The parts without empty texts, texts that stand side by side in one."""
    joined: list[Text | Media] = []
    for part in parts:
        if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        elif isinstance(part, Media) or part.text:
            joined.append(part)
    return joined

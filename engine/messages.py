"""Messages as a prompt takes them: checked, and merged into turns.

Adjacent text parts are one text, and adjacent messages of one role one turn. A turn that mixes text and media keeps
their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PromptError
from .manifest import PanAndScanFacts, PromptFacts

__all__ = ["Media", "Message", "MessageTurn", "Part", "Text", "checked_parts", "join", "merged_turns", "sole_turn"]

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


Part = Text | Media


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `role` is "system", "user" or "assistant" ("model" is the same); `parts` keep their order."""

    role: str
    parts: str | Sequence[Part]


@dataclass(frozen=True, slots=True)
class MessageTurn:
    """Adjacent messages of one role: the index of the first, and their parts with no two texts side by side."""

    index: int
    role: str
    parts: list[Part]

    def followed_by(self, other: MessageTurn) -> MessageTurn:
        """Both in one turn; texts that meet are set apart."""
        meet = bool(self.parts and other.parts)
        meet = meet and isinstance(self.parts[-1], Text) and isinstance(other.parts[0], Text)
        return MessageTurn(self.index, self.role, join([*self.parts, *([Text(_JOINT)] if meet else []), *other.parts]))

    def for_template(self, swap: Callable[[str], str]) -> dict[str, Any]:
        """The message as templates of these families read it, texts swapped: plain content unless there are media."""
        content = [
            {"type": "text", "text": swap(part.text)} if isinstance(part, Text) else {"type": part.kind}
            for part in self.parts
        ]
        if all(item["type"] == "text" for item in content):
            return {"role": self.role, "content": "".join(item["text"] for item in content)}
        return {"role": self.role, "content": content}


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
        if role not in ("system", "user", "assistant"):
            raise PromptError(f"message {index}: unknown role {message.role!r} (known: system, user, assistant, model)")
        parts = join(checked_parts(message.parts, facts, pan_and_scan, f"message {index}"))
        if role == "user" and not any(isinstance(part, Media) or part.text.strip() for part in parts):
            raise PromptError(f"message {index}: a user message needs text or an image")
        if role == "system":
            if any(turn.role != "system" for turn in turns):
                raise PromptError(f"message {index}: a system message must come before all others")
            if any(isinstance(part, Media) for part in parts):
                raise PromptError(f"message {index}: a system message holds text only")
        turn = MessageTurn(index, role, parts)
        if turns and turns[-1].role == role:
            turns[-1] = turns[-1].followed_by(turn)
        else:
            turns.append(turn)
    if turns[-1].role == "assistant":
        raise PromptError(f"message {len(messages) - 1}: the conversation ends with the assistant, nothing to answer")
    return turns


def checked_parts(parts: Any, facts: PromptFacts, pan_and_scan: PanAndScanFacts | None, where: str) -> list[Part]:
    """The parts of a message, whatever a caller passed; `where` begins the message of an error."""
    if isinstance(parts, str):
        parts = [Text(parts)]
    if not isinstance(parts, Sequence):
        raise PromptError(f"{where}: the content is {type(parts).__name__}, expected text or a list of parts")
    for index, part in enumerate(parts):
        place = f"{where}, part {index}"
        if isinstance(part, Text) and isinstance(part.text, str):
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
                raise PromptError(f"{place}: an image needs at least 1 soft token, not {part.soft_tokens}")
            if part.crops and (pan_and_scan is None or min(part.crops) < 1):
                raise PromptError(
                    f"{place}: this model takes no such crops of an image: {list(part.crops)} soft tokens"
                )
        else:
            raise PromptError(f"{place}: expected Text or Media, not {type(part).__name__}")
    return list(parts)


def join(parts: Iterable[Part]) -> list[Part]:
    """The parts without empty texts, texts that stand side by side in one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        elif isinstance(part, Media) or part.text:
            joined.append(part)
    return joined

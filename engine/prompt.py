"""Conversations to token ids.

Three rules, each a law in tests/test_prompt.py:

1. *Text never becomes control tokens.* A control token is an added token that the tokenizer marks as special. In text
   from outside, every character that could begin the spelling of one is swapped for a private-use character before the
   template sees it; the rendered string is split at the control tokens, which are now the template's own, and each
   run between them is swapped back and encoded with `encode_special_tokens=True`. This holds wherever a spelling
   would come together: inside a part, across parts, or between text and template.
2. *Soft tokens come from attached media only.* The template writes one placeholder item per medium; it is expanded in
   the string, so that the newlines of an expansion merge with their neighbours into one token as they do in
   transformers' processors. The number of items is checked before anything runs.
3. *Exactly one beginning-of-sequence token, at index 0*, whether the template writes none, one or several.

Splitting at control tokens and encoding run by run gives the ids of encoding the whole string: the tokenizers of these
families cut at added tokens first and add no prefix space.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .errors import BundleError, PromptError
from .manifest import PlaceholderFacts, PromptFacts
from .template import ChatTemplate

__all__ = ["Media", "Message", "Part", "Prompt", "PromptBuilder", "Span", "Text"]

# Adjacent messages of one role, and system text in front of a user turn, are joined with what Gemma 3's own template
# puts between system and user.
_JOINT = "\n\n"
_PRIVATE_USE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """The place of a medium; `soft_tokens` is the number of embedding rows its encoder gives for it."""

    kind: str = "image"
    soft_tokens: int


Part = Text | Media


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `role` is "system", "user" or "assistant" ("model" is the same); `parts` keep their order."""

    role: str
    parts: str | Sequence[Part]


@dataclass(frozen=True, slots=True)
class Span:
    """The rows `start : start + length` of a prompt that belong to the soft tokens of medium `media_index`."""

    start: int
    length: int
    media_index: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: `ids` int64 [L]; `spans` in the order of the media; `text`, of which `ids` is the encoding."""

    ids: np.ndarray
    spans: tuple[Span, ...]
    text: str


class PromptBuilder:
    """Builds prompts for one bundle.

    From here on `tokenizer` encodes spellings of control tokens as text (`encode_special_tokens`); it must not be
    used for anything that wants them parsed. Raises BundleError when the prompt facts name tokens it does not have.
    """

    def __init__(self, tokenizer: Tokenizer, facts: PromptFacts, template: ChatTemplate | None):
        self._tokenizer = tokenizer
        self._facts = facts
        self._template = template
        self._control = {
            token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        names = [facts.begin] if facts.image is None else [facts.begin, facts.image.soft]
        for name in names:
            if name not in self._control:
                raise BundleError(f"the manifest names {name!r}, which is not a special token of the tokenizer")
        tokenizer.encode_special_tokens = True
        spellings = [*self._control] if facts.image is None else [*self._control, facts.image.item]
        self._first_characters = sorted({spelling[0] for spelling in spellings})
        self._candidates = re.compile("[" + re.escape("".join(self._first_characters)) + "]")
        self._lengths = sorted({len(spelling) for spelling in self._control}, reverse=True)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """The prompt for a conversation, ending where the model's reply begins.

        Adjacent text parts are one text. Adjacent messages of one role become one turn. System text goes into a
        system turn, or in front of the first user turn if the template has no system role. Raises PromptError, naming
        the message, for anything that cannot be used, and for whatever the template refuses.
        """
        if self._template is None:
            raise PromptError("this bundle has no chat template: it completes text as it stands (raw)")
        turns = _turns(messages, self._facts)
        turns = self._place_system(turns)
        parts = [part for turn in turns for part in turn.parts]
        media = [part for part in parts if isinstance(part, Media)]
        texts = [part.text for part in parts if isinstance(part, Text)]
        guard = _Guard(self._first_characters, [self._template.source, *texts])
        rendered = self._render(turns, guard)
        if self._facts.image is None:
            return self._assemble([rendered], [], guard)
        pieces = rendered.split(self._facts.image.item)
        if len(pieces) - 1 != len(media):
            raise PromptError(
                f"the chat template wrote {len(pieces) - 1} placeholders for {len(media)} attached images"
            )
        return self._assemble(pieces, media, guard)

    def raw(self, parts: str | Sequence[Part]) -> Prompt:
        """The prompt that is completed as it stands: one beginning-of-sequence token, then the parts.

        No text at all is legal: the model then starts from nothing.
        """
        joined = _join(_checked_parts(parts, self._facts, "the prompt"))
        guard = _Guard(self._first_characters, [part.text for part in joined if isinstance(part, Text)])
        pieces, media = [""], []
        for part in joined:
            if isinstance(part, Text):
                pieces[-1] = guard.swap(part.text)
            else:
                media.append(part)
                pieces.append("")
        return self._assemble(pieces, media, guard)

    def from_ids(self, ids: Iterable[int]) -> Prompt:
        """The prompt that is exactly `ids`, nothing added.

        Runs of the soft token become spans, in order. Raises PromptError for an id the tokenizer does not have.
        """
        listed = list(ids)
        if not listed:
            raise PromptError("the list of prompt ids is empty")
        for index, id in enumerate(listed):
            if not isinstance(id, (int, np.integer)) or isinstance(id, bool):
                raise PromptError(f"prompt id {index} is {id!r}, expected an integer")
            if not (0 <= id < 2**31 and self._tokenizer.id_to_token(int(id)) is not None):
                size = self._tokenizer.get_vocab_size()
                raise PromptError(f"prompt id {index} is {id}, which is not in the vocabulary of {size} tokens")
        array = np.array(listed, dtype=np.int64)
        spans = []
        if self._facts.image is not None:
            edges = np.flatnonzero(np.diff(array == self._control[self._facts.image.soft], prepend=False, append=False))
            starts_and_ends = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
            spans = [Span(start, end - start, index) for index, (start, end) in enumerate(starts_and_ends)]
        return Prompt(array, tuple(spans), self._tokenizer.decode(listed, skip_special_tokens=False))

    # -- templates -----------------------------------------------------------------------------------------------

    def _render(self, turns: list[_Turn], guard: _Guard) -> str:
        try:
            return self._apply([turn.for_template(guard) for turn in turns])
        except PromptError as error:
            index = self._first_refused(turns, guard)
            raise PromptError(f"message {index}: {guard.restore(str(error))}") from None

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        assert self._template is not None
        return self._template.render(messages, bos_token=self._facts.begin, add_generation_prompt=True)

    def _refuses(self, messages: list[dict[str, Any]]) -> bool:
        try:
            self._apply(messages)
        except PromptError:
            return True
        return False

    def _first_refused(self, turns: list[_Turn], guard: _Guard) -> int:
        """Index of the message at which the template starts to refuse: a longer history does not make it accept."""
        rendered = [turn.for_template(guard) for turn in turns]
        length = bisect.bisect_left(range(1, len(turns)), True, key=lambda count: self._refuses(rendered[:count]))
        return turns[length].index

    def _place_system(self, turns: list[_Turn]) -> list[_Turn]:
        """Fold system text into the first user turn unless the template gives it a place of its own."""
        if turns[0].role != "system":
            return turns
        if not any(part.text.strip() for part in turns[0].parts if isinstance(part, Text)):
            if len(turns) == 1:
                raise PromptError("message 0: an empty system text and nothing else is nothing to answer")
            return turns[1:]
        if self._has_system_turn(alone=len(turns) == 1):
            return turns
        if len(turns) > 1 and turns[1].role != "user":
            raise PromptError(
                f"message {turns[1].index}: this model has no system role, so a user message must follow the system "
                "text"
            )
        folded = _Turn(turns[0].index, "user", turns[0].parts)
        return [folded] if len(turns) == 1 else [folded.followed_by(turns[1]), *turns[2:]]

    def _has_system_turn(self, alone: bool) -> bool:
        """Try the template on a probe: some raise on a system role, some drop system text that no user turn follows."""
        probe = [{"role": "system", "content": "probe-system"}, {"role": "user", "content": "probe-user"}]
        try:
            rendered = self._apply(probe[:1] if alone else probe)
        except PromptError:
            return False
        # Gemma 3's template writes system text into the user turn by itself, which is as good.
        return "probe-system" in rendered

    # -- ids -----------------------------------------------------------------------------------------------------

    def _assemble(self, pieces: list[str], media: list[Media], guard: _Guard) -> Prompt:
        """`pieces` are rendered strings, swapped text in them; between each two stands a medium."""
        begin, image = self._facts.begin, self._facts.image
        ids, spans, texts = [self._control[begin]], [], [begin]

        def append(string: str) -> None:
            for piece in self._split(string.replace(begin, "")):  # the template's own; spelled in text it is swapped
                text = guard.restore(piece)
                texts.append(text)
                control = self._control.get(piece)
                ids.extend(self._encode(text) if control is None else [control])

        waiting = pieces[0]
        for index, (medium, piece) in enumerate(zip(media, pieces[1:], strict=True)):
            assert isinstance(image, PlaceholderFacts)
            append(waiting + image.before)
            spans.append(Span(len(ids), medium.soft_tokens, index))
            ids.extend([self._control[image.soft]] * medium.soft_tokens)
            texts.append(image.soft * medium.soft_tokens)
            waiting = image.after + piece
        append(waiting)
        return Prompt(np.array(ids, dtype=np.int64), tuple(spans), "".join(texts))

    def _split(self, string: str) -> Iterator[str]:
        """The control tokens of `string` and the runs between them; leftmost and longest first, as tokenizers match."""
        start = 0
        for candidate in self._candidates.finditer(string):
            at = candidate.start()
            if at < start:
                continue
            spellings = (string[at : at + length] for length in self._lengths)
            control = next((spelling for spelling in spellings if spelling in self._control), None)
            if control is not None:
                yield string[start:at]
                yield control
                start = at + len(control)
        yield string[start:]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids if text else []


@dataclass(frozen=True, slots=True)
class _Turn:
    """Adjacent messages of one role: the index of the first, and their parts with no two texts side by side."""

    index: int
    role: str
    parts: list[Part]

    def followed_by(self, other: _Turn) -> _Turn:
        """Both in one turn; texts that meet are set apart."""
        meet = bool(self.parts and other.parts)
        meet = meet and isinstance(self.parts[-1], Text) and isinstance(other.parts[0], Text)
        return _Turn(self.index, self.role, _join([*self.parts, *([Text(_JOINT)] if meet else []), *other.parts]))

    def for_template(self, guard: _Guard) -> dict[str, Any]:
        """The message as templates of this family read it: plain content unless there are media."""
        content = [
            {"type": "text", "text": guard.swap(part.text)} if isinstance(part, Text) else {"type": part.kind}
            for part in self.parts
        ]
        if all(item["type"] == "text" for item in content):
            return {"role": self.role, "content": "".join(item["text"] for item in content)}
        return {"role": self.role, "content": content}


def _turns(messages: Sequence[Message], facts: PromptFacts) -> list[_Turn]:
    """Checked messages, merged into turns."""
    if not messages:
        raise PromptError("the conversation has no messages")
    turns: list[_Turn] = []
    for index, message in enumerate(messages):
        role = {"model": "assistant"}.get(message.role, message.role)
        if role not in ("system", "user", "assistant"):
            raise PromptError(f"message {index}: unknown role {message.role!r} (known: system, user, assistant, model)")
        parts = _join(_checked_parts(message.parts, facts, f"message {index}"))
        if role == "user" and not any(isinstance(part, Media) or part.text.strip() for part in parts):
            raise PromptError(f"message {index}: a user message needs text or an image")
        if role == "system":
            if any(turn.role != "system" for turn in turns):
                raise PromptError(f"message {index}: a system message must come before all others")
            if any(isinstance(part, Media) for part in parts):
                raise PromptError(f"message {index}: a system message holds text only")
        turn = _Turn(index, role, parts)
        if turns and turns[-1].role == role:
            turns[-1] = turns[-1].followed_by(turn)
        else:
            turns.append(turn)
    if turns[-1].role == "assistant":
        raise PromptError(f"message {len(messages) - 1}: the conversation ends with the assistant, nothing to answer")
    return turns


def _checked_parts(parts: Any, facts: PromptFacts, where: str) -> list[Part]:
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
            if part.kind != "image" or facts.image is None:
                raise PromptError(f"{place}: this model has no {'vision' if part.kind == 'image' else part.kind} input")
            if part.soft_tokens < 1:
                raise PromptError(f"{place}: an image needs at least 1 soft token, not {part.soft_tokens}")
        else:
            raise PromptError(f"{place}: expected Text or Media, not {type(part).__name__}")
    return list(parts)


def _join(parts: Iterable[Part]) -> list[Part]:
    """The parts without empty texts, texts that stand side by side in one."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + part.text)
        elif isinstance(part, Media) or part.text:
            joined.append(part)
    return joined


class _Guard:
    """Swaps characters for private-use characters that occur in none of `texts`, one for one, and back."""

    def __init__(self, characters: Sequence[str], texts: Sequence[str]):
        private = (chr(code) for first, last in _PRIVATE_USE for code in range(first, last + 1))
        free = (character for character in private if not any(character in text for text in texts))
        stand_ins = list(itertools.islice(free, len(characters)))
        if len(stand_ins) < len(characters):
            raise PromptError("the text uses every private-use character of Unicode, none is left to mark it with")
        self._swap = str.maketrans(dict(zip(characters, stand_ins, strict=True)))
        self._restore = str.maketrans(dict(zip(stand_ins, characters, strict=True)))

    def swap(self, text: str) -> str:
        return text.translate(self._swap)

    def restore(self, text: str) -> str:
        return text.translate(self._restore)

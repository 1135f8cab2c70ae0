"""Conversations to token ids.

Three rules, each a law in tests/test_prompt.py:

1. *Text never becomes control tokens.* A control token is an added token that the tokenizer marks as special. In text
   from outside, every character that could begin the spelling of one is swapped for a private-use character before the
   template sees it; the rendered string is split at the control tokens, which are now the template's own, and each
   run between them is swapped back and encoded with `encode_special_tokens=True`. This holds wherever a spelling
   would come together: inside a part, across parts, or between text and template.
2. *Soft tokens come from attached media only.* The template writes one placeholder item per medium; it is expanded in
   the string, so that the newlines of an expansion merge with their neighbours into one token as they do in
   transformers' processors. Number, kinds and order of the items are checked before anything runs.
3. *Exactly one beginning-of-sequence token*, whether the template writes none, one or several: at index 0, or behind
   the media in the layout "media_first".

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
from .manifest import PanAndScanFacts, PromptFacts, ReplyFacts
from .messages import (
    Media,
    Message,
    MessageTurn,
    Part,
    Text,
    Thought,
    join,
    merged_turns,
    plain_parts,
    sole_turn,
    template_messages,
)
from .template import ChatTemplate
from .template_capabilities import TemplateCapabilities
from .tools import Tool, strings, swapped

__all__ = ["Media", "Message", "Part", "Prompt", "PromptBuilder", "Span", "Text", "Thought", "sole_turn"]

_PRIVATE_USE = ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))


@dataclass(frozen=True, slots=True)
class Span:
    """The rows `start : start + length` of a prompt that belong to the soft tokens of medium `media_index`.

    `view` 0 is the whole medium, the others are the crops of an image in order; of a video they are its frames. `kind`
    is that of the medium.
    """

    start: int
    length: int
    media_index: int
    view: int = 0
    kind: str = "image"


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

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: PromptFacts,
        template: ChatTemplate | None,
        pan_and_scan: PanAndScanFacts | None = None,
        reply: ReplyFacts | None = None,
    ):
        """`reply` says how replies are read, which decides about tools and thinking; without it there are none."""
        self._tokenizer = tokenizer
        self._facts = facts
        self._pan_and_scan = pan_and_scan
        self._template = template
        reply = ReplyFacts(boxes="none", thought=None, tool_call=None) if reply is None else reply
        self._capabilities = None if template is None else TemplateCapabilities(template, facts.begin, reply)
        self._control = {
            token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        for name in (facts.begin, *(place.soft for place in facts.placeholders.values())):
            if name not in self._control:
                raise BundleError(f"the manifest names {name!r}, which is not a special token of the tokenizer")
        tokenizer.encode_special_tokens = True
        kinds = {place.item: kind for kind, place in facts.placeholders.items()}
        self._items = re.compile("|".join(f"({re.escape(item)})" for item in kinds)) if kinds else None
        self._kinds = [*kinds.values()]
        self._first_characters = sorted({spelling[0] for spelling in (*self._control, *kinds)})
        self._candidates = re.compile("[" + re.escape("".join(self._first_characters)) + "]")
        self._lengths = sorted({len(spelling) for spelling in self._control}, reverse=True)

    def chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), thinking: bool = False) -> Prompt:
        """The prompt for a conversation, ending where the model's reply begins.

        Adjacent text parts are one text. Adjacent messages of one role become one turn. System text goes into a
        system turn, or in front of the first user turn if the template has no system role. Raises PromptError, naming
        the message, for anything that cannot be used, and for whatever the template refuses.

        `tools` are declared, and `thinking` is switched on, by templates that know them; others refuse.

        With the layout "media_first" there are no roles: one user message becomes its media, the beginning-of-sequence
        token, its text and the end that the manifest names.
        """
        turns = merged_turns(messages, self._facts, self._pan_and_scan)
        variables = self._variables(turns, tools, thinking)
        if self._facts.layout == "media_first":
            return self._media_first(sole_turn(messages), self._facts.end)
        if self._template is None:
            raise PromptError("this bundle has no chat template: it completes text as it stands (raw)")
        turns = self._place_system(turns)
        media = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
        texts = [text for turn in turns for text in turn.texts()]
        guard = _Guard(self._first_characters, [self._template.source, *texts, *strings(variables.get("tools"))])
        rendered = self._render(turns, guard, variables)
        # The beginning-of-sequence token is the template's own here: spelled in a text it is swapped.
        rendered = rendered.replace(self._facts.begin, "")
        return self._assemble([self._facts.begin, *self._place_media(rendered, media)], guard)

    def raw(self, parts: str | Sequence[Part]) -> Prompt:
        """The prompt that is completed as it stands: one beginning-of-sequence token, then the parts.

        With the layout "media_first" the media come before that token. No text at all is legal: the model then starts
        from nothing.
        """
        if self._facts.layout == "media_first":
            return self._media_first(parts, end="")
        joined = join(plain_parts(parts, self._facts, self._pan_and_scan, "the prompt"))
        guard = _Guard(self._first_characters, [part.text for part in joined if isinstance(part, Text)])
        items = [guard.swap(part.text) if isinstance(part, Text) else part for part in joined]
        return self._assemble([self._facts.begin, *items], guard)

    def _media_first(self, parts: str | Sequence[Part], end: str) -> Prompt:
        """All media in their order, the beginning-of-sequence token, all text, `end` (PaliGemmaProcessor).

        Text and `end` are encoded as one string. A space keeps words apart between which a medium stood.
        """
        checked = plain_parts(parts, self._facts, self._pan_and_scan, "the prompt")
        text, apart = "", False
        for part in checked:
            if isinstance(part, Text):
                glued = text and part.text and not (text[-1].isspace() or part.text[0].isspace())
                text += (" " if apart and glued else "") + part.text
            apart = isinstance(part, Media) or (apart and not part.text)
        guard = _Guard(self._first_characters, [text])
        media = [part for part in checked if isinstance(part, Media)]
        return self._assemble([*media, self._facts.begin, guard.swap(text) + end], guard)

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
        runs = []
        for kind, place in self._facts.placeholders.items():
            edges = np.flatnonzero(np.diff(array == self._control[place.soft], prepend=False, append=False))
            runs += [(start, end, kind) for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]
        spans = [Span(start, end - start, index, kind=kind) for index, (start, end, kind) in enumerate(sorted(runs))]
        return Prompt(array, tuple(spans), self._tokenizer.decode(listed, skip_special_tokens=False))

    # -- templates -----------------------------------------------------------------------------------------------

    def _variables(self, turns: Sequence[MessageTurn], tools: Sequence[Tool], thinking: bool) -> dict[str, Any]:
        """What the template reads beside the messages. Raises PromptError for what this bundle does not have."""
        if self._capabilities is None:
            if tools or thinking:
                raise PromptError(f"{'tools' if tools else 'thinking'}: this bundle has no chat template")
            return {}
        if tools or any(turn.calls for turn in turns):
            self._capabilities.require_tools()
        if thinking:
            self._capabilities.require_thinking()
        declared = {"tools": [tool.declaration() for tool in tools]} if tools else {}
        return declared | ({"enable_thinking": True} if thinking else {})

    def _render(self, turns: list[MessageTurn], guard: _Guard, variables: dict[str, Any]) -> str:
        variables = swapped(variables, guard.swap)
        assert self._capabilities is not None
        calls = any(turn.calls for turn in turns)
        attach = calls and self._capabilities.attaches_results
        between = self._capabilities.before_calls if calls else ""
        mark = guard.mark if any(token in between for token in self._control) else ""

        def render(turns: Sequence[MessageTurn]) -> str:
            rendered = self._apply(template_messages(turns, guard.swap, attach_results=attach, mark=mark), variables)
            # A template that closes the turn between a text and its calls, or parts calls from it, writes what the
            # model never does: it is one turn.
            return re.sub(rf"\s*{mark}(?:{re.escape(between)})?", "", rendered) if mark else rendered

        def refuses(count: int) -> bool:
            try:
                render(turns[:count])
            except PromptError:
                return True
            return False

        try:
            return render(turns)
        except PromptError as error:
            # The first message at which the template refuses: a longer history does not make it accept.
            length = bisect.bisect_left(range(1, len(turns)), True, key=refuses)
            raise PromptError(f"message {turns[length].index}: {guard.restore(str(error))}") from None

    def _place_media(self, rendered: str, media: Sequence[Media]) -> list[str | Media]:
        """The rendered conversation with the media in place of their items. Raises PromptError if they do not match."""
        found: list[tuple[int, int, str]] = []
        for match in self._items.finditer(rendered) if self._items is not None else ():
            assert match.lastindex is not None
            found.append((*match.span(), self._kinds[match.lastindex - 1]))
        if len(found) != len(media):
            what = "images" if all(medium.kind == "image" for medium in media) else "media"
            raise PromptError(f"the chat template wrote {len(found)} placeholders for {len(media)} attached {what}")
        if [kind for _, _, kind in found] != [medium.kind for medium in media]:
            raise PromptError("the chat template wrote the placeholders of media in another order than theirs")
        pieces: list[str | Media] = []
        end = 0
        for (start, stop, _), medium in zip(found, media, strict=True):
            pieces += [rendered[end:start], medium]
            end = stop
        return [*pieces, rendered[end:]]

    def _apply(self, messages: list[dict[str, Any]], variables: dict[str, Any] | None = None) -> str:
        assert self._template is not None
        return self._template.render(
            messages, bos_token=self._facts.begin, add_generation_prompt=True, **(variables or {})
        )

    def _place_system(self, turns: list[MessageTurn]) -> list[MessageTurn]:
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
        folded = MessageTurn(turns[0].index, "user", turns[0].parts)
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

    def _assemble(self, items: Sequence[str | Media], guard: _Guard) -> Prompt:
        """Strings in which text from outside is swapped, and media; strings that stand side by side are one."""
        ids: list[int] = []
        spans: list[Span] = []
        texts: list[str] = []

        def append(string: str) -> None:
            for piece in self._split(string):
                text = guard.restore(piece)
                texts.append(text)
                control = self._control.get(piece)
                ids.extend(self._encode(text) if control is None else [control])

        waiting, media_index = "", 0
        for item in items:
            if isinstance(item, str):
                waiting += item
                continue
            place = self._facts.placeholders[item.kind]
            for view, (lead, length) in enumerate(self._views(item)):
                append(waiting + lead + place.before)
                spans.append(Span(len(ids), length, media_index, view, item.kind))
                ids.extend([self._control[place.soft]] * length)
                texts.append(place.soft * length)
                waiting = place.after
            media_index += 1
        append(waiting)
        return Prompt(np.array(ids, dtype=np.int64), tuple(spans), "".join(texts))

    def _views(self, medium: Media) -> Iterator[tuple[str, int]]:
        """The text in front of each view of a medium, and the view's number of soft tokens."""
        if medium.frames:
            assert self._facts.video is not None
            for index, (time, length) in enumerate(medium.frames):
                yield (self._facts.video.between if index else "") + time, length
            return
        if not medium.crops:
            yield "", medium.soft_tokens
            return
        facts = self._pan_and_scan
        assert facts is not None
        yield facts.before_full, medium.soft_tokens
        for index, length in enumerate(medium.crops):
            yield facts.between_crops if index else facts.before_crops, length

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


class _Guard:
    """Swaps characters for private-use characters that occur in none of `texts`, one for one, and back.

    `mark` is a character that occurs nowhere else.
    """

    def __init__(self, characters: Sequence[str], texts: Sequence[str]):
        private = (chr(code) for first, last in _PRIVATE_USE for code in range(first, last + 1))
        free = (character for character in private if not any(character in text for text in texts))
        stand_ins = list(itertools.islice(free, len(characters) + 1))
        if len(stand_ins) < len(characters) + 1:
            raise PromptError("the text uses every private-use character of Unicode, none is left to mark it with")
        self.mark = stand_ins.pop()  # one more
        self._swap = str.maketrans(dict(zip(characters, stand_ins, strict=True)))
        self._restore = str.maketrans(dict(zip(stand_ins, characters, strict=True)))

    def swap(self, text: str) -> str:
        return text.translate(self._swap)

    def restore(self, text: str) -> str:
        return text.translate(self._restore)

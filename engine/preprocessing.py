"""From a conversation to a prompt: media are read and laid out, turns are rendered and tokenised.

Everything about a request that can be refused is refused here, before a graph runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from tokenizers import Tokenizer

from .audio import AudioSource, is_sound_source, open_sound
from .boxes import TEXT_TOKENS
from .bundle import Bundle
from .errors import BundleError, ContextFull, InputError, PromptError
from .known_files import NOTHING_KNOWN, KnownFiles
from .limits import Limits
from .manifest import Manifest
from .media import HeldPixels, PictureSource, interleaved, is_moving, part_name, read_media, read_video, readable_twice
from .parts import Audio, Conversation, Image, Pdf, Video, Words, turns_of
from .pictures import PreparedPicture, assign_spans, lay_out
from .prompt import Message, Prompt, PromptBuilder, Text, Thought, sole_turn
from .reply import EncodedImage, EncodedSound, EncodedVideo, StageClock
from .sounds import PreparedSound, longest_clip, prepare
from .sources import FileSource
from .template import ChatTemplate
from .text import load_tokenizer
from .thinking import control_tokens
from .tools import ToolCall, ToolLike, ToolResult, read_tools, strings

__all__ = [
    "Prepared",
    "Preprocessor",
    "PromptOptions",
    "ReadTurn",
    "bundle_tokenizer",
    "count_by_modality",
    "text_ids",
    "tower_identity",
]

_SOON_TOKENISED = 1_000_000  # characters: one to four seconds

Prepared = PreparedPicture | PreparedSound
ReadPart = Words | Prepared
ReadTurn = tuple[str, list[ReadPart]]
"""The role of a turn and its parts: a document as one picture for each page, a video as one with a view for each frame,
a long sound as several clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions:
    """How a conversation becomes a prompt; see `Engine.stream`."""

    raw: bool = False
    prompt_ids: Sequence[int] | None = None
    tools: Sequence[ToolLike] = ()
    thinking: bool = False


class Preprocessor:
    """Reads requests to one bundle.

    From here on `tokenizer` encodes spellings of control tokens as text, see `PromptBuilder`. Raises BundleError, and
    InputError for limits that are none.
    """

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, limits: Limits):
        if not isinstance(limits, Limits):
            raise InputError(f"limits is {type(limits).__name__}, expected Limits(max_pixels=..., ...)")
        self._manifest = bundle.manifest
        self._limits = limits
        self._tokenizer = tokenizer
        template = _load_template(bundle)
        crops = None if self._manifest.image is None else self._manifest.image.pan_and_scan
        self._prompts = PromptBuilder(tokenizer, self._manifest.prompt, template, crops, self._manifest.reply)
        self.has_roles = template is not None and self._manifest.prompt.layout == "inline"
        self._raw_only = template is None and self._manifest.prompt.layout == "inline"

    def read(
        self,
        conversation: Conversation,
        clock: StageClock,
        system: str | None = None,
        image_tokens: int | None = None,
        pan_and_scan: bool = False,
        known: KnownFiles = NOTHING_KNOWN,
    ) -> list[ReadTurn]:
        """The turns of a conversation with all media read. Raises InputError."""
        if pan_and_scan and (self._manifest.image is None or self._manifest.image.pan_and_scan is None):
            raise InputError("pan_and_scan: the model of this bundle does not see pictures in crops")
        turns: list[ReadTurn] = []
        attached, held = 0, HeldPixels(3 * self._limits.max_pixels)
        for role, parts in turns_of(conversation, system):
            read: list[ReadPart] = []
            for part in parts:
                if isinstance(part, Words):
                    read.append(part)
                    continue
                attached += 1
                read += self.read_media(part, clock, image_tokens, pan_and_scan, attached, known, held)
            turns.append((role, read))
        return turns

    def prompt(
        self, turns: Sequence[ReadTurn], options: PromptOptions, *, to_count: bool = False
    ) -> tuple[list[Prepared], Prompt]:
        """All media in their order, and the prompt. Raises PromptError, and ContextFull if it is not only to count."""
        tools = read_tools(options.tools)
        raw = options.raw or self._raw_only
        if (tools or options.thinking) and (raw or options.prompt_ids is not None):
            asked = "tools" if tools else "thinking"
            raise PromptError(f"{asked}: the prompt is not written by a chat template, as that would need")
        media = [part for _, parts in turns for part in parts if isinstance(part, Prepared)]
        messages = [
            Message(role, [part.medium if isinstance(part, Prepared) else part for part in parts])
            for role, parts in turns
        ]
        self._check_length(messages)
        if options.prompt_ids is not None:
            prompt = self._from_ids(options.prompt_ids, messages, media)
        elif raw:
            prompt = self._prompts.raw(sole_turn(messages))
        else:
            prompt = self._prompts.chat(messages, tools=tools, thinking=options.thinking)
        if not to_count and len(prompt.ids) > self._manifest.context:
            raise ContextFull(len(prompt.ids), self._manifest.context)
        return media, prompt

    def read_media(
        self,
        part: Image | Pdf | Video | Audio | EncodedImage | EncodedVideo | EncodedSound,
        clock: StageClock,
        image_tokens: int | None,
        pan_and_scan: bool = False,
        number: int = 1,
        known: KnownFiles = NOTHING_KNOWN,
        held: HeldPixels | None = None,
    ) -> list[Prepared]:
        """Read attachment `number`, counted from 1, and lay it out.

        It becomes one picture, or one for each page of a document; one clip, or several of a long sound; a video with
        its frames. What a file is, its content says: an `Image` that is a sound is heard, one that moves is a video.
        `image_tokens` and `pan_and_scan` are not for videos.
        """
        if isinstance(part, Image) and is_sound_source(part.source):
            if part.tokens is not None:
                raise InputError(f"audio {number}: a sound has no token budget, its length is what counts")
            part = Audio(cast(AudioSource, part.source))
        if isinstance(part, Audio | EncodedSound):
            return [*self._read_sound(part, clock, number, known)]
        if isinstance(part, Image) and is_moving(part.source):
            part = Video(cast(FileSource, part.source), tokens=part.tokens)
        if isinstance(part, Video):
            return self._read_video(part, clock, number)
        if self._manifest.image is None:
            raise PromptError(
                f"{'document' if isinstance(part, Pdf) else 'image'} {number}: this bundle has no vision input "
                f"(modalities: {', '.join(self._manifest.modalities)})"
            )
        if isinstance(part, EncodedImage | EncodedVideo):
            if part.bundle != tower_identity(self._manifest):
                raise InputError(f"{part.modality} {number} was encoded by another bundle")
            if pan_and_scan and isinstance(part, EncodedImage):
                raise InputError(f"image {number} is encoded already, it cannot be shown in crops (pan_and_scan)")
            return [PreparedPicture(encoded=part)]
        with clock.stage("decode_file"):
            sources = read_media(part, number, self._limits, known, held)
        budget = image_tokens if part.tokens is None else part.tokens
        return [lay_out(source, self._manifest.image, budget, pan_and_scan=pan_and_scan) for source in sources]

    def _read_video(self, part: Video, clock: StageClock, number: int) -> list[Prepared]:
        image, video = self._manifest.image, self._manifest.video
        if image is None or video is None:
            raise PromptError(
                f"video {number}: this bundle does not know videos (modalities: {', '.join(self._manifest.modalities)})"
            )
        with clock.stage("decode_file"):
            part = readable_twice(part, number, self._limits) if part.sound else part
            source = read_video(part, number, self._limits, video.fps)
        facts = dataclasses.replace(image, budgets=video.budgets, default_budget=video.default_budget)
        if not part.sound:
            return [lay_out(source, facts, part.tokens)]
        begin = part.start or 0.0
        heard = Audio(part.source, begin, part.end, split=True)
        clips = self._read_sound(heard, clock, number, NOTHING_KNOWN, self._limits.max_video_bytes)
        return [
            lay_out(medium, facts, part.tokens) if isinstance(medium, PictureSource) else medium
            for medium in interleaved(source, clips, begin)
        ]

    def _read_sound(
        self,
        part: Audio | EncodedSound,
        clock: StageClock,
        number: int,
        known: KnownFiles,
        max_bytes: int | None = None,
    ) -> Sequence[PreparedSound]:
        facts = self._manifest.audio
        if facts is None:
            raise PromptError(
                f"audio {number}: this bundle has no audio input (modalities: {', '.join(self._manifest.modalities)})"
            )
        if isinstance(part, EncodedSound):
            if part.bundle != tower_identity(self._manifest):
                raise InputError(f"audio {number} was encoded by another bundle")
            return [PreparedSound(encoded=part)]
        at_once = longest_clip(facts) / facts.sample_rate
        longest, why = float(self._limits.max_audio_length), "the limit for a sound"
        if not part.split:
            longest, why = at_once, "what the model hears at once: choose a part with start and end, or split it"
        with clock.stage("decode_file"):
            sound = open_sound(
                part.source,
                rate=facts.sample_rate,
                longest=longest,
                why=why,
                start=part.start,
                end=part.end,
                sample_rate=part.sample_rate,
                limits=self._limits,
                max_bytes=max_bytes,
                known=known,
                name=part_name("audio", number, part.source),
            )
            return prepare(sound, facts)

    def _check_length(self, messages: Sequence[Message]) -> None:
        """Refuse texts that cannot fit whatever their tokens are: those of 100 MB take minutes and gigabytes."""
        characters = sum(_characters(part) for message in messages for part in message.parts)
        if characters > _SOON_TOKENISED:
            longest = max(map(len, self._tokenizer.get_vocab()))
            if characters > longest * self._manifest.context:
                raise ContextFull(-(-characters // longest), self._manifest.context, at_least=True)

    def _from_ids(self, ids: Sequence[int], messages: list[Message], media: list[Prepared]) -> Prompt:
        for message in messages:
            for part in message.parts:
                if isinstance(part, Words) and part != Text(""):
                    what = "text" if isinstance(part, Text) else f"a {type(part).__name__}"
                    raise PromptError(f"a prompt given as ids cannot have {what} beside it")
        return assign_spans(self._prompts.from_ids(ids), media)


def _characters(part: object) -> int:
    """Characters of text in a part of a message, whatever a caller passed."""
    if isinstance(part, Text | Thought):
        return len(part.text) if isinstance(part.text, str) else 0
    value = part.arguments if isinstance(part, ToolCall) else part.result if isinstance(part, ToolResult) else None
    return sum(map(len, strings(value)))


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle, with the tokens that its replies make text and those that they keep from being text.

    Raises BundleError.
    """
    facts = bundle.manifest.reply
    return load_tokenizer(bundle.path("tokenizer"), TEXT_TOKENS.get(facts.boxes, ()), control_tokens(facts))


def tower_identity(manifest: Manifest) -> str:
    """What soft tokens depend on besides the medium: SHA-256 of the graphs that make them, and of the weights."""
    return "".join(manifest.files[name].sha256 for name in ("vision", "audio", "weights") if name in manifest.files)


def text_ids(prompt: Prompt, vocabulary: int) -> np.ndarray:
    """The tokens of a prompt without soft tokens, each once: int64 [m]."""
    is_text = np.ones(len(prompt.ids), np.bool_)
    for span in prompt.spans:
        is_text[span.start : span.start + span.length] = False
    ids = np.unique(prompt.ids[is_text])
    return ids[ids < vocabulary]


def count_by_modality(prompt: Prompt, media: Sequence[Prepared]) -> dict[str, int]:
    """Prompt tokens by modality; "document", "video" and "audio" are there only for prompts with one."""
    counts = {"text": len(prompt.ids), "image": 0}
    for span in prompt.spans:
        modality = media[span.media_index].modality
        counts[modality] = counts.get(modality, 0) + span.length
        counts["text"] -= span.length
    return counts


def _load_template(bundle: Bundle) -> ChatTemplate | None:
    if "chat_template" not in bundle.manifest.files:
        return None
    try:
        return ChatTemplate(bundle.path("chat_template").read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"the chat template is not UTF-8: {error}") from None

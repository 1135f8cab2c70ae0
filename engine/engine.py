"""The engine: a picture and a question go in, text comes out.

`Engine.stream` is the straight path: media -> prompt -> prefill -> sample, step, sample ... -> text and stops.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Generator, Sequence
from functools import partial
from threading import Lock

import numpy as np

from .boxes import TEXT_TOKENS, parse_boxes
from .bundle import Bundle
from .decoding import Decoding, check_positive, make_rules
from .errors import BundleError, ContextFull, InputError, PromptError
from .grammar import Constraints, Grammar
from .limits import DEFAULT_LIMITS, Limits
from .manifest import ImageFacts
from .media import read_media
from .parts import Conversation, Image, ImageInput, Pdf, turns_of
from .pictures import PreparedPicture, assign_spans, lay_out
from .prompt import Message, Part, Prompt, PromptBuilder, Text, sole_turn
from .reply import Candidate, Chunk, EncodedImage, Reply, StageClock, Usage, whole_reply
from .runtime import PREFILL_CHUNK, Runtime, Session, SoftTokens
from .sampling import Effective, Sampling
from .self_test import VerifyReport, replay
from .template import ChatTemplate
from .text import load_tokenizer, special_ids

__all__ = ["DEFAULT_MAX_TOKENS", "Engine"]

DEFAULT_MAX_TOKENS = 1024


class Engine:
    """A loaded bundle.

    Thread-safe: every request has its own state, and graph runs take turns. Use it as a context manager, or call
    `close`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "auto",
        threads: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ):
        """Load the graphs of `bundle`; `threads` defaults to the cores this process may use.

        `limits` bounds the pictures and documents of every request.

        Raises BundleError, DeviceError.
        """
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.limits = limits
        self._tokenizer = load_tokenizer(bundle.path("tokenizer"), TEXT_TOKENS.get(self.manifest.reply.boxes, ()))
        # Ids that are not text. Read once: a large tokenizer has thousands of added tokens.
        self._hidden = special_ids(self._tokenizer) | set(self.manifest.stop_ids)
        template = _load_template(bundle)
        crops = None if self.manifest.image is None else self.manifest.image.pan_and_scan
        self._prompts = PromptBuilder(self._tokenizer, self.manifest.prompt, template, crops)
        self._runtime: Runtime | None = Runtime(bundle, device=device, threads=threads)
        self._constraints = Constraints(
            self._tokenizer, self._runtime.vocabulary, self.manifest.stop_ids, self.manifest.reply.boxes
        )
        self._turn = Lock()
        self._raw_only = template is None and self.manifest.prompt.layout == "inline"

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] = "demo",
        *,
        device: str = "auto",
        threads: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Engine:
        """Open a bundle by path or by name; "demo" is the one that comes with siglance."""
        return cls(Bundle.open(bundle), device=device, threads=threads, limits=limits)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs. The engine cannot be used afterwards; a stream that is not at its end fails."""
        self._runtime = None

    @property
    def runtime(self) -> Runtime:
        self._require_open()
        assert self._runtime is not None
        return self._runtime

    def _require_open(self) -> None:
        if self._runtime is None:
            raise InputError("this engine is closed")

    # --- what callers use

    def stream(
        self,
        conversation: Conversation,
        *,
        system: str | None = None,
        image_tokens: int | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        stop_ids: Collection[int] = (),
        format: Grammar | None = None,
        candidates: int = 1,
        logprobs: int | None = None,
        raw: bool = False,
        prompt_ids: Sequence[int] | None = None,
        pan_and_scan: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> Generator[Chunk, None, None]:
        """Answer in chunks of text; joined they are the text of the reply, which the last chunk carries.

        Nothing runs before the first `next()`. Closing the generator cancels the work.

        Args:
            conversation: a part, a list of parts (one user turn) or a list of `Turn`. A part is text, a picture
                or a PDF; see `PartLike` for how a plain `str` is told apart.
            system: text of a system turn in front.
            image_tokens: token budget of every picture that has none of its own; None is the bundle's default.
            max_tokens: most tokens of the reply.
            sampling: fields that are None take the bundle's defaults.
            stop: strings that end the reply just before them, any number.
            stop_ids: tokens that end the reply, besides the bundle's own.
            format: the form of the reply. What is forced by it is not drawn and runs in one pass.
            candidates: how many replies, 1 to 128, after one run of the prompt. They are written one after the other;
                each has a seed of its own, and the first is the reply that a single candidate would be.
            logprobs: report the log-probability of each token, and of this many most probable ones at its place, 0 to
                20. With a format each forced token then takes a run of its own.
            raw: complete the text as it stands, without the chat template. Bundles of base models are always raw.
                There are no roles then: one user turn, and no system text.
            prompt_ids: the whole prompt as token ids; the conversation then holds pictures only, in the order of the
                runs of soft tokens.
            pan_and_scan: show long pictures in crops too, each with as many tokens as the whole picture. Only bundles
                whose manifest has facts for it can do that (Gemma 3).
            prefill_chunk: tokens of the prompt that run at once, more where tokens that see each other would be parted.

        Raises:
            InputError: a part, budget, sampling value, limit or format cannot be used (ImageError, DocumentError,
                PromptError, SamplingError, GrammarError), or the prompt does not fit (ContextFull). Nothing has run
                then; only damage inside a page shows when the page is drawn, and a grammar may become too expensive.
            ModelOutputError: the model gave something that cannot be decoded.
        """
        clock = StageClock()
        rules = make_rules(
            self.manifest,
            self.runtime.vocabulary,
            self._constraints.compile,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            stop_ids=stop_ids,
            format=format,
            candidates=candidates,
            logprobs=logprobs,
        )
        check_positive("prefill_chunk", prefill_chunk)
        pictures, prompt = self._prepare(conversation, system, image_tokens, raw, prompt_ids, pan_and_scan, clock)
        session = self.runtime.session()
        logits = self._prefill(session, prompt, pictures, prefill_chunk, clock)
        snapshot = session.snapshot() if candidates > 1 else None
        finished: list[Candidate] = []
        last = Chunk("")
        for index in range(candidates):
            if index:
                assert snapshot is not None
                yield last
                session = self.runtime.session()
                session.restore(snapshot)
            decoding = Decoding(
                rules,
                index,
                tokenizer=self._tokenizer,
                hidden_ids=self._hidden,
                penalised_ids=_without_media(prompt, self.runtime.vocabulary),
                context=self.manifest.context,
                clock=clock,
            )
            candidate, last = yield from decoding.run(
                logits,
                session.length,
                partial(self._extend, session, prefill_chunk),
                lambda text: parse_boxes(text, self.manifest.reply.boxes, [picture.size for picture in pictures]),
            )
            finished.append(candidate)
        yield dataclasses.replace(last, reply=self._reply(finished, prompt, pictures, rules.effective, clock))

    generate = whole_reply(stream)

    def encode(self, image: ImageInput, *, image_tokens: int | None = None) -> EncodedImage:
        """Run the vision tower once, to ask many questions about one picture: the whole of it, never crops."""
        [(_, [part])] = turns_of([image], None)
        if isinstance(part, Text):
            raise InputError("encode takes a picture, not text")
        pictures = self._read(part, image_tokens, False, 1, StageClock())
        if len(pictures) > 1:
            raise InputError(f"encode takes one picture, not a document of {len(pictures)} pages: choose one with Pdf")
        return self._encode(pictures[0], StageClock())

    def count_tokens(
        self,
        conversation: Conversation,
        *,
        system: str | None = None,
        image_tokens: int | None = None,
        raw: bool = False,
        pan_and_scan: bool = False,
    ) -> dict[str, int]:
        """Prompt tokens by modality and in "total", without running a graph."""
        pictures, prompt = self._prepare(conversation, system, image_tokens, raw, None, pan_and_scan, StageClock())
        return {"total": len(prompt.ids), **_by_modality(prompt, pictures)}

    def prompt_logits(
        self,
        conversation: Conversation,
        *,
        system: str | None = None,
        image_tokens: int | None = None,
        raw: bool = False,
        prompt_ids: Sequence[int] | None = None,
        pan_and_scan: bool = False,
    ) -> np.ndarray:
        """Logits of every row of the prompt, float32 [prompt tokens, vocabulary]."""
        clock = StageClock()
        pictures, prompt = self._prepare(conversation, system, image_tokens, raw, prompt_ids, pan_and_scan, clock)
        soft = self._soft_tokens(prompt, pictures, clock)
        with self._turn:
            return self.runtime.session().prompt_logits(prompt.ids, soft)

    def verify(self) -> VerifyReport:
        """Replay the bundle's self-test on this engine's device."""
        with self._turn:
            return replay(self.bundle, self.runtime)

    # --- the path

    def _prepare(
        self,
        conversation: Conversation,
        system: str | None,
        image_tokens: int | None,
        raw: bool,
        prompt_ids: Sequence[int] | None,
        pan_and_scan: bool,
        clock: StageClock,
    ) -> tuple[list[PreparedPicture], Prompt]:
        """Read all media and lay out the prompt; everything that can be refused is refused here."""
        if pan_and_scan and (self.manifest.image is None or self.manifest.image.pan_and_scan is None):
            raise InputError("pan_and_scan: the model of this bundle does not see pictures in crops")
        pictures: list[PreparedPicture] = []
        messages = []
        attached = 0
        for role, parts in turns_of(conversation, system):
            built: list[Part] = []
            for part in parts:
                if isinstance(part, Text):
                    built.append(part)
                    continue
                attached += 1
                read = self._read(part, image_tokens, pan_and_scan, attached, clock)
                pictures += read
                built += [picture.medium for picture in read]
            messages.append(Message(role, built))
        if prompt_ids is not None:
            prompt = self._from_ids(prompt_ids, messages, pictures)
        elif raw or self._raw_only:
            prompt = self._prompts.raw(sole_turn(messages))
        else:
            prompt = self._prompts.chat(messages)
        if len(prompt.ids) > self.manifest.context:
            raise ContextFull(len(prompt.ids), self.manifest.context)
        return pictures, prompt

    def _from_ids(self, ids: Sequence[int], messages: list[Message], pictures: list[PreparedPicture]) -> Prompt:
        texts = [part.text for message in messages for part in message.parts if isinstance(part, Text)]
        if any(texts):
            raise PromptError("a prompt given as ids cannot have text beside it")
        return assign_spans(self._prompts.from_ids(ids), pictures)

    def _read(
        self,
        part: Image | Pdf | EncodedImage,
        image_tokens: int | None,
        pan_and_scan: bool,
        number: int,
        clock: StageClock,
    ) -> list[PreparedPicture]:
        """Read attachment `number`, counted from 1, and lay it out: one picture, or one for each page of a document."""
        facts = self._image_facts(f"{'document' if isinstance(part, Pdf) else 'image'} {number}")
        if isinstance(part, EncodedImage):
            if part.bundle != self._identity:
                raise InputError(f"image {number} was encoded by another bundle")
            if pan_and_scan:
                raise InputError(f"image {number} is encoded already, it cannot be shown in crops (pan_and_scan)")
            return [PreparedPicture(encoded=part)]
        with clock.stage("decode_file"):
            sources = read_media(part, number, self.limits)
        budget = image_tokens if part.tokens is None else part.tokens
        return [lay_out(source, facts, budget, pan_and_scan=pan_and_scan) for source in sources]

    def _encode(self, picture: PreparedPicture, clock: StageClock, view: int = 0) -> EncodedImage:
        if picture.encoded is not None:
            return picture.encoded
        with clock.stage("decode_file"):  # a page of a document is drawn now
            pixels = picture.pixels(view)
        with clock.stage("resize"):
            patches = picture.patches(view, pixels, self._image_facts("image"))
        with clock.stage("vision"), self._turn:
            values = self.runtime.encode(patches.values, patches.positions, picture.soft_tokens[view])
        return EncodedImage(values, picture.size, self._identity, picture.modality)

    def _soft_tokens(self, prompt: Prompt, pictures: list[PreparedPicture], clock: StageClock) -> list[SoftTokens]:
        encoded = (self._encode(pictures[span.media_index], clock, span.view) for span in prompt.spans)
        return [SoftTokens(span.start, image.soft_tokens) for span, image in zip(prompt.spans, encoded, strict=True)]

    def _prefill(
        self, session: Session, prompt: Prompt, pictures: list[PreparedPicture], chunk: int, clock: StageClock
    ) -> np.ndarray:
        soft = self._soft_tokens(prompt, pictures, clock)
        with clock.stage("prefill"), self._turn:
            return session.prefill(prompt.ids, soft, chunk=chunk)

    def _extend(self, session: Session, chunk: int, tokens: Sequence[int]) -> np.ndarray:
        """Run tokens of a reply, at most `chunk` at once; returns the logits that follow them."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(tokens), chunk):
            with self._turn:
                self._require_open()
                logits = session.extend(tokens[start : start + chunk])
        return logits

    def _reply(
        self,
        candidates: list[Candidate],
        prompt: Prompt,
        pictures: list[PreparedPicture],
        effective: Effective,
        clock: StageClock,
    ) -> Reply:
        return Reply(
            candidates=tuple(candidates),
            prompt_token_ids=tuple(prompt.ids.tolist()),
            usage=Usage(
                prompt_tokens=len(prompt.ids),
                completion_tokens=sum(len(candidate.token_ids) for candidate in candidates),
                forced_tokens=sum(candidate.forced_tokens for candidate in candidates),
                by_modality=_by_modality(prompt, pictures),
            ),
            timings=clock.timings(),
            sampling=effective,
            device=str(self.runtime.device),
            providers=self.runtime.providers,
        )

    @property
    def _identity(self) -> str:
        """What soft tokens depend on."""
        return "".join(
            self.manifest.files[name].sha256 for name in ("vision", "weights") if name in self.manifest.files
        )

    def _image_facts(self, name: str) -> ImageFacts:
        if self.manifest.image is None:
            raise PromptError(
                f"{name}: this bundle has no vision input (modalities: {', '.join(self.manifest.modalities)})"
            )
        return self.manifest.image


def _without_media(prompt: Prompt, vocabulary: int) -> np.ndarray:
    """The tokens of a prompt without soft tokens, each once: int64 [m]."""
    is_text = np.ones(len(prompt.ids), np.bool_)
    for span in prompt.spans:
        is_text[span.start : span.start + span.length] = False
    ids = np.unique(prompt.ids[is_text])
    return ids[ids < vocabulary]


def _by_modality(prompt: Prompt, pictures: list[PreparedPicture]) -> dict[str, int]:
    """Prompt tokens by modality; "document" is there only for prompts with one."""
    counts = {"text": len(prompt.ids), "image": 0}
    for span in prompt.spans:
        modality = pictures[span.media_index].modality
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

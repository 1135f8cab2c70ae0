"""The engine: a picture and a question go in, text comes out.

`Engine.stream` is the straight path: media -> prompt -> prefill -> sample, step, sample ... -> text and stops.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Generator, Sequence
from functools import partial
from typing import overload

import numpy as np

from . import heap
from .boxes import parse_boxes
from .bundle import Bundle
from .calls import ToolChoice
from .chat import Chat
from .decoding import Decoding, Rules, check_positive, make_reply, make_rules
from .encoder_inputs import EncoderInput, PreparedPrompt, prepare_prompt
from .encoding import encode_source, encode_view
from .errors import InputError
from .grammar import Constraints, Grammar
from .limits import DEFAULT_LIMITS, Limits
from .parts import AudioInput, Conversation, ImageInput
from .prefill_plan import PrefillPlan, find_boundaries
from .preprocessing import Preprocessor, PromptOptions, ReadTurn, bundle_tokenizer, count_by_modality, text_ids
from .processes import GraphTurn, OwnProcess
from .reply import Candidate, Chunk, EncodedImage, EncodedSound, StageClock, whole_reply
from .reuse import CACHE_BYTES, FEATURE_CACHE_BYTES, FEATURE_FOLDER_BYTES, Reuse
from .runtime import PREFILL_CHUNK, Runtime, Session, SoftTokens
from .sampling import Sampling
from .self_test import VerifyReport, replay
from .text import special_ids
from .thinking import Markers
from .tools import ToolLike

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
        cache_bytes: int = CACHE_BYTES,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        feature_cache_dir: str | os.PathLike[str] | None = None,
        feature_cache_dir_bytes: int = FEATURE_FOLDER_BYTES,
    ):
        """Load the graphs of a bundle.

        Args:
            bundle: an opened bundle.
            device: "auto" (what the bundle was exported for), "cpu", "cuda" or "cuda:N".
            threads: None is as many as the cores this process may use.
            limits: bounds of the pictures, documents, videos and sounds of every request.
            cache_bytes: memory for the decoder states of earlier requests, from which later ones with the same
                beginning continue; 0 keeps none. Bundles whose prompts attend in both directions ("attention:prefix")
                never keep any.
            feature_cache_bytes: memory for the soft tokens of pictures and sounds seen before; 0 keeps none.
            feature_cache_dir: a folder that keeps soft tokens beyond the end of the process, None for none.
            feature_cache_dir_bytes: how large that folder may grow.

        Raises BundleError, DeviceError or InputError.
        """
        self._process = OwnProcess()  # the first attribute, so that pickling meets it first
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.limits = limits
        facts = self.manifest.reply
        self._tokenizer = bundle_tokenizer(bundle)
        heap.give_back()
        self._markers = Markers.read(self._tokenizer, facts)
        # Ids that are not text. Read once: a large tokenizer has thousands of added tokens.
        self._hidden = special_ids(self._tokenizer) | set(self.manifest.stop_ids)
        self._preprocessor = Preprocessor(bundle, self._tokenizer, limits)
        self._reuse = Reuse.open(
            self.manifest,
            cache_bytes=cache_bytes,
            feature_cache_bytes=feature_cache_bytes,
            feature_cache_dir=feature_cache_dir,
            feature_cache_dir_bytes=feature_cache_dir_bytes,
        )
        self.features = self._reuse.features  # soft tokens of pictures seen before, and how often that helped
        self._runtime: Runtime | None = Runtime(bundle, device=device, threads=threads)
        self._constraints = Constraints(self._tokenizer, self._runtime.vocabulary, self.manifest.stop_ids, facts.boxes)
        self._turn = GraphTurn()

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] = "demo",
        *,
        device: str = "auto",
        threads: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
        cache_bytes: int = CACHE_BYTES,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        feature_cache_dir: str | os.PathLike[str] | None = None,
        feature_cache_dir_bytes: int = FEATURE_FOLDER_BYTES,
    ) -> Engine:
        """Open a bundle by path or by name; "demo" is the one that comes with siglance. See `Engine` for the rest."""
        return cls(
            Bundle.open(bundle),
            device=device,
            threads=threads,
            limits=limits,
            cache_bytes=cache_bytes,
            feature_cache_bytes=feature_cache_bytes,
            feature_cache_dir=feature_cache_dir,
            feature_cache_dir_bytes=feature_cache_dir_bytes,
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs and caches. The engine cannot be used afterwards, and unfinished streams fail."""
        self._runtime = None
        self._reuse.clear()

    @property
    def runtime(self) -> Runtime:
        self._process.check()
        if self._runtime is None:
            raise InputError("this engine is closed")
        return self._runtime

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
        tools: Sequence[ToolLike] = (),
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        thinking: bool = False,
        raw: bool = False,
        prompt_ids: Sequence[int] | None = None,
        pan_and_scan: bool = False,
        prefill_chunk: int = PREFILL_CHUNK,
        cache: bool = True,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generator[Chunk, None, None]:
        """Answer in chunks. Their texts, joined, are the text of the reply; the last chunk carries the whole reply.

        Nothing runs before the first `next()`. Closing the generator cancels the work; `cancelled` does so within one.

        Args:
            conversation: a part, a list of parts (one user turn) or a list of `Turn`. A part is text, a picture, a
                sound, a PDF or a video; see `PartLike` for how a plain `str` is told apart.
            system: text of a system turn in front of the conversation.
            image_tokens: soft tokens of every picture that has no budget of its own; None is the bundle's default.
                Frames of videos have a budget of their own, see `Video`.
            max_tokens: greatest number of tokens in the reply, thoughts and calls included.
            sampling: fields that are None take the bundle's defaults.
            stop: strings that end the answer; they are not part of it. They do not apply to thoughts and calls.
            stop_ids: token ids that end the answer, besides the bundle's own.
            format: the grammar of the answer. Tokens that it forces are not sampled, and run in one pass.
            candidates: number of replies, 1 to 128; the prompt runs once. They are generated one after another, each
                with its own seed; the first is the reply that a request for one would get.
            logprobs: report the log-probability of each token, and of this many most probable tokens at its position,
                0 to 20. With a `format` each forced token then takes a run of its own.
            tools: functions that the model may call, as `Tool` or as declarations of OpenAI's API. Its calls are in
                `Reply.tool_calls`; continue with `[*conversation, Turn.of(reply), Turn("tool", [ToolResult(...)])]`.
                With a `format` a reply either has that form or consists of calls.
            tool_choice: whether the model may or must call, and which tools: see `ToolChoice`.
            parallel_tool_calls: whether a reply may make several calls; otherwise it ends with the first.
            thinking: let the model think before it answers; the thought is separate from the text. Bundles whose model
                or chat template does not support tools or thinking refuse them.
            raw: complete the text as it stands, without the chat template. Bundles of base models are always raw.
                There are no roles then: one user turn and no system text.
            prompt_ids: the whole prompt as token ids; the conversation then holds media only, in the order of the runs
                of soft tokens.
            pan_and_scan: show long pictures in crops too, each with as many tokens as the whole picture. Only for
                models that were trained with it (Gemma 3).
            prefill_chunk: prompt tokens that run at once; more where tokens that attend to each other would be split.
            cache: continue from states of earlier requests, and keep states for later ones. The reply is the same with
                and without it up to rounding; where bit-for-bit repetition matters, switch it off.
            cancelled: called before each file, graph run and chunk of the prompt; returns whether to stop there.

        Raises:
            InputError: a part, budget, sampling value, limit or format cannot be used (ImageError, DocumentError,
                VideoError, AudioError, PromptError, SamplingError, GrammarError), or the prompt does not fit the
                context (ContextFull). No graph has run then, except where damage shows when a page or frame is
                decoded, or a grammar becomes too expensive.
            ModelOutputError: the model produced something that cannot be decoded, such as non-finite logits.
            Cancelled: `cancelled` returned true.
        """
        clock = StageClock(cancelled=cancelled)
        rules = make_rules(
            self.manifest,
            self.runtime.vocabulary,
            self._constraints,
            self._markers,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            stop_ids=stop_ids,
            format=format,
            candidates=candidates,
            logprobs=logprobs,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            thinking=thinking,
        )
        check_positive("prefill_chunk", prefill_chunk)
        reuse = self._reuse if cache else self._reuse.off()
        turns = self._preprocessor.read(conversation, clock, system, image_tokens, pan_and_scan, reuse.files)
        options = PromptOptions(raw=raw, prompt_ids=prompt_ids, tools=rules.calls.tools, thinking=thinking)
        prepared = self._prepare(turns, clock, reuse, options)
        yield from self._answer(prepared, rules, clock, reuse, prefill_chunk)

    generate = whole_reply(stream)

    def chat(
        self,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        image_tokens: int | None = None,
        tools: Sequence[ToolLike] = (),
        tool_choice: ToolChoice = "auto",
        thinking: bool = False,
        cache: bool = True,
    ) -> Chat:
        """A conversation that remembers its turns. The options, those of `stream`, hold for every turn.

        Raises PromptError for a bundle without a chat template.
        """
        return Chat(
            self,
            system=system,
            sampling=sampling,
            max_tokens=max_tokens,
            image_tokens=image_tokens,
            tools=tools,
            tool_choice=tool_choice,
            thinking=thinking,
            cache=cache,
        )

    @overload
    def encode(self, source: ImageInput, *, image_tokens: int | None = None) -> EncodedImage: ...
    @overload
    def encode(self, source: AudioInput) -> EncodedSound: ...

    def encode(
        self, source: ImageInput | AudioInput, *, image_tokens: int | None = None
    ) -> EncodedImage | EncodedSound:
        """Soft tokens float32 [n, D] of one picture (never crops) or `Audio`: pass them in place of it, and again.

        Raises InputError for text, a video, or several pages or clips, and like `stream` for what cannot be read.
        """
        return encode_source(self, source, image_tokens)

    def count_tokens(
        self,
        conversation: Conversation,
        *,
        system: str | None = None,
        image_tokens: int | None = None,
        tools: Sequence[ToolLike] = (),
        thinking: bool = False,
        raw: bool = False,
        pan_and_scan: bool = False,
    ) -> dict[str, int]:
        """Prompt tokens by modality and in "total", even if they are too many; no graph runs. Raises InputError."""
        files = self._reuse.files
        turns = self._preprocessor.read(conversation, StageClock(), system, image_tokens, pan_and_scan, files)
        options = PromptOptions(raw=raw, tools=tools, thinking=thinking)
        media, prompt = self._preprocessor.prompt(turns, options, to_count=True)
        return {"total": len(prompt.ids), **count_by_modality(prompt, media)}

    def prompt_logits(
        self,
        conversation: Conversation,
        *,
        system: str | None = None,
        image_tokens: int | None = None,
        tools: Sequence[ToolLike] = (),
        thinking: bool = False,
        raw: bool = False,
        prompt_ids: Sequence[int] | None = None,
        pan_and_scan: bool = False,
    ) -> np.ndarray:
        """Logits of every row of the prompt, float32 [prompt tokens, vocabulary]. Raises like `stream`."""
        clock = StageClock()
        turns = self._preprocessor.read(conversation, clock, system, image_tokens, pan_and_scan, self._reuse.files)
        options = PromptOptions(raw=raw, prompt_ids=prompt_ids, tools=tools, thinking=thinking)
        prepared = self._prepare(turns, clock, self._reuse, options)
        soft = self._soft_tokens(prepared, clock, self._reuse)
        with self._turn:
            return self.runtime.session().prompt_logits(prepared.prompt.ids, soft)

    def verify(self) -> VerifyReport:
        """Replay the bundle's self-test on this engine's device. Raises BundleError if there is none to replay."""
        with self._turn:
            return replay(self.bundle, self.runtime)

    def _prepare(
        self, turns: list[ReadTurn], clock: StageClock, reuse: Reuse, options: PromptOptions
    ) -> PreparedPrompt:
        """Lay out the prompt, then look at its pictures: nothing is drawn or resized for a prompt that is refused."""
        media, prompt = self._preprocessor.prompt(turns, options)
        return prepare_prompt(prompt, media, self.manifest.image, clock, reuse.files)

    def _answer(
        self, prepared: PreparedPrompt, rules: Rules, clock: StageClock, reuse: Reuse, chunk: int = PREFILL_CHUNK
    ) -> Generator[Chunk, None, None]:
        """Answer a prompt, of which at most `chunk` tokens run at once."""
        session = self.runtime.session()
        boundaries = find_boundaries(prepared.prompt.ids, prepared.soft_runs, self._hidden, self.manifest.stop_ids)
        plan = reuse.plan(session, prepared, boundaries, chunk)
        with clock.stage("prefill"):
            logits = reuse.restore(session, plan)
            cached = session.length
        if logits is None:
            logits = self._prefill(session, prepared, plan, clock, reuse, chunk)
        snapshot = session.snapshot() if rules.candidates > 1 else None
        sizes = [picture.size for picture in prepared.pictures]
        finished: list[Candidate] = []
        last = Chunk("")
        for index in range(rules.candidates):
            if index:
                assert snapshot is not None
                yield last
                session = self.runtime.session()
                session.restore(snapshot)
            decoding = Decoding(
                rules,
                index,
                tokenizer=self._tokenizer,
                markers=self._markers,
                hidden_ids=self._hidden,
                prompt_ids=prepared.prompt.ids,
                penalised_ids=text_ids(prepared.prompt, self.runtime.vocabulary),
                context=self.manifest.context,
                clock=clock,
            )
            candidate, last = yield from decoding.run(
                logits,
                session.length,
                partial(self._extend, session, chunk, clock),
                lambda text: parse_boxes(text, self.manifest.reply.boxes, sizes),
            )
            if not index:
                reuse.keep_reply(session, plan, candidate.token_ids)
            finished.append(candidate)
        whole = make_reply(finished, prepared, rules, clock, cached, self.runtime)
        yield dataclasses.replace(last, reply=whole)

    def _encode(self, view: EncoderInput, clock: StageClock, reuse: Reuse) -> np.ndarray:
        """Soft tokens of a view or clip, float32 [length, D]."""
        return encode_view(self.runtime, self._turn, view, clock, reuse)

    def _soft_tokens(self, prepared: PreparedPrompt, clock: StageClock, reuse: Reuse, row: int = 0) -> list[SoftTokens]:
        """The soft tokens that the prompt from `row` on needs."""
        spans = zip(prepared.prompt.spans, prepared.views, strict=True)
        wanted = [(span, view) for span, view in spans if span.start + span.length > row]
        return [
            SoftTokens(span.start, self._encode(view, clock, reuse), seen=span.kind != "audio") for span, view in wanted
        ]

    def _prefill(
        self, session: Session, prepared: PreparedPrompt, plan: PrefillPlan, clock: StageClock, reuse: Reuse, chunk: int
    ) -> np.ndarray:
        """Bring the session, which may hold a beginning of the prompt, to its end; returns the logits there."""
        soft = self._soft_tokens(prepared, clock, reuse, session.length)
        logits = np.empty(0, np.float32)
        for stop in plan.stops:
            if stop > session.length:
                with clock.stage("prefill"):
                    runs = session.prefill_chunks(prepared.prompt.ids[:stop], soft, chunk=chunk, first=session.length)
                    while session.length < stop:
                        logits = self._run(partial(next, runs), clock)
                    reuse.keep(session, plan, logits)
        return logits

    def _extend(self, session: Session, chunk: int, clock: StageClock, tokens: Sequence[int]) -> np.ndarray:
        """Run tokens of a reply, at most `chunk` at once; returns the logits that follow them."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(tokens), chunk):
            logits = self._run(partial(session.extend, tokens[start : start + chunk]), clock)
        return logits

    def _run(self, run: Callable[[], np.ndarray], clock: StageClock) -> np.ndarray:
        """Run the decoder when it is free, unless the request is not wanted any more."""
        with self._turn:
            _ = self.runtime  # raises once the engine is closed
            clock.check()
            return run()

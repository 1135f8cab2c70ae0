"""One bundle under measurement: fresh prompts and pictures, and what a round of them takes.

Nothing is found in a cache: the caches are off, and every round has ids and pixels of its own. A reply has as many
tokens as asked for, because the bundle's stop ids are taken away.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .. import heap
from ..bundle import Bundle
from ..engine import Engine
from ..errors import InputError
from ..image_policy import POLICIES
from ..parts import Audio, PartLike
from ..perplexity import text_ids
from ..prompt import Text
from ..reply import Timings
from ..runtime import PREFILL_CHUNK, Runtime
from ..sampling import Sampling
from ..self_test import formula_picture, formula_sound

from ...kernels.patches import Patches  # isort: skip

__all__ = ["Options", "Request", "Round", "Subject"]

PICTURE = (1080, 1920)  # height and width of the picture of a request, a JPEG file
_SOUND_SECONDS = 5
_WARM_UP_TOKENS = 8
# Ids are drawn from the tokens of this text: common words, nothing special.
_WORDS = (
    "The quick brown fox jumps over the lazy dog while seven wizards quietly mix a large pot of soup for people who "
    "came from the next town to see what was there, and when it was ready they sat down at one long table to eat. "
    "Blue red green small square circle two three four left right above below near far word number name street door."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured: `prompt_tokens` of text, then `new_tokens` steps; pictures of at most `image_tokens`."""

    prompt_tokens: int = 512
    image_tokens: int | None = None
    new_tokens: int = 128
    repeats: int = 5
    threads: int | None = None
    device: str = "auto"

    def __post_init__(self):
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}, it must be at least 1")


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one round: the prompt, each step behind it, and the vision graph on one picture (None without)."""

    prefill: float
    steps: tuple[float, ...]
    vision: float | None


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request, as users make it: milliseconds by stage, and how many tokens its prompt had."""

    timings: Timings
    prompt_tokens: int


class Subject:
    """A loaded bundle. `seed` makes what it is asked different from what others are asked."""

    def __init__(
        self, bundle: Bundle, options: Options, *, seed: int = 0, clock: Callable[[], float] = time.perf_counter
    ):
        facts = bundle.manifest
        if options.prompt_tokens + options.new_tokens > facts.context:
            raise InputError(
                f"{options.prompt_tokens} prompt tokens and {options.new_tokens} new ones are more than the context of "
                f"{facts.name} holds, {facts.context}"
            )
        if options.image_tokens is not None and facts.image is None:
            raise InputError(f"{facts.name} does not see, so --image-tokens {options.image_tokens} means nothing to it")
        self.bundle = bundle
        self.options = options
        self._clock = clock
        self._generator = np.random.default_rng(seed)
        words = text_ids(bundle, _WORDS)
        self._first, self._words = words[:1], words[1:]
        heap.give_back()  # of another tokenizer than the engine's
        endless = Bundle(bundle.folder, dataclasses.replace(facts, stop_ids=()))
        begin = clock()
        self._engine = Engine(
            endless, device=options.device, threads=options.threads, cache_bytes=0, feature_cache_bytes=0
        )
        self.load_seconds = clock() - begin
        self.soft_tokens = self.patches = 0  # of the picture of a round
        if facts.image is not None:
            layout = POLICIES[facts.image.policy].layout(*PICTURE, facts.image, options.image_tokens)
            self.soft_tokens = layout.soft_tokens
            self.patches = layout.soft_tokens * facts.image.pool_size**2
        self.device, self.providers = self.runtime.device.kind, self.runtime.providers
        self._layout: list[int] | None = None

    @property
    def runtime(self) -> Runtime:
        return self._engine.runtime

    def close(self) -> None:
        self._engine.close()

    def warm_up(self) -> None:
        """Everything once: memory is touched, threads are awake, kernels have chosen their ways."""
        self._measure(min(self.options.new_tokens, _WARM_UP_TOKENS))
        self.request(_WARM_UP_TOKENS)

    def round(self) -> Round:
        """Measure once."""
        return self._measure(self.options.new_tokens)

    def request(self, new_tokens: int | None = None) -> Request:
        """One request, as users make it; see `prepare`."""
        return self.ask(*self.prepare(), new_tokens)

    def prepare(self) -> tuple[Sequence[PartLike], list[int]]:
        """Media and ids of a fresh prompt: a picture and a sound, if the bundle takes them, and text.

        It has as many tokens as asked for, or more where media and template need more.
        """
        if self._layout is None:
            first = self._engine.generate(
                [*self._media(), Text("x")], max_tokens=1, cache=False, image_tokens=self.options.image_tokens
            )
            self._layout = list(first.prompt_token_ids)
        missing = max(self.options.prompt_tokens - len(self._layout), 0)
        return self._media(), [*self._layout[:-1], *self._draw(missing).tolist(), self._layout[-1]]

    def ask(self, media: Sequence[PartLike], ids: list[int], new_tokens: int | None = None) -> Request:
        """Answer a prepared prompt with the bundle's own sampling, text and stops."""
        reply = self._engine.generate(
            media,
            prompt_ids=ids,
            max_tokens=self.options.new_tokens if new_tokens is None else new_tokens,
            sampling=Sampling(seed=0),
            cache=False,
            image_tokens=self.options.image_tokens,
        )
        return Request(reply.timings, len(ids))

    def ids(self) -> np.ndarray:
        """A fresh prompt of text, int64 [prompt tokens]."""
        return np.concatenate([self._first, self._draw(self.options.prompt_tokens - 1)])

    def _measure(self, new_tokens: int) -> Round:
        clock, session = self._clock, self.runtime.session()
        ids = self.ids()
        begin = clock()
        logits = session.prefill(ids, chunk=PREFILL_CHUNK)
        prefill = clock() - begin
        steps = []
        for _ in range(new_tokens):
            begin = clock()
            logits = session.step(int(np.argmax(logits)))
            steps.append(clock() - begin)
        return Round(prefill, tuple(steps), self._measure_vision())

    def _measure_vision(self) -> float | None:
        facts = self.bundle.manifest.image
        if facts is None:
            return None
        patches = self._patches()
        begin = self._clock()
        self.runtime.encode(patches.values, patches.positions, self.soft_tokens)
        return self._clock() - begin

    def _patches(self) -> Patches:
        facts = self.bundle.manifest.image
        assert facts is not None
        return POLICIES[facts.policy].prepare(self._pixels(), facts, self.options.image_tokens)

    def _pixels(self) -> np.ndarray:
        """A picture that was never seen before, uint8 [H, W, 3]."""
        shift = self._generator.integers(1, 255, 3, np.uint8)
        return formula_picture(*PICTURE) + shift

    def _media(self) -> Sequence[PartLike]:
        media: list[PartLike] = []
        if self.bundle.manifest.image is not None:
            file = io.BytesIO()
            Image.fromarray(self._pixels()).save(file, "JPEG", quality=90)
            media.append(file.getvalue())
        heard = self.bundle.manifest.audio
        if heard is not None:
            longest = heard.max_tokens * heard.frames_per_token * heard.frame_step
            samples = formula_sound(min(_SOUND_SECONDS * heard.sample_rate, longest))
            samples += self._generator.uniform(-1e-3, 1e-3, samples.size).astype(np.float32)
            media.append(Audio(samples, sample_rate=heard.sample_rate))
        return media

    def _draw(self, count: int) -> np.ndarray:
        return self._generator.choice(self._words, count).astype(np.int64)

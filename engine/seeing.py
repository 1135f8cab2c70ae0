"""A prompt with its media as the towers are given them, and what the towers say about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..kernels.patches import Patches
from .feature_cache import content_key
from .known_files import NOTHING_KNOWN, KnownFiles
from .manifest import ImageFacts
from .pictures import PreparedPicture
from .prefix_cache import SoftRows, row_keys
from .prompt import Prompt, Span
from .reply import EncodedVideo, StageClock
from .sounds import PreparedSound

__all__ = ["SeenPrompt", "SeenView", "hear", "see", "see_all"]


@dataclass(slots=True, eq=False)
class SeenView:
    """A view as the vision tower is given it, or a clip as the audio graph is; `soft_tokens` float32 [length, D] once
    they are known.

    `content` is the key of what is seen or heard: equal for equal patches or samples, whatever file they came from.
    `look` or `listen` gives them.
    """

    length: int
    content: bytes
    look: Callable[[], Patches] | None = None
    listen: Callable[[], npt.NDArray[np.float32]] | None = None
    soft_tokens: np.ndarray | None = None

    def resolve(self, soft_tokens: np.ndarray) -> np.ndarray:
        """Remember the answer; what was given is not needed any more."""
        self.soft_tokens, self.look, self.listen = soft_tokens, None, None
        return soft_tokens


@dataclass(frozen=True, slots=True, eq=False)
class SeenPrompt:
    """A prompt, its media, and the view of each of its spans."""

    prompt: Prompt
    media: Sequence[PreparedPicture | PreparedSound]
    views: Sequence[SeenView]

    @property
    def pictures(self) -> list[PreparedPicture]:
        """The media that can be seen."""
        return [medium for medium in self.media if isinstance(medium, PreparedPicture)]

    @property
    def soft_runs(self) -> list[tuple[int, int]]:
        """First row and end of each longest run of soft tokens."""
        return _runs(self.prompt.spans)

    @property
    def seen_runs(self) -> list[tuple[int, int]]:
        """Those of soft tokens of pictures, which may see each other."""
        return _runs([span for span in self.prompt.spans if span.kind != "audio"])

    def row_keys(self) -> np.ndarray:
        """What the rows are known by in the cache: int64 [L]."""
        spans = zip(self.prompt.spans, self.views, strict=True)
        return row_keys(self.prompt.ids, [SoftRows(span.start, span.length, view.content) for span, view in spans])


def _runs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for span in spans:
        first = runs.pop()[0] if runs and runs[-1][1] == span.start else span.start
        runs.append((first, span.start + span.length))
    return runs


def see(
    picture: PreparedPicture, view: int, facts: ImageFacts | None, clock: StageClock, known: KnownFiles = NOTHING_KNOWN
) -> SeenView:
    """Draw a page or decode a frame, resize and cut into patches: at once, or when asked for if the file is known.

    What is encoded already is its soft tokens.
    """
    if picture.encoded is not None:
        encoded = picture.encoded.frames[view] if isinstance(picture.encoded, EncodedVideo) else picture.encoded
        values = encoded.soft_tokens
        # Made by hand it may have no key: then its values are what it is known by.
        content = encoded.content or hashlib.blake2b(values.tobytes(), digest_size=32).digest()
        return SeenView(len(values), content, soft_tokens=values)
    assert facts is not None
    assert picture.source is not None

    def look() -> Patches:
        with clock.stage("decode_file"):
            pixels = picture.pixels(view)
        with clock.stage("resize"):
            return picture.patches(view, pixels, facts)

    file, length = picture.source.file, picture.soft_tokens[view]
    content = None if file is None else known.get(bytes, file, picture.views[view])
    if content is not None:
        return SeenView(length, content, look)
    patches = look()
    with clock.stage("resize"):
        content = content_key(patches)
    if file is not None:
        known.put(content, file, picture.views[view])
    return SeenView(length, content, lambda: patches)


def hear(sound: PreparedSound, clock: StageClock, known: KnownFiles = NOTHING_KNOWN) -> SeenView:
    """A clip, decoded at once, or when its samples are asked for if the file is known."""
    if sound.encoded is not None:
        values = sound.encoded.soft_tokens
        content = sound.encoded.content or hashlib.blake2b(values.tobytes(), digest_size=32).digest()
        return SeenView(len(values), content, soft_tokens=values)
    assert sound.source is not None

    def listen() -> npt.NDArray[np.float32]:
        with clock.stage("decode_file"):
            return sound.waveform()

    file = sound.source.file
    key = None if file is None else (*file, sound.start, sound.end)
    content = None if key is None else known.get(bytes, *key)
    if content is None:
        samples = np.ascontiguousarray(listen(), "<f4")
        content = hashlib.blake2b(samples.data, digest_size=32, person=b"sound").digest()
        if key is not None:
            known.put(content, *key)
    return SeenView(sound.count, content, listen=listen)


def see_all(
    prompt: Prompt,
    media: Sequence[PreparedPicture | PreparedSound],
    facts: ImageFacts | None,
    clock: StageClock,
    known: KnownFiles = NOTHING_KNOWN,
) -> SeenPrompt:
    """The prompt with all its views."""
    views = []
    for span in prompt.spans:
        medium = media[span.media_index]
        seen = isinstance(medium, PreparedPicture)
        views.append(see(medium, span.view, facts, clock, known) if seen else hear(medium, clock, known))
    for medium in media:
        if isinstance(medium, PreparedPicture) and medium.source is not None:
            medium.source.release()
    return SeenPrompt(prompt, media, views)

"""A prompt with the inputs of the vision and audio graphs that its soft tokens are computed from."""

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

__all__ = ["EncoderInput", "PreparedPrompt", "audio_input", "image_input", "prepare_prompt"]


@dataclass(slots=True, eq=False)
class EncoderInput:
    """What the vision graph is given for one view, or the audio graph for one clip.

    `content` identifies it: equal for equal patches or samples, whatever file they came from. `patches` makes the
    patches of a view, `waveform` the samples of a clip, float32 [n]; both are None once `soft_tokens`, float32
    [length, D], are known.
    """

    length: int
    content: bytes
    patches: Callable[[], Patches] | None = None
    waveform: Callable[[], npt.NDArray[np.float32]] | None = None
    soft_tokens: np.ndarray | None = None

    def resolve(self, soft_tokens: np.ndarray) -> np.ndarray:
        """Remember the soft tokens, and let go of what they were computed from."""
        self.soft_tokens, self.patches, self.waveform = soft_tokens, None, None
        return soft_tokens


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPrompt:
    """A prompt, its media, and the encoder input of each of its spans."""

    prompt: Prompt
    media: Sequence[PreparedPicture | PreparedSound]
    views: Sequence[EncoderInput]

    @property
    def pictures(self) -> list[PreparedPicture]:
        """Images, pages and videos: all media but sounds."""
        return [medium for medium in self.media if isinstance(medium, PreparedPicture)]

    @property
    def soft_runs(self) -> list[tuple[int, int]]:
        """First row and end of each maximal run of soft tokens."""
        return _runs(self.prompt.spans)

    @property
    def seen_runs(self) -> list[tuple[int, int]]:
        """The same for soft tokens of pictures alone, which may attend to each other."""
        return _runs([span for span in self.prompt.spans if span.kind != "audio"])

    def row_keys(self) -> np.ndarray:
        """The keys of the rows in the prefix cache: int64 [L]."""
        spans = zip(self.prompt.spans, self.views, strict=True)
        return row_keys(self.prompt.ids, [SoftRows(span.start, span.length, view.content) for span, view in spans])


def _runs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for span in spans:
        first = runs.pop()[0] if runs and runs[-1][1] == span.start else span.start
        runs.append((first, span.start + span.length))
    return runs


def image_input(
    picture: PreparedPicture, view: int, facts: ImageFacts | None, clock: StageClock, known: KnownFiles = NOTHING_KNOWN
) -> EncoderInput:
    """View number `view` of a picture. A page is drawn or a frame decoded, resized and cut into patches at once, or, if
    the file is known, when the patches are asked for. A picture that is encoded already has its soft tokens.
    """
    if picture.encoded is not None:
        encoded = picture.encoded.frames[view] if isinstance(picture.encoded, EncodedVideo) else picture.encoded
        values = encoded.soft_tokens
        # Made by hand it may have no key: then its values are what it is known by.
        content = encoded.content or hashlib.blake2b(values.tobytes(), digest_size=32).digest()
        return EncoderInput(len(values), content, soft_tokens=values)
    assert facts is not None
    assert picture.source is not None

    def make_patches() -> Patches:
        with clock.stage("decode_file"):
            pixels = picture.pixels(view)
        with clock.stage("resize"):
            return picture.patches(view, pixels, facts)

    file, length = picture.source.file, picture.soft_tokens[view]
    content = None if file is None else known.get(bytes, file, picture.views[view])
    if content is not None:
        return EncoderInput(length, content, make_patches)
    patches = make_patches()
    with clock.stage("resize"):
        content = content_key(patches)
    if file is not None:
        known.put(content, file, picture.views[view])
    return EncoderInput(length, content, lambda: patches)


def audio_input(sound: PreparedSound, clock: StageClock, known: KnownFiles = NOTHING_KNOWN) -> EncoderInput:
    """A clip, decoded at once or, if the file is known, when its samples are asked for."""
    if sound.encoded is not None:
        values = sound.encoded.soft_tokens
        content = sound.encoded.content or hashlib.blake2b(values.tobytes(), digest_size=32).digest()
        return EncoderInput(len(values), content, soft_tokens=values)
    assert sound.source is not None

    def decode() -> npt.NDArray[np.float32]:
        with clock.stage("decode_file"):
            return sound.waveform()

    file = sound.source.file
    key = None if file is None else (*file, sound.start, sound.end)
    content = None if key is None else known.get(bytes, *key)
    if content is None:
        samples = np.ascontiguousarray(decode(), "<f4")
        content = hashlib.blake2b(samples.data, digest_size=32, person=b"sound").digest()
        if key is not None:
            known.put(content, *key)
    return EncoderInput(sound.count, content, waveform=decode)


def prepare_prompt(
    prompt: Prompt,
    media: Sequence[PreparedPicture | PreparedSound],
    facts: ImageFacts | None,
    clock: StageClock,
    known: KnownFiles = NOTHING_KNOWN,
) -> PreparedPrompt:
    """The prompt with the encoder inputs of all its spans."""
    views = []
    for span in prompt.spans:
        medium = media[span.media_index]
        if isinstance(medium, PreparedPicture):
            views.append(image_input(medium, span.view, facts, clock, known))
        else:
            views.append(audio_input(medium, clock, known))
    for medium in media:
        if isinstance(medium, PreparedPicture) and medium.source is not None:
            medium.source.release()
    return PreparedPrompt(prompt, media, views)

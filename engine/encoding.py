"""Views and clips -> soft tokens, by the vision and audio graphs or from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .encoder_inputs import EncoderInput, audio_input, image_input
from .errors import InputError
from .manifest import Manifest
from .parts import Audio, AudioInput, ImageInput, NormalPart, Words, turns_of
from .pictures import PreparedPicture
from .preprocessing import Prepared, tower_identity
from .processes import GraphTurn
from .reply import EncodedImage, EncodedSound, EncodedVideo, StageClock
from .reuse import Reuse
from .runtime import Runtime
from .sounds import PreparedSound

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["encode_source", "encode_view", "encoded_picture", "encoded_sound"]


def encode_source(
    engine: Engine, source: ImageInput | AudioInput, image_tokens: int | None
) -> EncodedImage | EncodedSound:
    """One picture or clip, encoded. Raises InputError for anything else."""
    [(_, [part])] = turns_of([source], None)
    if isinstance(part, Words):
        raise InputError("encode takes a picture or a sound, not text")
    clock, reuse, manifest = StageClock(), engine._reuse, engine.manifest
    medium = _sole_medium(part, engine._preprocessor.read_media(part, clock, image_tokens, known=reuse.files))
    if isinstance(medium, PreparedSound):
        view = audio_input(medium, clock, reuse.files)
        return encoded_sound(manifest, medium, view, engine._encode(view, clock, reuse))
    view = image_input(medium, 0, manifest.image, clock, reuse.files)
    return _encoded_image(manifest, medium, view, engine._encode(view, clock, reuse))


def encode_view(runtime: Runtime, turn: GraphTurn, view: EncoderInput, clock: StageClock, reuse: Reuse) -> np.ndarray:
    """Soft tokens of a view or clip, float32 [length, D]. `turn` is held while a graph runs."""
    if view.soft_tokens is not None:
        return view.soft_tokens
    stage = "audio" if view.patches is None else "vision"
    with clock.stage(stage):
        known = reuse.features.get(view.content, (view.length, runtime.hidden))
    if known is not None:
        return view.resolve(known)
    if view.patches is not None:
        patches = view.patches()
        with clock.stage(stage), turn:
            clock.check()
            values = runtime.encode(patches.values, patches.positions, view.length)
    else:
        assert view.waveform is not None
        samples = view.waveform()
        with clock.stage(stage), turn:
            clock.check()
            values = runtime.hear(samples, view.length)
    with clock.stage(stage):
        reuse.features.put(view.content, values)
    return view.resolve(values)


def _encoded_image(
    manifest: Manifest, picture: PreparedPicture, view: EncoderInput, values: np.ndarray
) -> EncodedImage:
    """A picture whose soft tokens are `values`, as callers keep it."""
    if isinstance(picture.encoded, EncodedImage):
        return picture.encoded
    return EncodedImage(values, picture.size, tower_identity(manifest), picture.modality, view.content)


def encoded_picture(
    manifest: Manifest, picture: PreparedPicture, views: Sequence[EncoderInput], values: Sequence[np.ndarray]
) -> EncodedImage | EncodedVideo:
    """A picture or video whose views have the soft tokens `values`, as callers keep it."""
    if isinstance(picture.encoded, EncodedVideo):
        return picture.encoded
    encoded = tuple(_encoded_image(manifest, picture, *seen) for seen in zip(views, values, strict=True))
    return EncodedVideo(encoded, picture.times) if picture.times else encoded[0]


def encoded_sound(manifest: Manifest, sound: PreparedSound, view: EncoderInput, values: np.ndarray) -> EncodedSound:
    """A clip whose soft tokens are `values`, as callers keep it."""
    return sound.encoded or EncodedSound(values, sound.seconds, tower_identity(manifest), view.content)


def _sole_medium(part: NormalPart, media: Sequence[Prepared]) -> Prepared:
    """The one picture or clip that `part` stands for. Raises InputError if it is several."""
    first, *more = media
    if isinstance(first, PreparedSound):
        if not isinstance(part, Audio | EncodedSound):
            raise InputError("encode takes a picture, or a sound as Audio")
        if more:
            raise InputError(f"encode takes one clip, not a sound of {len(media)}: choose one with start and end")
    elif first.times:
        raise InputError("encode takes one picture or sound, not a video")
    elif more:
        raise InputError(f"encode takes one picture, not a document of {len(media)} pages: choose one with Pdf")
    return first

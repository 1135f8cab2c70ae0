"""Decoded pixels of a request: never those of all its pictures at once, however many it has."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from PIL import Image

from siglance.engine import Engine, Sampling, Text, media
from siglance.engine.limits import Limits
from siglance.engine.media import HeldPixels

from .picture_files import encoded
from .scripted import picture

SIDE = 64
ONE = Limits(max_pixels=SIDE * SIDE)  # pixels of one picture are held


def test_the_latest_pictures_are_held_and_the_others_decoded_again():
    decoded: list[int] = []

    def decoder(number: int):
        def decode() -> np.ndarray:
            decoded.append(number)
            return np.full((10, 10, 3), number, np.uint8)

        return decode

    held = HeldPixels(600)  # two of 300 bytes
    pixels = [held.holding(decoder(number)) for number in range(3)]
    for number in (0, 1, 0, 2, 2, 1, 0):
        assert pixels[number]()[0, 0, 0] == number
    assert decoded == [0, 1, 2, 0]
    held.release()
    for number in (0, 0, 1, 1, 0):
        assert pixels[number]()[0, 0, 0] == number
    assert decoded[4:] == [0, 1, 0]


def test_a_picture_over_the_bound_is_held_alone():
    held = HeldPixels(10)
    pixels = held.holding(lambda: np.zeros((10, 10, 3), np.uint8))
    assert pixels() is pixels()


@pytest.mark.parametrize("form", ["files", "arrays"])
def test_a_prompt_of_many_pictures_never_holds_all_of_them(form, tiny_model, monkeypatch):
    """Case 48: sixty pictures of 50 megapixels in a request of 50 MB would be 9 GB."""
    arrays = [picture(seed, SIDE, SIDE) for seed in range(6)]
    sources = [encoded(Image.fromarray(array), "PNG") if form == "files" else array for array in arrays]
    alive: weakref.WeakSet = weakref.WeakSet()
    peak = 0
    load_image = media.load_image

    class Tracked(np.ndarray):
        """An array that can be counted: plain ones cannot be members of sets."""

        __hash__ = object.__hash__  # pyright: ignore
        __eq__ = object.__eq__  # pyright: ignore

    def loading(*arguments, **options):
        nonlocal peak
        pixels = load_image(*arguments, **options).view(Tracked)
        alive.add(pixels)
        peak = max(peak, len(alive))
        return pixels

    monkeypatch.setattr(media, "load_image", loading)
    question = [*sources, Text("what?")]
    with Engine(tiny_model("gemma4").bundle, threads=1, limits=ONE) as engine:
        stream = engine.stream(question, image_tokens=70, sampling=Sampling(temperature=0), max_tokens=3)
        chunks = [next(stream)]
        gc.collect()
        assert not alive, "the reply goes on for a long time"
        chunks += list(stream)
    assert peak <= 2, "the one that is held, and the one that is decoded"
    with Engine(tiny_model("gemma4").bundle, threads=1) as engine:
        reply = engine.generate(question, image_tokens=70, sampling=Sampling(temperature=0), max_tokens=3)
    assert chunks[-1].reply is not None
    assert chunks[-1].reply.token_ids == reply.token_ids

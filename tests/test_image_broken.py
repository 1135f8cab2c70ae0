"""Broken pictures are errors that say why, and never black."""

import contextlib
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image
from siglance.engine.limits import Limits

from .picture_files import alpha_forms, encoded, gradient, noise, png, turned


@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}),
     ("AVIF", {})],
    ids=str,
)  # fmt: skip
def test_truncated_files_are_errors_and_never_black(format, options, share):
    data = noise(format, **options)
    with pytest.raises(ImageError, match=r"^image 2 \(street\.jpg\): [^\n]+$"):
        load_image(data[: int(len(data) * share)], name="image 2 (street.jpg)")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"<html><body>404</body></html>", "supported format"), (b"\x89PNG\r\n\x1a\n", "picture"),
     (b"\xff\xd8\xff", "picture"), (b"GIF89a", "picture"), (b"\0" * 100, "supported format"),
     (png(0, 5, 8, 2), "picture|no pixels")],
)  # fmt: skip
def test_what_is_no_picture_says_so(data, reason):
    with pytest.raises(ImageError, match=rf"^image: [^\n]*({reason})[^\n]*$"):
        load_image(data)


def test_a_closed_pil_image_is_an_error(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError):
        load_image(image)


def test_the_settings_of_the_host_program_are_left_alone():
    """Also while other threads look: nothing is changed and changed back."""
    seen, done = set(), threading.Event()

    def settings_now():
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, tuple(map(str, warnings.filters))

    def watch():
        while not done.is_set():
            seen.add(settings_now())

    before = settings_now()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for data in (
            noise("PNG"),
            noise("JPEG")[:500],
            png(30_000, 5_000, 8, 2),
            alpha_forms(1)["P with a tRNS table"],
        ):
            with contextlib.suppress(ImageError):  # pictures and bombs alike
                load_image(data)
    finally:
        done.set()
        watcher.join()
    assert seen | {settings_now()} == {before}


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_give_pixels_or_an_image_error(data):
    """Nothing else leaves `load_image`, whatever byte of whatever format is wrong."""
    original = bytearray(data.draw(st.sampled_from(SMALL_FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow reports damaged metadata as warnings
        pixels = None
        with contextlib.suppress(ImageError):
            pixels = load_image(bytes(original), limits=Limits(max_pixels=100_000))
    if pixels is not None:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


SMALL_FILES = [
    *(
        encoded(Image.fromarray(gradient()), f)
        for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "MPO")
    ),
    encoded(Image.fromarray(gradient()), "TIFF", compression="tiff_lzw"),
    turned(6, "JPEG"),
    turned(6, "PNG"),
    alpha_forms(0)["P with a tRNS table"],
]

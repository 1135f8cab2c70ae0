"""Orientation: whatever a camera did, the picture comes out upright."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from siglance.engine.image import load_image

from .picture_files import encoded, gradient, sources, turned


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_exactly_once(orientation, format, tmp_path):
    """The upright picture is 24 high and 16 wide whatever the file says, through every way in."""
    for form, source in sources(turned(orientation, format), tmp_path).items():
        pixels = load_image(source)
        assert pixels.shape == (24, 16, 3), form
        assert np.abs(pixels.astype(int) - gradient()).max() <= 6, form


def test_a_pil_image_that_was_turned_already_is_not_turned_again():
    for format in ("JPEG", "PNG", "WEBP"):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned(6, format))))
        assert load_image(upright).shape == (24, 16, 3)
        assert np.abs(load_image(upright).astype(int) - gradient()).max() <= 6


def test_broken_exif_counts_as_upright():
    for junk in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd",
    ):
        data = encoded(Image.fromarray(gradient()), "PNG", exif=junk)
        with warnings.catch_warnings(record=True):
            assert load_image(data).shape == (24, 16, 3)

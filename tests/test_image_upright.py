"""Orientation: whatever a camera did, the picture comes out upright."""

import base64
import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from siglance.engine import Engine
from siglance.engine.image import load_image

from .picture_files import encoded, gradient, sources, turned
from .scripted import scripted


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


@pytest.mark.parametrize("form", ["path", "bytes", "data URI", "PIL"])
def test_boxes_are_in_pixels_of_the_upright_picture(tiny_model, tmp_path, form):
    """Case 1: the upper half of a picture that lies on its side in the file is 16 wide and 12 high."""
    data = turned(6, "JPEG")
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    source = {"path": path, "bytes": data, "data URI": uri, "PIL": Image.open(io.BytesIO(data))}[form]
    assert Image.open(io.BytesIO(data)).size == (24, 16)
    model = tiny_model("gemma4")
    with Engine(model.bundle, threads=1) as engine:
        answer = '{"box_2d": [0, 0, 500, 1000], "label": "x"}'.replace(" ", "▁")
        ids = [engine._tokenizer.token_to_id(character) for character in answer]
        double, _ = scripted(engine, [*ids, engine.manifest.stop_ids[0]])
        [box] = double.generate([source, "detect x"], image_tokens=70).boxes
    assert box.box == (0.0, 0.0, 16.0, 12.0)


def test_broken_exif_counts_as_upright():
    for junk in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd",
    ):
        data = encoded(Image.fromarray(gradient()), "PNG", exif=junk)
        with warnings.catch_warnings(record=True):
            assert load_image(data).shape == (24, 16, 3)

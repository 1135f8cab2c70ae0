"""Numpy arrays of all layouts and types."""

import numpy as np
import pytest
from PIL import Image

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image

from .picture_files import gradient


@pytest.mark.parametrize(
    "array",
    [
        np.full((5, 7), 51, np.uint8),
        np.full((5, 7, 1), 51, np.uint8),
        np.full((1, 5, 7), 51, np.uint8),
        np.full((5, 7, 3), 51, np.uint8),
        np.full((3, 5, 7), 51, np.uint8),
        np.full((5, 7, 3), 51 * 257, np.uint16),
        np.full((5, 7), 0.2, np.float16),
        np.full((5, 7, 3), 0.2, np.float32),
        np.full((4, 5, 7), 0.2) + np.array([0, 0, 0, 0.8]).reshape(4, 1, 1),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_arrays_of_all_layouts_and_types(array):
    pixels = load_image(array)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (5, 7, 3)
    assert (pixels == 51).all()


@pytest.mark.parametrize("shape", [(3, 2, 3), (3, 100, 3), (1, 5, 4), (4, 4, 1), (2, 7, 2)])
def test_where_both_axes_could_be_channels_nothing_is_guessed(shape):
    with pytest.raises(ImageError, match=r"ambiguous: .*1 to 4 entries.*PIL.Image.fromarray"):
        load_image(np.zeros(shape, np.uint8))
    assert load_image(Image.fromarray(np.full((3, 2, 3), 7, np.uint8))).shape == (3, 2, 3)


@pytest.mark.parametrize("channels_first", [False, True])
def test_grey_with_alpha_lies_on_white(channels_first):
    array = np.zeros((5, 6, 2), np.uint8)
    array[:, 3:, 1] = 255
    pixels = load_image(array.transpose(2, 0, 1) if channels_first else array)
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 3:] == 0).all()


@pytest.mark.parametrize("layout", ["F", "strided", "read-only", "view of a larger one"])
def test_memory_layouts(layout):
    array = gradient()
    forms = {
        "F": np.asfortranarray(array),
        "strided": np.repeat(array, 2, axis=1)[:, ::2],
        "read-only": np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),
        "view of a larger one": np.pad(array, ((2, 2), (3, 3), (0, 0)))[2:-2, 3:-3],
    }
    np.testing.assert_array_equal(load_image(forms[layout]), array)


def test_boolean_arrays_are_black_and_white():
    np.testing.assert_array_equal(load_image(np.eye(4, dtype=bool))[:, :, 0], np.eye(4) * 255)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([[0.0, 1.5]]), r"0\.\.1\.5, .* 0\.\.1"),
        (np.array([[-0.25, 1.0]]), r"-0\.25\.\.1, .* 0\.\.1"),
        (np.array([[0.5, np.nan]]), "NaN"),
        (np.array([[0.5, np.inf]]), r"0\.\.1"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.zeros((4, 4), np.complex64), "complex64"),
        (np.array([["a"]]), "<U1"),
        (np.array([[None]]), "object"),
        (np.zeros((5, 9, 5), np.uint8), r"\[5, 9, 5\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\[1, 4, 4, 3\]"),
        (np.zeros(5, np.uint8), r"\[5\]"),
        (np.zeros((), np.uint8), r"\[\]"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros((9, 0, 3), np.float32), "no pixels"),
    ],
)
def test_unusable_arrays_are_named(array, reason):
    with pytest.raises(ImageError, match=rf"^picture: .*{reason}"):
        load_image(array, name="picture")


@pytest.mark.parametrize("array", [gradient(), gradient()[::-1, :, ::-1], gradient().transpose(2, 0, 1)])
def test_the_result_shares_no_memory_with_an_array(array):
    before = array.copy()
    pixels = load_image(array)
    assert not np.shares_memory(pixels, array)
    pixels[:] = 0
    np.testing.assert_array_equal(array, before)

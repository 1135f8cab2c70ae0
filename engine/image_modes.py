"""Every pixel mode of Pillow -> upright RGB of 8 bits.

Transparency is composited on white, so that colours hidden under it never show. Rules for grey of more than 8 bits,
which Pillow's own conversion would clip to white:

    I;16, I;16L, I;16B, I;16N   65535 is white; v becomes round(v / 257)
    I, F                        carry no white level: it is the smallest of 255, 65535 (for F: 1, 255, 65535) that is
                                not below the brightest pixel; v becomes round(255 * v / white)

Negative values, NaN, and values over 65535 are an error.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from .errors import ImageError
from .sources import one_line

__all__ = ["composite_on_white", "scale_16_bit", "upright_rgb"]

_OPAQUE_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "La", "RGBa"})
_WHITE_LEVELS = {"I": (255, 65535), "F": (1, 255, 65535)}

# The inverse of what the EXIF orientation (tag 0x0112) says was done to the upright picture.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow widens these PNG samples when it decodes them, but leaves the transparent colour key as the file has it:
# factor and shift that take the key to the decoded scale.
_KEY_SCALES = {"L;2": (85, 0), "L;4": (17, 0), "RGB;16B": (1, 8)}


class _Stored(NamedTuple):
    """How a file stores an image, as far as its pixels do not show it."""

    key: int | tuple[int, ...] | None = None  # the transparent colour, see `_transparent_key`
    frame: tuple[int, int, int, int] | None = None  # see `_first_frame_box`


# What was known of images before they were decoded, by their identity; for as long as they live.
_forgotten: dict[int, tuple[weakref.ref[Image.Image], _Stored]] = {}


def upright_rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Decode `image` and return it upright: uint8 [H, W, 3], not shared with `image`, which keeps its pixels and tags.

    Raises ImageError if the data is broken or truncated, or the mode is not supported.
    """
    try:
        key, frame = _decoded(image)
        rgb = _to_rgb(image, key)
        if frame is not None:
            rgb = _on_white(rgb, frame)
        # After decoding: PNG may keep its EXIF behind the pixels, and TIFF images turn themselves and drop the tag.
        turn = _UPRIGHT.get(_orientation(image))
        return np.array(rgb if turn is None else rgb.transpose(turn))
    except ImageError:
        raise
    except Exception as error:  # on hostile files Pillow raises nearly every kind of exception
        raise ImageError(f"cannot decode this {image.format or 'PIL image'}: {one_line(error)}") from error


def _decoded(image: Image.Image) -> _Stored:
    """Decode `image`, and say what decoding forgets: an image of the caller may come again."""
    stored, number = _Stored(), id(image)
    if getattr(image, "tile", None):
        stored = _Stored(_transparent_key(image), _first_frame_box(image))
        _forgotten.pop(number, None)
        if stored != _Stored():
            _forgotten[number] = weakref.ref(image, lambda _: _forgotten.pop(number, None)), stored
    elif number in _forgotten and _forgotten[number][0]() is image:
        stored = _forgotten[number][1]
    image.load()
    return stored


def composite_on_white(image: Image.Image) -> Image.Image:
    """`image`, whose mode can be converted to RGBA, on white: mode RGB."""
    if image.mode in ("La", "RGBa"):  # premultiplied alpha converts in two steps only
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def scale_16_bit(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """round(v / 257) for v in 0..65535: 65535 becomes 255, and all 256 levels are used evenly."""
    return ((values + 128) // 257).astype(np.uint8)


def _to_rgb(image: Image.Image, key: int | tuple[int, ...] | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in _WHITE_LEVELS:
        return _deep_grey_to_rgb(image)
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES:
        raise ImageError(f"pixel mode {image.mode!r} is not supported")
    if key is not None:
        image = image.copy()
        image.info["transparency"] = key
    if image.mode in _ALPHA_MODES or image.has_transparency_data:
        return composite_on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = scale_16_bit(values.astype(np.uint32))
    else:
        low, high = float(values.min()), float(values.max())
        white = next((level for level in _WHITE_LEVELS[image.mode] if low >= 0 and high <= level), None)
        if white is None:
            raise ImageError(f"{low:g}..{high:g} in pixels of mode {image.mode}, expected values in 0..65535")
        grey = np.floor(values.astype(np.float64) * (255 / white) + 0.5).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey = np.where(values == key, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _transparent_key(image: Image.Image) -> int | tuple[int, ...] | None:
    """The colour key of a not yet decoded PNG on the scale of its decoded pixels, if Pillow would get it wrong."""
    tile = getattr(image, "tile", None)
    key = image.info.get("transparency")
    if not tile or image.format != "PNG" or not isinstance(key, int | tuple):
        return None
    factor, shift = _KEY_SCALES.get(tile[0][3], (1, 0))
    if isinstance(key, int):
        return key * factor >> shift
    return tuple(component * factor >> shift for component in key)


def _first_frame_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Where the first frame of a not yet decoded GIF lies on its canvas, if it does not cover it."""
    tile = getattr(image, "tile", None)
    if not tile or image.format != "GIF" or getattr(image, "tell", int)() != 0:
        return None
    box = tile[0][1]
    return None if box is None or box == (0, 0, *image.size) else box


def _on_white(rgb: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """What nothing has drawn on is transparent, hence white; Pillow gives it the first colour of the palette."""
    canvas = Image.new("RGB", rgb.size, "white")
    canvas.paste(rgb.crop(box), box[:2])
    return canvas


def _orientation(image: Image.Image) -> int:
    """EXIF or XMP orientation, 1 (upright) if there is none or the metadata cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata does not make the pixels unreadable; Pillow raises many kinds
        return 1

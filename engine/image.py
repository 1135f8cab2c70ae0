"""Any form of picture -> upright RGB pixels. The one place where pictures enter the engine."""

from __future__ import annotations

from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError, InputError
from .image_files import check_size, decode
from .image_modes import composite_on_white, scale_16_bit, upright_rgb
from .limits import DEFAULT_LIMITS, Limits
from .sources import FileSource, read_source

__all__ = ["ImageSource", "load_image"]

# Pillow decodes an image when it is first used, and two threads may have been given the same one.
_decoding = Lock()

ImageSource = FileSource | Image.Image | npt.NDArray[np.generic]


def load_image(source: ImageSource, *, limits: Limits = DEFAULT_LIMITS, name: str = "image") -> npt.NDArray[np.uint8]:
    """Read a picture from any form and return upright RGB.

    Args:
        source: one of
            - a path (str or os.PathLike), or a data URI (str);
            - an encoded file as bytes, bytearray or memoryview;
            - a binary file object, read from its current position to its end and left open; it need not seek;
            - a PIL image (an animated one at its current frame);
            - a numpy array: [H, W], or [H, W, C] or [C, H, W] of C = 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA)
              channels, of bool, uint8, uint16 (65535 is white) or floating point in 0..1. A shape whose first and
              last axis could both be the channels is refused.
        limits: `max_bytes` of encoded data; `max_pixels`, tested on the header before anything is decoded.
        name: how error messages call this picture, for example "image 2 (street.jpg)".

    Returns:
        uint8 [H, W, 3], C-contiguous, sharing no memory with the source, which is not modified.

    Rules:
        - Formats (`image_files.FORMATS`) are told by content and never by name.
        - Of several frames or pages (GIF, APNG, WebP, AVIF, TIFF, MPO ...), the first is read, as a viewer shows it on
          opening; of the sizes in an icon, the largest.
        - An EXIF (or XMP) orientation is applied exactly once. Unreadable metadata counts as upright.
        - Transparency is composited on white. Grey of more than 8 bits is scaled, not clipped (see `image_modes`).
        - CMYK JPEG is read with inverted inks, Adobe marker or not, as Pillow and browsers do.
        - ICC profiles are ignored, as the reference processors do: numbers in the file are taken as sRGB.
        - No setting of Pillow is changed. If the host program has set `ImageFile.LOAD_TRUNCATED_IMAGES`, then Pillow
          does not report truncated files to us either.

    Raises:
        ImageError: one line with `name` and the reason: cannot be read, not a supported picture, over a limit.
    """
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, limits.max_pixels)
        if isinstance(source, Image.Image):
            return _from_pil(source, limits.max_pixels)
        return decode(read_source(source, limits.max_bytes), limits.max_pixels)
    except InputError as error:
        raise ImageError(f"{name}: {' '.join(str(error).split())}") from error.__cause__


def _from_pil(image: Image.Image, max_pixels: int) -> npt.NDArray[np.uint8]:
    check_size(*image.size, max_pixels)
    with _decoding:
        return upright_rgb(image)


def _from_array(array: npt.NDArray[np.generic], max_pixels: int) -> npt.NDArray[np.uint8]:
    channels_last = _channels_last(array)
    height, width, channels = channels_last.shape
    check_size(width, height, max_pixels)
    levels = np.array(_to_8_bit(channels_last), order="C")
    if channels in (2, 4):
        return np.array(composite_on_white(Image.fromarray(levels)))
    return levels if channels == 3 else np.repeat(levels, 3, axis=2)


def _channels_last(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A view [H, W, C] with C in 1..4."""
    if array.ndim == 2:
        return array[:, :, None]
    first, last = (array.ndim == 3 and array.shape[axis] in range(1, 5) for axis in (0, 2))
    if first and last:
        raise ImageError(
            f"an array of shape {list(array.shape)} is ambiguous: first and last axis both have 1 to 4 entries, so "
            "either could be the channels; pass PIL.Image.fromarray(array) instead, which takes the last"
        )
    if first or last:
        return array if last else array.transpose(1, 2, 0)
    raise ImageError(
        f"an array of shape {list(array.shape)}, expected [H, W], [H, W, C] or [C, H, W] with 1 to 4 channels"
    )


def _to_8_bit(array: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return scale_16_bit(array.astype(np.uint32))
    if array.dtype.kind == "f":
        values = array.astype(np.float32)
        low, high = float(values.min()), float(values.max())
        if np.isnan(low):
            raise ImageError("the array contains NaN, floating-point pixels must lie in 0..1")
        if low < 0 or high > 1:
            raise ImageError(f"the array holds {low:g}..{high:g}, floating-point pixels must lie in 0..1")
        return np.floor(values * 255 + 0.5).astype(np.uint8)
    raise ImageError(f"an array of dtype {array.dtype}, expected uint8, uint16, bool or floating point in 0..1")

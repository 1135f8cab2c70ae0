"""Any form of picture -> upright RGB pixels. The one place where pictures enter the engine."""

from __future__ import annotations

import base64
import binascii
import os
import re
import string
import urllib.parse
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError
from .image_files import check_size, decode, read_file, read_stream
from .image_modes import composite_on_white, scale_16_bit, upright_rgb

__all__ = ["DEFAULT_MAX_BYTES", "DEFAULT_MAX_PIXELS", "ImageSource", "load_image"]

DEFAULT_MAX_PIXELS = 50_000_000  # 150 MB of RGB; phones of today reach this
DEFAULT_MAX_BYTES = 64 * 2**20  # encoded

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[np.generic]

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URI = re.compile(r"\s*data:", re.IGNORECASE)
_URL_SAFE_BASE64 = bytes.maketrans(b"-_", b"+/")


def load_image(
    source: ImageSource,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_bytes: int = DEFAULT_MAX_BYTES,
    name: str = "image",
) -> npt.NDArray[np.uint8]:
    """Read a picture from any form and return upright RGB.

    Args:
        source: one of
            - a path (str or os.PathLike), or a data URI (str);
            - an encoded file as bytes, bytearray or memoryview;
            - a binary file object, read from its current position to its end and left open;
            - a PIL image (an animated one at its current frame);
            - a numpy array: [H, W], [H, W, 1], [H, W, 3] (RGB), [H, W, 4] (RGBA), or channels first where the last
              axis cannot be the channels. bool, uint8, uint16 (65535 is white) or floating point in 0..1.
        max_pixels: limit on width * height, tested on the header before anything is decoded.
        max_bytes: limit on the size of encoded data.
        name: how error messages call this picture, for example "image 2 (street.jpg)".

    Returns:
        uint8 [H, W, 3], C-contiguous, sharing no memory with the source, which is not modified.

    Rules:
        - Files are PNG, JPEG (MPO), WebP, GIF, BMP, TIFF, PPM, ICO or AVIF, told by content and never by name. Of
          several frames, the first is read.
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
            return _from_array(source, max_pixels)
        if isinstance(source, Image.Image):
            return _from_pil(source, max_pixels)
        return decode(_encoded_bytes(source, max_bytes), max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}: {' '.join(str(error).split())}") from error.__cause__


def _encoded_bytes(source: object, max_bytes: int) -> bytes:
    """The encoded file that `source` stands for, at most `max_bytes` long."""
    if isinstance(source, str) and _DATA_URI.match(source):
        return _from_data_uri(source, max_bytes)
    if isinstance(source, str) and _URL.match(source):
        raise ImageError("URLs are not fetched, pass a path, the bytes or a data URI")
    if isinstance(source, str | os.PathLike):
        return read_file(source, max_bytes)
    if isinstance(source, bytes | bytearray | memoryview):
        size = source.nbytes if isinstance(source, memoryview) else len(source)
        if size > max_bytes:
            raise ImageError(f"{size} bytes, over the limit of {max_bytes} bytes of encoded data")
        return bytes(source)
    if callable(getattr(source, "read", None)):
        return read_stream(cast(BinaryIO, source), max_bytes)
    raise ImageError(
        f"cannot read a picture from {type(source).__name__}: pass a path, bytes, a binary file object, a PIL image, "
        "a numpy array or a data URI"
    )


def _from_data_uri(uri: str, max_bytes: int) -> bytes:
    """The payload of a data URI (RFC 2397), read tolerantly.

    Accepted: any case, no media type, line breaks and spaces, percent-encoding, the URL-safe alphabet of base64,
    missing padding. Error messages never repeat the payload.
    """
    # Percent-encoding triples a byte and base64 adds a third. Twice the limit is refused before any copy is made.
    if len(uri) > 2 * max_bytes + 1024:
        raise ImageError(f"a data URI of {len(uri)} characters, over the limit of {max_bytes} bytes of encoded data")
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError("a data URI needs a comma before its payload")
    try:
        raw = payload.encode("ascii")
    except UnicodeEncodeError:
        raise ImageError("the payload of the data URI is not ASCII") from None
    if b"%" in raw:
        raw = urllib.parse.unquote_to_bytes(raw)
    parameters = header.partition(":")[2].lower().split(";")
    if "base64" in (parameter.strip() for parameter in parameters):
        raw = raw.translate(_URL_SAFE_BASE64, delete=string.whitespace.encode()).rstrip(b"=")
        if len(raw) * 3 // 4 <= max_bytes:  # else the test below refuses it undecoded
            try:
                raw = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
            except binascii.Error as error:
                raise ImageError(f"the data URI is not base64: {error}") from None
    if not raw:
        raise ImageError("the data URI has an empty payload")
    if len(raw) > max_bytes:
        raise ImageError(f"over the limit of {max_bytes} bytes of encoded data")
    return raw


def _from_pil(image: Image.Image, max_pixels: int) -> npt.NDArray[np.uint8]:
    check_size(*image.size, max_pixels)
    return upright_rgb(image)


def _from_array(array: npt.NDArray[np.generic], max_pixels: int) -> npt.NDArray[np.uint8]:
    channels_last = _channels_last(array)
    height, width, channels = channels_last.shape
    check_size(width, height, max_pixels)
    levels = _to_8_bit(channels_last)
    if channels == 1:
        return np.repeat(levels, 3, axis=2)
    if channels == 4:
        return np.array(composite_on_white(Image.fromarray(np.ascontiguousarray(levels))))
    return np.array(levels, order="C")


def _channels_last(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A view [H, W, C] with C in 1, 3, 4. Where first and last axis could both be the channels, the last one is."""
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        return array
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return array.transpose(1, 2, 0)
    raise ImageError(f"an array of shape {list(array.shape)}, expected [H, W] or [H, W, C] with 1, 3 or 4 channels")


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

"""Encoded picture files: reading them within limits, telling their format, decoding them with Pillow.

Everything here treats the file as hostile. Sizes are tested before anything is decoded.
"""

from __future__ import annotations

import importlib
import io
import os
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from .errors import ImageError
from .image_modes import one_line, upright_rgb

__all__ = ["FORMATS", "check_size", "decode", "read_file", "read_stream"]

# Raster formats only. Pillow's other openers run external programs, expect other media or are hardly ever needed, and
# each is one more parser open to hostile files. (Pillow opens MPO through its JPEG opener.)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF")
_PLUGINS = ("Png", "Jpeg", "Mpo", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Ico", "Avif")

for _plugin in _PLUGINS:  # importing a plugin registers its opener; Image.init() would import all of them
    try:
        importlib.import_module(f"PIL.{_plugin}ImagePlugin")
    except ImportError:  # AVIF came with Pillow 11.3
        continue

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The content of a file. Raises ImageError if it cannot be read or is larger than `max_bytes`."""
    try:
        with open(path, "rb") as file:
            return read_stream(file, max_bytes)
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"cannot read {os.fspath(path)[-100:]!r}: {one_line(reason)}") from error


def read_stream(stream: BinaryIO, max_bytes: int) -> bytes:
    """The rest of a binary stream, which stays open. Raises ImageError if it is longer than `max_bytes`."""
    parts: list[bytes] = []
    room = max_bytes + 1
    while room > 0:
        try:
            part = stream.read(min(room, 2**20))  # a raw stream may return less than it was asked for
        except (OSError, ValueError) as error:
            raise ImageError(f"cannot read from the file object: {one_line(error)}") from error
        if not isinstance(part, bytes | bytearray | memoryview):
            raise ImageError(f"the file object gave {type(part).__name__}, open it in binary mode")
        if not part:
            return b"".join(parts)
        parts.append(bytes(part))
        room -= len(part)
    raise ImageError(f"over the limit of {max_bytes} bytes of encoded data")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError unless the picture has pixels and at most `max_pixels` of them."""
    if width < 1 or height < 1:
        raise ImageError(f"a size of {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise ImageError(f"{width}x{height} is {width * height} pixels, the limit is {max_pixels}")


def decode(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """An encoded file to upright RGB: uint8 [H, W, 3].

    Raises ImageError for data that is empty, in no supported format, broken, truncated, or over `max_pixels`.
    """
    if not data:
        raise ImageError("empty, 0 bytes")
    try:
        image = _open(data, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # on hostile files Pillow raises nearly every kind of exception
        raise ImageError(f"not a readable picture: {one_line(error)}") from error
    check_size(*image.size, max_pixels)
    return upright_rgb(image)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header with the opener that knows the signature.

    Not Image.open: that warns or raises by Image.MAX_IMAGE_PIXELS, a global that belongs to the host program, and
    neither the global nor the filters for its warning can be changed without other threads seeing it.
    """
    for width, height in _sizes_before_opening(data):
        check_size(width, height, max_pixels)
    for name in FORMATS:
        opener, accepts = Image.OPEN.get(name, (None, None))
        verdict = accepts(data[:16]) if accepts else False
        if isinstance(verdict, str):  # the signature is right, the codec is not compiled in
            raise ImageError(f"this build of Pillow cannot read {name}: {one_line(verdict)}")
        if opener and verdict:
            return opener(io.BytesIO(data), "")
    raise ImageError(f"not a picture in a supported format ({', '.join(FORMATS)})")


def _sizes_before_opening(data: bytes) -> list[tuple[int, int]]:
    """(width, height) for the formats where Pillow allocates before it tells us the size, or tells another one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if data[:4] == b"\0\0\1\0":
        return _ico_sizes(data)
    return []


def _webp_size(data: bytes) -> list[tuple[int, int]]:
    """The canvas of a WebP file (RFC 9649): Pillow allocates it on opening."""
    kind = data[12:16]
    if kind == b"VP8X":
        return [(1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))]
    if kind == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return [(1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF))]
    if kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return [(width, height)]
    return []


def _ico_sizes(data: bytes) -> list[tuple[int, int]]:
    """The true sizes of the pictures in an icon: its directory can state 16x16 for an embedded PNG of any size."""
    sizes = []
    for entry in range(int.from_bytes(data[4:6], "little")):
        where = 6 + 16 * entry + 12
        picture = data[int.from_bytes(data[where : where + 4], "little") :][:24]
        if picture.startswith(_PNG_SIGNATURE):
            sizes.append((int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")))
        elif len(picture) == 24:  # a bitmap without file header; its height counts the mask as well
            width, height = (int.from_bytes(picture[at : at + 4], "little", signed=True) for at in (4, 8))
            sizes.append((abs(width), abs(height) // 2))
    return sizes

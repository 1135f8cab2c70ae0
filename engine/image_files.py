"""Encoded pictures: telling their format by content, decoding them with Pillow.

Everything here treats the file as hostile. Sizes are tested before anything is decoded.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from .errors import ImageError
from .image_modes import upright_rgb
from .sources import one_line

__all__ = ["FORMATS", "check_size", "decode"]

# Every format whose pixels Pillow decodes by itself and that content can tell. Left out: EPS and WMF (other programs
# render them), BUFR, GRIB, HDF5 and MPEG (recognised, not decoded), SPIDER, IMT and IPTC (nothing to tell them by), BLP
# and FITS (their size is known only after data of any size has been unpacked), IM (Pillow is going to drop it).
_SIGNED = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000", "ICNS", "PSD", "DDS", "QOI"),
    *("FTEX", "XPM", "XBM", "XVTHUMB", "MSP", "SUN", "SGI", "DCX", "PIXAR", "MCIDAS"),
)
# A header that can be checked, and no signature or one that others share (a cursor begins like a TGA).
_UNSIGNED = ("FLI", "GBR", "PCX", "CUR", "DIB", "PCD", "TGA")
FORMATS = _SIGNED + _UNSIGNED
_PLUGINS = (
    *("Png", "Jpeg", "Mpo", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Ico", "Avif", "Jpeg2K", "Icns", "Psd", "Dds", "Qoi"),
    *("Ftex", "Xpm", "Xbm", "XVThumb", "Msp", "Sun", "Sgi", "Dcx", "Cur", "Pixar", "McIdas"),
    *("Fli", "Gbr", "Pcx", "Pcd", "Tga"),
)  # the opener of JPEG reads MPO too, and the module of BMP has DIB

for _plugin in _PLUGINS:  # importing a plugin registers its opener; Image.init() would import all of them
    try:
        importlib.import_module(f"PIL.{_plugin}ImagePlugin")
    except ImportError:  # AVIF came with Pillow 11.3
        continue

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Progressive JPEG may hold any number of scans, each of a few bytes, each as much work as the whole picture.
_MAX_JPEG_SCANS = 200
_MAX_ICNS_BLOCKS = 100
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags

_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
_HEIC = "a HEIC picture, which is not read: convert it to JPEG, or open it with pillow-heif and pass the PIL image"


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageError unless the picture has pixels and at most `max_pixels` of them."""
    if width < 1 or height < 1:
        raise ImageError(f"a size of {width}x{height} has no pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{width}x{height} is {width * height} pixels, the limit is {max_pixels} (Limits(max_pixels=N), "
            "--limit pixels=N)"
        )


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
    _check_tiles(image, max_pixels)
    return upright_rgb(image)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header with the opener that knows the signature.

    Not Image.open: that warns or raises by Image.MAX_IMAGE_PIXELS, a global that belongs to the host program, and
    neither the global nor the filters for its warning can be changed without other threads seeing it.
    """
    refused = _unsupported(data)
    if refused:
        raise ImageError(refused)
    scans = data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 0
    if scans > _MAX_JPEG_SCANS:
        raise ImageError(f"a JPEG of {scans} scans, the limit is {_MAX_JPEG_SCANS}")
    for width, height in _sizes_before_opening(data):
        check_size(width, height, max_pixels)
    name = _told_by_signature(data)
    if name is not None:
        return Image.OPEN[name][0](io.BytesIO(data), "")
    for name in _UNSIGNED:
        try:
            return Image.OPEN[name][0](io.BytesIO(data), "")
        except Exception:  # it is not this format; Pillow's word for that is SyntaxError, hostile files give others too
            continue
    raise ImageError(f"not a picture in a supported format ({', '.join(FORMATS)})")


def _told_by_signature(data: bytes) -> str | None:
    """The format whose signature `data` begins with. Raises ImageError if the codec of that format is missing."""
    for name in _SIGNED:
        accepts = Image.OPEN[name][1] if name in Image.OPEN else None
        verdict = accepts(data[:16]) if accepts else False
        if isinstance(verdict, str):  # the signature is right, the codec is not compiled in
            raise ImageError(f"this build of Pillow cannot read {name}: {one_line(verdict)}")
        if verdict:
            return name
    return None


def _unsupported(data: bytes) -> str | None:
    """What a file is that people take for a picture and that is not read, and what to do about it."""
    start = data[:1024]
    if start[4:8] == b"ftyp":
        brands = start[8 : max(16, min(int.from_bytes(start[:4], "big"), 256))]
        names = [brands[at : at + 4] for at in range(0, len(brands), 4)]
        if names[0] in _HEIF_BRANDS or (names[0] not in (b"avif", b"avis") and set(names) & set(_HEIF_BRANDS)):
            return _HEIC
        if names[0] not in (b"avif", b"avis", b"mif1", b"msf1"):
            return f"a video or another file of the brand {one_line(names[0].decode('latin-1'))!r}, not a picture"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "a JPEG XL picture, which is not read: convert it to PNG or JPEG"
    if start.startswith(b"%PDF-"):
        return "a PDF, which is a document of pages and not one picture"
    if start.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "a PostScript file, which is not read: convert it to PDF or PNG"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!doctype svg", b"<!--")) and b"<svg" in text):
        return "an SVG drawing, which is not read: convert it to PNG"
    return None


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Raise ImageError for a TIFF whose tiles are too large: they are unpacked whole, however small the picture is."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A file may give a tag any number of values of any type.
        width, height = (image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
            raise ImageError(f"tiles of {width}x{height} are {width * height} pixels, the limit is {max_pixels}")


def _sizes_before_opening(data: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) for the formats where Pillow allocates before it tells us the size, or tells another one."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield from _webp_size(data)
    elif data[:4] == b"\0\0\1\0":
        yield from _ico_sizes(data)
    elif data[:4] == b"icns":
        yield from _icns_sizes(data)


def _webp_size(data: bytes) -> Iterator[tuple[int, int]]:
    """The canvas of a WebP file (RFC 9649): Pillow allocates it on opening."""
    kind = data[12:16]
    if kind == b"VP8X":
        yield 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        yield 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        yield width, height


def _ico_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """The true sizes of the pictures in an icon: its directory can state 16x16 for an embedded PNG of any size."""
    for entry in range(int.from_bytes(data[4:6], "little")):
        where = 6 + 16 * entry + 12
        start = int.from_bytes(data[where : where + 4], "little")
        picture = data[start : start + 24]
        if picture.startswith(_PNG_SIGNATURE):
            yield _png_size(picture)
        elif len(picture) == 24:  # a bitmap without file header; its height counts the mask as well
            width, height = (int.from_bytes(picture[at : at + 4], "little", signed=True) for at in (4, 8))
            yield abs(width), abs(height) // 2


def _icns_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """The true sizes of the PNG and JPEG 2000 pictures in a Macintosh icon: the names of its blocks state others."""
    at = 8
    for _ in range(_MAX_ICNS_BLOCKS):
        length = int.from_bytes(data[at + 4 : at + 8], "big")
        if length < 8:  # the end, or a header that Pillow refuses too
            return
        picture = data[at + 8 : at + length]
        if picture.startswith(_PNG_SIGNATURE) and len(picture) >= 24:
            yield _png_size(picture)
        elif picture.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\r\n\x87\n")):
            yield Image.OPEN["JPEG2000"][0](io.BytesIO(picture), "").size  # reads the header only
        at += length
    raise ImageError(f"an icon of more than {_MAX_ICNS_BLOCKS} blocks")


def _png_size(header: bytes) -> tuple[int, int]:
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")

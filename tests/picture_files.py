"""Encoded pictures for tests, made in memory."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind, payload):
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png(width, height, bits, colour_type, rows=b"", *chunks):
    """A PNG by hand, for what Pillow does not write. `rows` holds the filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + b"".join(png_chunk(*chunk) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def gradient(height=24, width=16):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 15, y * 10, np.full_like(x, 60)], axis=-1).astype(np.uint8)


def sources(data, tmp_path):
    """The same encoded file in every form."""
    path = tmp_path / "picture.bin"
    path.write_bytes(data)
    return {
        "str": str(path),
        "PathLike": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "strided memoryview": memoryview(bytes(byte for byte in data for _ in range(2)))[::2],
        "file object": io.BytesIO(data),
        "data URI": "data:image/png;base64," + base64.b64encode(data).decode(),
        "PIL": Image.open(io.BytesIO(data)),
    }


_APPLIED = {  # what a camera did to the upright picture, in numpy: the inverse of what EXIF tells a viewer to do
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def turned(orientation, format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(_APPLIED[orientation](gradient())))
    lossless = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "MPO": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    return encoded(stored, format, exif=exif, **lossless.get(format, {}))


def disc_with_hidden_noise(seed):
    """An opaque red disc, half-transparent in its lower half; under the transparent rest lies noise."""
    y, x = np.mgrid[:32, :32] - 15.5
    alpha = np.where(x**2 + y**2 < 100, np.where(y > 0, 128, 255), 0).astype(np.uint8)
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    rgb = np.where(alpha[:, :, None] > 0, np.array(RED, np.uint8), noise)
    return np.dstack([rgb, alpha])


def alpha_forms(seed):
    rgba = disc_with_hidden_noise(seed)
    grey = Image.fromarray(rgba[:, :, 0])
    grey_alpha = Image.merge("LA", (grey, Image.fromarray(rgba[:, :, 3])))
    palette = Image.fromarray(
        np.where(rgba[:, :, 3] == 255, 1, np.where(rgba[:, :, 3] > 0, 2, 3 + seed)).astype(np.uint8)
    )
    palette = Image.frombytes("P", (32, 32), palette.tobytes())
    palette.putpalette([0, 0, 0, *RED, *RED, *[(seed * 37 + i) % 256 for i in range(750)]])
    palette_alpha = palette.convert("PA")
    palette_alpha.putalpha(Image.fromarray(rgba[:, :, 3]))
    table = bytes([255, 255, 128, *([0] * 253)])
    return {
        "RGBA array": rgba,
        "RGBA": Image.fromarray(rgba),
        "RGBA PNG": encoded(Image.fromarray(rgba), "PNG"),
        "RGBA WebP": encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True),
        "RGBA TIFF": encoded(Image.fromarray(rgba), "TIFF"),
        "LA PNG": encoded(grey_alpha, "PNG"),
        "PA": palette_alpha,
        "P with a tRNS table": encoded(palette, "PNG", transparency=table),
        "RGBa": Image.fromarray(rgba).convert("RGBa"),
        "La": grey_alpha.convert("La"),
    }


def noise(format, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)

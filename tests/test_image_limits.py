"""Limits hold for every form, and before anything is decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image
from siglance.engine.limits import Limits

from .picture_files import encoded, gradient, png, png_chunk, sources


def zero_png(width, height):
    """All zero, compressed row by row, so that the test itself stays small."""
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def huge_jpeg():
    data = encoded(Image.new("L", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 64000, 64000) + data[at + 4 :]


def icon_with_hidden_png():
    """The directory says 16x16, the embedded PNG 10000x9000."""
    inner = png(10000, 9000, 8, 0)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def webp_canvas():
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + (15999).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def gif_screen():
    return b"GIF89a" + struct.pack("<HH", 60000, 60000) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


BOMBS = {
    "19000x19000": lambda: zero_png(19000, 19000),
    "10000x12000": lambda: zero_png(10000, 12000),  # where Pillow only warns
    "1000000x1000000": lambda: png(1_000_000, 1_000_000, 8, 2),
    "64000x64000": huge_jpeg,
    "10000x9000": icon_with_hidden_png,
    "16000x16000": webp_canvas,
    "60000x60000": gif_screen,
    "30000x30000": lambda: b"P6 30000 30000 255\n",
    "40000x40000": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 40000, 40000, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
}


@pytest.mark.parametrize("size", BOMBS)
def test_bombs_are_refused_on_their_header(size):
    width, height = map(int, size.split("x"))
    data = BOMBS[size]()
    with pytest.raises(ImageError, match=rf"{width}x{height} is {width * height} pixels, the limit is 50000000"):
        load_image(data)


def test_the_limit_on_pixels_is_exact_and_holds_for_every_form():
    picture = Image.new("RGB", (10, 10))
    for source in (encoded(picture, "PNG"), picture, np.asarray(picture)):
        assert load_image(source, limits=Limits(max_pixels=100)).shape == (10, 10, 3)
        with pytest.raises(ImageError, match="10x10 is 100 pixels, the limit is 99"):
            load_image(source, limits=Limits(max_pixels=99))


def test_a_raised_limit_is_not_undercut_by_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    data = encoded(Image.new("RGB", (20, 20)), "PNG")
    assert load_image(data).shape == (20, 20, 3)


def test_the_limit_on_bytes_is_exact_and_holds_for_every_form(tmp_path):
    data = encoded(Image.fromarray(gradient()), "PNG")
    for form, source in sources(data, tmp_path).items():
        if form != "PIL":
            load_image(source, limits=Limits(max_bytes=len(data)))
    for form, source in sources(data, tmp_path).items():
        if form != "PIL":
            with pytest.raises(ImageError, match=f"limit of {len(data) - 1} bytes"):
                load_image(source, limits=Limits(max_bytes=len(data) - 1))


def test_an_endless_stream_is_read_up_to_the_limit_only():
    class Endless(io.RawIOBase):
        total = 0

        def read(self, size=-1):
            self.total += size
            return bytes(size)

    stream = Endless()
    with pytest.raises(ImageError, match="limit of 100000 bytes"):
        load_image(stream, limits=Limits(max_bytes=100_000))
    assert stream.total == 100_001

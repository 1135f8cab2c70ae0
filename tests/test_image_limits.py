"""Limits hold for every form, and before anything is decoded."""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siglance.engine import Engine
from siglance.engine.errors import ContextFull, ImageError
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


def macintosh_icon_with_hidden_png():
    """The name of the block says 32x32."""
    inner = png(9000, 8000, 8, 0)
    block = b"icp5" + struct.pack(">I", len(inner) + 8) + inner
    return b"icns" + struct.pack(">I", len(block) + 8) + block


def tiff_of_one_large_tile():
    """A picture of 16x16 in a tile of 12000x12000, all of which would be allocated."""
    fields = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 1),
        (262, 1),
        (277, 1),
        (322, 12000),
        (323, 12000),
        (324, 8),
        (325, 1),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(fields)) + entries + bytes(4)


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
    "9000x8000": macintosh_icon_with_hidden_png,
    "12000x12000": tiff_of_one_large_tile,
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
    with pytest.raises(ImageError, match=rf"{width}x{height} (is|are) {width * height} pixels, the limit is 50000000"):
        load_image(data)


def peak_growth(work: Callable[[], object]) -> int:
    """By how many bytes the resident memory of this process exceeds its present size at most, while `work` runs."""
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS:")
    work()
    return 1024 * (kilobytes("VmHWM:") - before)


def refused(source: object) -> Callable[[], object]:
    def work() -> None:
        with pytest.raises(ImageError):
            load_image(source)

    return work


@pytest.mark.parametrize("size", BOMBS)
def test_bombs_take_no_memory(size):
    """Case 48: a refusal costs what the file costs."""
    assert peak_growth(refused(BOMBS[size]())) < 20_000_000


def test_memory_of_a_picture_is_seen():
    """The measurement above means something."""
    data = encoded(Image.new("RGB", (7000, 7000)), "PNG", compress_level=1)
    assert peak_growth(lambda: load_image(data)) > 140_000_000


def test_a_data_uri_over_the_limit_is_not_decoded():
    """Case 48: 100 MB of base64."""
    uri = "data:image/png;base64," + "A" * 100_000_000
    with pytest.raises(ImageError, match="over the limit of 67108864 bytes"):
        load_image(uri)
    assert peak_growth(refused(uri)) < 120_000_000  # one copy of the payload, apart from its header


def test_three_hundred_tiny_pictures(tiny_model):
    """Case 48: they are counted, and refused by what they would take of the context before one of them is resized."""
    dots = [Image.new("RGB", (1, 1), (index % 256, 0, 0)) for index in range(300)]
    model = tiny_model("gemma4")
    with Engine(model.bundle, threads=1) as engine:
        counts = engine.count_tokens([*dots, "what?"], image_tokens=70)
        assert counts["image"] == 300 * 64

        def ask() -> None:
            with pytest.raises(ContextFull, match=rf"{counts['total']}.*{engine.manifest.context}"):
                engine.generate([*dots, "what?"], image_tokens=280)

        counts = engine.count_tokens([*dots, "what?"], image_tokens=280)
        assert peak_growth(ask) < 20_000_000


def test_a_progressive_jpeg_of_endless_scans_is_refused():
    """A scan is a few bytes and as much work as the whole picture; programs write ten or so."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(image, "JPEG", progressive=True)
    assert load_image(data).shape == (64, 64, 3)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError, match=r"a JPEG of 3\d\d scans, the limit is 200"):
        load_image(data[:last] + data[last:-2] * 300 + data[-2:])


def test_an_icon_of_65535_pictures_is_read_in_its_time():
    """Its directory points 65,535 times at a long file; that must not be copied as often."""
    data = (
        struct.pack("<HHH", 0, 1, 65535) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, 40, 0) * 65535 + bytes(2**22)
    )
    begin = time.perf_counter()
    with pytest.raises(ImageError):
        load_image(data)
    assert time.perf_counter() - begin < 5


def test_a_macintosh_icon_of_endless_blocks_is_refused():
    with pytest.raises(ImageError, match="more than 100 blocks"):
        load_image(b"icns" + struct.pack(">I", 2**20) + (b"abcd" + struct.pack(">I", 8)) * 1000)


def test_a_file_over_the_limit_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    path.write_bytes(b"")
    os.truncate(path, 10**9)  # a sparse file
    with pytest.raises(ImageError, match="1000000000 bytes, over the limit of 67108864 bytes of encoded data"):
        load_image(path)


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

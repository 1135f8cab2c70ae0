"""Every container: told by content, its first frame read; what is not read is named."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image
from siglance.engine.image_files import FORMATS

from .picture_files import encoded, gradient, noise, png
from .rare_pictures import rare_pictures

COLOUR = (200, 30, 40)
RARE = rare_pictures(32, 16, COLOUR)
WRITTEN = ["MPO", *(name for name in FORMATS if name not in RARE)]


@pytest.mark.parametrize("format", WRITTEN)
def test_every_format_that_pillow_writes_is_read(format):
    modes = {"XBM", "MSP"}  # of one bit
    image = Image.new("1", (32, 16)) if format in modes else Image.new("RGB", (32, 16), COLOUR)
    data = encoded(image, format)
    pixels = load_image(data)
    expected = (0, 0, 0) if format in modes else COLOUR
    assert np.abs(pixels.astype(int) - expected).max() <= 8
    sides = {"ICO": (8, 16), "ICNS": (1024, 1024)}  # icons come in fixed sizes
    assert pixels.shape == (*sides.get(format, (16, 32)), 3)


@pytest.mark.parametrize("format", RARE)
def test_every_format_that_pillow_only_reads_is_read(format):
    data, colour = RARE[format]
    pixels = load_image(data)
    assert (pixels == colour).all()
    assert pixels.shape == ((512, 768, 3) if format == "PCD" else (16, 32, 3))


def test_no_format_is_missing():
    assert set(FORMATS) == {name for name in WRITTEN if name != "MPO"} | set(RARE)
    assert len(set(FORMATS)) == len(FORMATS)


@pytest.mark.parametrize("format", ["TGA", "PCX", "SGI", "JPEG2000", "QOI", "PSD", "SUN", "FLI"])
def test_a_cut_file_of_any_format_is_an_error(format):
    data = RARE[format][0] if format in RARE else noise(format)
    with pytest.raises(ImageError, match=r"^image: [^\n]+$"):
        load_image(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50), "HEIC.*pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50), "HEIC"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc" + bytes(50), "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + bytes(50), "video.*'mp42'"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<SVG/>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"<?xml version='1.0'?><html/>", "supported format"),
    ],
)
def test_what_people_take_for_a_picture_is_refused_by_name(data, said):
    with pytest.raises(ImageError, match=said):
        load_image(data)


@pytest.mark.parametrize("format", ["PDF", "EPS", "SPIDER", "BLP"])
def test_formats_that_other_programs_draw_or_that_hide_their_size_are_refused(format):
    mode = {"SPIDER": "F", "BLP": "P"}.get(format, "RGB")
    with pytest.raises(ImageError, match=r"PDF|PostScript|supported format"):
        load_image(encoded(Image.new("RGB", (16, 16)).convert(mode), format))


def test_content_is_believed_and_names_are_not(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    np.testing.assert_array_equal(load_image(path), gradient())
    path.write_text("<html>not found</html>")
    with pytest.raises(ImageError, match="supported format"):
        load_image(path)


# ------------------------------------------------------------------------------------------------------------- frames

ANIMATED = {"GIF": {}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "MPO": {"quality": 95}, "AVIF": {}}


@pytest.mark.parametrize("format", ANIMATED)
def test_of_several_frames_the_first_is_read(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **ANIMATED[format])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    assert np.abs(load_image(data)[8, 8].astype(int) - (255, 0, 0)).max() <= 4


def test_a_pil_image_gives_the_frame_it_stands_at():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    image = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(2)
    assert load_image(image)[3, 3].tolist() == [0, 0, 255]


def test_the_picture_beside_an_animation_is_its_first_frame():
    """An APNG may hold a still picture for viewers that do not move."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert load_image(data)[3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("options", [{}, {"transparency": 1}])
def test_a_first_frame_smaller_than_its_canvas_lies_on_white(options):
    """GIF: the frame covers the lower right quarter, the rest of the canvas is drawn by nothing."""
    data = bytearray(encoded(Image.new("RGB", (4, 4), COLOUR), "GIF", **options))
    data[6:10] = struct.pack("<HH", 8, 8)
    at = data.rindex(b"\x2c\0\0\0\0")
    data[at + 1 : at + 5] = struct.pack("<HH", 4, 4)
    image = Image.open(io.BytesIO(data))
    for source in (bytes(data), image, image):  # the second time it is decoded
        pixels = load_image(source)
        assert pixels.shape == (8, 8, 3)
        assert (pixels[:4] == 255).all()
        assert (pixels[4:, :4] == 255).all()
        assert (pixels[4:, 4:] == COLOUR).all()


def test_the_largest_picture_of_an_icon_is_read():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    assert load_image(encoded(image, "ICO", sizes=[(16, 16), (64, 64), (32, 32)])).shape == (64, 64, 3)


# ----------------------------------------------------------------------------------------------- variants of a format


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_tiff_compressions(compression):
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([x * 3, y * 3, (x + y) // 2], axis=-1).astype(np.uint8)
    pixels = load_image(encoded(Image.fromarray(smooth), "TIFF", compression=compression))
    assert np.abs(pixels.astype(int) - smooth).max() <= (12 if compression == "jpeg" else 0)


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"progressive": True}), ("JPEG", {"subsampling": "4:1:1"}), ("PNG", {"interlace": 1}),
     ("WEBP", {"lossless": True}), ("WEBP", {"quality": 90}), ("JPEG2000", {"irreversible": True}),
     ("TGA", {"compression": "tga_rle"}), ("SGI", {"rle": True}), ("GIF", {"interlace": 1})],
    ids=str,
)  # fmt: skip
def test_variants_of_a_format(format, options):
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([x * 3, y * 3, (x + y) // 2], axis=-1).astype(np.uint8)
    pixels = load_image(encoded(Image.fromarray(smooth), format, **options))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels.astype(int) - smooth).mean() <= 4


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_png_of_every_depth(bits):
    """One row of black and white; 16 bits are two bytes."""
    size = max(1, 8 // bits)
    high = (1 << bits) - 1
    packed = sum(high << bits * place for place in range(0, size, 2))
    row = struct.pack(">HH", high, 0) if bits == 16 else bytes([packed]) if bits < 8 else bytes([255, 0])
    width = 2 if bits >= 8 else size
    first = 255 if bits >= 8 else 0  # bits are packed from the left
    assert load_image(png(width, 1, bits, 0, b"\0" + row))[0, :2, 0].tolist() == [first, 255 - first]

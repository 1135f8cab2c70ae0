"""Any form of picture -> upright RGB: orientation, transparency, modes, limits, broken files."""

import base64
import contextlib
import io
import os
import struct
import threading
import urllib.parse
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image

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


# ---------------------------------------------------------------------------------------------------- forms of input


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


def test_every_form_of_a_file_gives_the_same_pixels(tmp_path):
    pixels = gradient()
    for form, source in sources(encoded(Image.fromarray(pixels), "PNG"), tmp_path).items():
        result = load_image(source)
        np.testing.assert_array_equal(result, pixels, err_msg=form)
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous
        assert result.flags.writeable


@pytest.mark.parametrize("format", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF"])
def test_the_listed_formats_are_read(format):
    data = encoded(Image.new("RGB", (32, 16), (200, 30, 40)), format)
    pixels = load_image(data)
    assert np.abs(pixels.astype(int) - (200, 30, 40)).max() <= 8
    assert format == "ICO" or pixels.shape == (16, 32, 3)


@pytest.mark.parametrize("format", ["PDF", "EPS", "TGA", "PCX", "SGI"])
def test_other_formats_of_pillow_are_refused(format):
    with pytest.raises(ImageError, match="supported format"):
        load_image(encoded(Image.new("RGB", (16, 16)), format))


def test_a_file_object_is_read_from_its_position_and_left_open(tmp_path):
    data = encoded(Image.fromarray(gradient()), "PNG")
    path = tmp_path / "two.bin"
    path.write_bytes(b"prefix" + data)
    with path.open("rb", buffering=0) as file:
        file.seek(6)
        np.testing.assert_array_equal(load_image(file), gradient())
        assert not file.closed


def test_a_raw_stream_that_returns_little_at_a_time_is_read_to_its_end():
    data = encoded(Image.fromarray(gradient()), "PNG")

    class Dribble(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    np.testing.assert_array_equal(load_image(Dribble(data)), gradient())


def test_files_we_open_are_closed(tmp_path):
    """pytest turns the ResourceWarning of an unclosed file into an error."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    bad.write_bytes(good.read_bytes()[:60])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    load_image(good)
    with pytest.raises(ImageError):
        load_image(bad)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before


@pytest.mark.parametrize("source", [None, 3, 2.5, ["a.png"], {"url": "a.png"}, object()])
def test_other_types_are_refused_by_name(source):
    with pytest.raises(ImageError, match=rf"image 2 \(x\): .*{type(source).__name__}"):
        load_image(source, name="image 2 (x)")


def data_uris(data):
    plain = base64.b64encode(data).decode()
    return {
        "plain": f"data:image/png;base64,{plain}",
        "URL-safe": f"data:image/png;base64,{base64.urlsafe_b64encode(data).decode()}",
        "no padding": f"data:image/png;base64,{plain.rstrip('=')}",
        "white space": "data:image/png;base64, "
        + "\r\n".join(plain[i : i + 76] for i in range(0, len(plain), 76))
        + "\n",
        "space around": f" \n data:image/png;base64,{plain} ",
        "upper case": f"DATA:IMAGE/PNG;BASE64,{plain}",
        "percent-encoded base64": f"data:image/png;base64,{urllib.parse.quote(plain, safe='')}",
        "percent-encoded bytes": f"data:image/png,{urllib.parse.quote(data, safe='')}",
        "no media type": f"data:;base64,{plain}",
        "wrong media type": f"data:text/html;base64,{plain}",
        "more parameters": f"data:image/png;charset=utf-8;base64,{plain}",
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_data_uris_are_read_tolerantly(size):
    """Three sizes, so that all three lengths of padding occur; noise, so that + and / occur."""
    pixels = np.random.default_rng(size).integers(0, 256, (9, 9, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG") + bytes(size)
    for form, uri in data_uris(data).items():
        np.testing.assert_array_equal(load_image(uri), pixels, err_msg=form)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("data:image/png;base64,", "empty payload"),
        ("data:,", "empty payload"),
        ("data:image/png;base64,====", "empty payload"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,AAAAA", "not base64"),
        ("data:image/png;base64,secret!!", "not base64"),
        ("data:image/png;base64,sécret", "not ASCII"),
        ("data:image/png;base64,c2VjcmV0", "supported format"),
        ("data:image/png;base64," + "A" * 5000, "limit of 1000 bytes"),
        ("data:image/png;base64," + "A" * 1600, "limit of 1000 bytes"),
    ],
)
def test_broken_data_uris_are_refused_without_repeating_them(uri, reason):
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(uri, max_bytes=1000)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "https://example.org/x.png", "file:///etc/hostname"])
def test_urls_are_never_fetched(url):
    with pytest.raises(ImageError, match="not fetched"):
        load_image(url)


# ------------------------------------------------------------------------------------------------------- orientation

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


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_exactly_once(orientation, format, tmp_path):
    """The upright picture is 24 high and 16 wide whatever the file says, through every way in."""
    for form, source in sources(turned(orientation, format), tmp_path).items():
        pixels = load_image(source)
        assert pixels.shape == (24, 16, 3), form
        assert np.abs(pixels.astype(int) - gradient()).max() <= 6, form


def test_a_pil_image_that_was_turned_already_is_not_turned_again():
    for format in ("JPEG", "PNG", "WEBP"):
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(turned(6, format))))
        assert load_image(upright).shape == (24, 16, 3)
        assert np.abs(load_image(upright).astype(int) - gradient()).max() <= 6


def test_broken_exif_counts_as_upright():
    for junk in (
        b"Exif\0\0",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd",
    ):
        data = encoded(Image.fromarray(gradient()), "PNG", exif=junk)
        with warnings.catch_warnings(record=True):
            assert load_image(data).shape == (24, 16, 3)


# ------------------------------------------------------------------------------------------------------ transparency


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


@pytest.mark.parametrize("form", alpha_forms(0))
def test_transparency_is_white_and_hidden_colours_never_show(form):
    one, other = load_image(alpha_forms(1)[form]), load_image(alpha_forms(2)[form])
    alpha = disc_with_hidden_noise(0)[:, :, 3]
    np.testing.assert_array_equal(one, other)
    assert (one[alpha == 0] == WHITE).all()
    solid, blended = one[10, 15].tolist(), one[20, 15].tolist()
    if form in ("LA PNG", "La"):  # white on white: the red channel as grey
        assert solid == blended == [255, 255, 255]
    else:
        assert np.abs(np.array(solid) - RED).max() <= 1
        assert np.abs(np.array(blended) - (255, 127, 127)).max() <= 2


def test_a_grey_blend_is_half_way_to_white():
    image = Image.merge("LA", (Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 128)))
    for source in (image, image.convert("La")):
        assert np.abs(load_image(source).astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
    ("data", "opaque"),
    [
        # pixels: one with the key colour, one with another
        (png(2, 1, 8, 2, b"\0" + bytes([9, 8, 7, 9, 8, 6]), (b"tRNS", struct.pack(">3H", 9, 8, 7))), (9, 8, 6)),
        (png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 999, 8, 7, 16384, 8, 7), (b"tRNS", struct.pack(">3H", 999, 8, 7))),
         (64, 0, 0)),
        (png(2, 1, 8, 0, b"\0" + bytes([9, 8]), (b"tRNS", struct.pack(">H", 9))), (8, 8, 8)),
        (png(2, 1, 4, 0, b"\0" + bytes([0xF2]), (b"tRNS", struct.pack(">H", 15))), (34, 34, 34)),
        (png(2, 1, 2, 0, b"\0" + bytes([0b01_10_0000]), (b"tRNS", struct.pack(">H", 1))), (170, 170, 170)),
        (png(2, 1, 1, 0, b"\0" + bytes([0b01_000000]), (b"tRNS", struct.pack(">H", 0))), (255, 255, 255)),
        (png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 300, 25700), (b"tRNS", struct.pack(">H", 300))), (100, 100, 100)),
    ],
    ids=["RGB", "RGB 16 bit", "L", "L 4 bit", "L 2 bit", "1", "I;16"],
)  # fmt: skip
def test_a_transparent_colour_key_is_white_at_every_depth(data, opaque):
    assert load_image(data)[0].tolist() == [list(WHITE), list(opaque)]
    assert load_image(Image.open(io.BytesIO(data)))[0].tolist() == [list(WHITE), list(opaque)]


def test_a_transparent_gif_is_white_where_nothing_is_drawn():
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([0, 255, 0, 255, 0, 0])
    assert load_image(encoded(image, "GIF", transparency=0))[0].tolist() == [list(WHITE), list(RED)]


# ------------------------------------------------------------------------------------------------------- pixel modes


def ramp_16_bit():
    return np.arange(0, 65536, 64, np.uint16).reshape(32, 32)


def deep_grey_forms():
    ramp = ramp_16_bit()
    big_endian = Image.frombytes("I;16B", (32, 32), ramp.astype(">u2").tobytes())
    integers = Image.fromarray(ramp.astype(np.int32))
    return {
        "16-bit PNG": encoded(Image.fromarray(ramp), "PNG"),
        "16-bit TIFF": encoded(Image.fromarray(ramp), "TIFF"),
        "big-endian TIFF": encoded(big_endian, "TIFF"),
        "32-bit TIFF": encoded(integers, "TIFF"),
        "16-bit PGM": b"P5 32 32 65535\n" + ramp.astype(">u2").tobytes(),
        "I": integers,
        "I;16": Image.fromarray(ramp),
        "I;16B": big_endian,
        "I;16L": Image.frombytes("I;16L", (32, 32), ramp.astype("<u2").tobytes()),
        "F TIFF": encoded(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        "F in 0..1": Image.fromarray(ramp.astype(np.float32) / 65535),
        "uint16 array": ramp,
        "big-endian array": ramp.astype(">u2"),
        "float array": ramp.astype(np.float64) / 65535,
    }


@pytest.mark.parametrize("form", deep_grey_forms())
def test_deep_grey_is_scaled_and_not_clipped(form):
    """A 16-bit ramp keeps all 256 levels; plain conversion would leave 2 of them, nearly all white."""
    pixels = load_image(deep_grey_forms()[form])
    expected = np.round(ramp_16_bit() / 257).astype(int)
    assert len(np.unique(pixels)) == 256
    assert np.abs(pixels[:, :, 0].astype(int) - expected).max() == 0
    assert (pixels == pixels[:, :, :1]).all()


def test_integer_and_float_pil_images_of_8_bit_content_keep_their_levels():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("I", "F"):
        np.testing.assert_array_equal(load_image(Image.fromarray(levels).convert(mode))[:, :, 0], levels)


@pytest.mark.parametrize("value", [-1, 70000, np.nan, np.inf])
def test_grey_without_a_sensible_white_level_is_an_error(value):
    pixels = np.full((4, 4), 5, np.float32)
    pixels[1, 1] = value
    with pytest.raises(ImageError, match=r"mode F, expected values in 0\.\.65535"):
        load_image(Image.fromarray(pixels))


def without_adobe_segment(data):
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def ycck_jpeg():
    """Red as YCCK: YCbCr of the amounts of ink (as if they were red, green and blue), with Adobe transform 2."""
    y, cb, cr = (
        channel.resize((16, 16)) for channel in Image.new("RGB", (16, 16), (0, 255, 255)).convert("YCbCr").split()
    )
    inverted = [Image.eval(channel, lambda value: 255 - value) for channel in (y, cb, cr)]
    data = encoded(Image.merge("CMYK", (*inverted, Image.new("L", (16, 16), 0))), "JPEG", quality=95)
    at = data.index(b"Adobe") + 11
    assert data[at] in (0, 2)
    return data[:at] + b"\x02" + data[at + 1 :]


def red_patches():
    rgb = Image.new("RGB", (16, 16), RED)
    cmyk = rgb.convert("CMYK")
    jpeg = encoded(cmyk, "JPEG", quality=95)
    return {
        "CMYK JPEG": jpeg,
        "CMYK JPEG without Adobe segment": without_adobe_segment(jpeg),
        "YCCK JPEG": ycck_jpeg(),
        "CMYK TIFF": encoded(cmyk, "TIFF"),
        "CMYK": cmyk,
        "LAB": rgb.convert("LAB"),
        "LAB TIFF": encoded(rgb.convert("LAB"), "TIFF"),
        "HSV": rgb.convert("HSV"),
        "YCbCr": rgb.convert("YCbCr"),
        "P": rgb.quantize(2),
        "P PNG": encoded(rgb.quantize(2), "PNG"),
        "RGBX": rgb.convert("RGBX"),
        "RGB with an ICC profile": encoded(
            rgb, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
        ),
    }


@pytest.mark.parametrize("form", red_patches())
def test_a_red_patch_is_red_in_every_colour_space(form):
    assert np.abs(load_image(red_patches()[form]).astype(int) - RED).max() <= 20


def test_bilevel_pictures_are_black_and_white():
    image = Image.fromarray(np.eye(8, dtype=bool))
    for source in (image, encoded(image, "PNG"), encoded(image, "TIFF", compression="group4")):
        np.testing.assert_array_equal(load_image(source)[:, :, 1], np.eye(8) * 255)


def test_a_mode_without_a_rule_is_an_image_error():
    image = Image.new("RGB", (4, 4))
    image._mode = "XYZ"
    with pytest.raises(ImageError, match="pixel mode 'XYZ' is not supported"):
        load_image(image)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"save_all": True, "append_images": frames[1:]}
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        extra = {"lossless": True} if format == "WEBP" else {}
        assert load_image(encoded(frames[0], format, **options, **extra))[3, 3].tolist() == [255, 0, 0], format


# ------------------------------------------------------------------------------------------------------------ arrays


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


def test_where_both_axes_could_be_channels_the_last_one_is():
    array = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3)
    np.testing.assert_array_equal(load_image(array), array)


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
        (np.zeros((5, 4, 2), np.uint8), r"\[5, 4, 2\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\[1, 4, 4, 3\]"),
        (np.zeros(5, np.uint8), r"\[5\]"),
        (np.zeros((), np.uint8), r"\[\]"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (np.zeros((4, 0, 3), np.float32), "no pixels"),
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


def test_pil_images_keep_pixels_mode_and_tags():
    image = Image.open(io.BytesIO(turned(6, "PNG")))
    palette = image.quantize(4)
    palette.info["transparency"] = bytes([0, 255, 255, 255])
    for source in (image, palette):
        image_before, info_before, mode = source.tobytes(), dict(source.info), source.mode
        load_image(source)[:] = 0
        assert (source.tobytes(), dict(source.info), source.mode) == (image_before, info_before, mode)
    assert image.getexif()[ExifTags.Base.Orientation] == 6


# ------------------------------------------------------------------------------------------------------------ limits


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
        assert load_image(source, max_pixels=100).shape == (10, 10, 3)
        with pytest.raises(ImageError, match="10x10 is 100 pixels, the limit is 99"):
            load_image(source, max_pixels=99)


def test_a_raised_limit_is_not_undercut_by_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    data = encoded(Image.new("RGB", (20, 20)), "PNG")
    assert load_image(data).shape == (20, 20, 3)


def test_the_limit_on_bytes_is_exact_and_holds_for_every_form(tmp_path):
    data = encoded(Image.fromarray(gradient()), "PNG")
    for form, source in sources(data, tmp_path).items():
        if form != "PIL":
            load_image(source, max_bytes=len(data))
    for form, source in sources(data, tmp_path).items():
        if form != "PIL":
            with pytest.raises(ImageError, match=f"limit of {len(data) - 1} bytes"):
                load_image(source, max_bytes=len(data) - 1)


def test_an_endless_stream_is_read_up_to_the_limit_only():
    class Endless(io.RawIOBase):
        total = 0

        def read(self, size=-1):
            self.total += size
            return bytes(size)

    stream = Endless()
    with pytest.raises(ImageError, match="limit of 100000 bytes"):
        load_image(stream, max_bytes=100_000)
    assert stream.total == 100_001


# ------------------------------------------------------------------------------------------------------ broken input


def noise(format, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.99])
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}),
     ("AVIF", {})],
    ids=str,
)  # fmt: skip
def test_truncated_files_are_errors_and_never_black(format, options, share):
    data = noise(format, **options)
    with pytest.raises(ImageError, match=r"^image 2 \(street\.jpg\): [^\n]+$"):
        load_image(data[: int(len(data) * share)], name="image 2 (street.jpg)")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"<html><body>404</body></html>", "supported format"), (b"\x89PNG\r\n\x1a\n", "picture"),
     (b"\xff\xd8\xff", "picture"), (b"GIF89a", "picture"), (b"\0" * 100, "supported format"),
     (png(0, 5, 8, 2), "picture|no pixels")],
)  # fmt: skip
def test_what_is_no_picture_says_so(data, reason):
    with pytest.raises(ImageError, match=rf"^image: [^\n]*({reason})[^\n]*$"):
        load_image(data)


def test_content_is_believed_and_names_are_not(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    np.testing.assert_array_equal(load_image(path), gradient())
    path.write_text("<html>not found</html>")
    with pytest.raises(ImageError, match="supported format"):
        load_image(path)


def test_files_that_cannot_be_read_say_why(tmp_path, monkeypatch):
    cases = {
        str(tmp_path / "missing.png"): "missing.png.*No such file",
        str(tmp_path): "directory",
        "nul\0.png": "null",
        "x" * 5000: "too long",
        "": "No such file",
    }
    for path, reason in cases.items():
        with pytest.raises(ImageError, match=rf"^image: cannot read [^\n]*{reason}[^\n]*$") as caught:
            load_image(path)
        assert len(str(caught.value)) < 250

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageError, match="Permission denied"):
        load_image("secret.png")


def test_unusable_file_objects_say_why():
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match="closed file"):
        load_image(closed)
    with pytest.raises(ImageError, match="binary mode"):
        load_image(io.StringIO("text"))


def test_a_closed_pil_image_is_an_error(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(gradient()), "PNG"))
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError):
        load_image(image)


def test_the_settings_of_the_host_program_are_left_alone():
    """Also while other threads look: nothing is changed and changed back."""
    seen, done = set(), threading.Event()

    def settings_now():
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, tuple(map(str, warnings.filters))

    def watch():
        while not done.is_set():
            seen.add(settings_now())

    before = settings_now()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for data in (
            noise("PNG"),
            noise("JPEG")[:500],
            png(30_000, 5_000, 8, 2),
            alpha_forms(1)["P with a tRNS table"],
        ):
            with contextlib.suppress(ImageError):  # pictures and bombs alike
                load_image(data)
    finally:
        done.set()
        watcher.join()
    assert seen | {settings_now()} == {before}


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_give_pixels_or_an_image_error(data):
    """Nothing else leaves `load_image`, whatever byte of whatever format is wrong."""
    original = bytearray(data.draw(st.sampled_from(SMALL_FILES)))
    for _ in range(data.draw(st.integers(1, 4))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow reports damaged metadata as warnings
        pixels = None
        with contextlib.suppress(ImageError):
            pixels = load_image(bytes(original), max_pixels=100_000)
    if pixels is not None:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3


SMALL_FILES = [
    *(
        encoded(Image.fromarray(gradient()), f)
        for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "MPO")
    ),
    encoded(Image.fromarray(gradient()), "TIFF", compression="tiff_lzw"),
    turned(6, "JPEG"),
    turned(6, "PNG"),
    alpha_forms(0)["P with a tRNS table"],
]

"""Every pixel mode becomes RGB of 8 bits: transparency is white, deep grey is scaled, red stays red."""

import io
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from siglance.engine.errors import ImageError
from siglance.engine.image import load_image

from .picture_files import RED, WHITE, alpha_forms, disc_with_hidden_noise, encoded, png, turned


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
    image = Image.open(io.BytesIO(data))
    assert load_image(image)[0].tolist() == [list(WHITE), list(opaque)]
    assert load_image(image)[0].tolist() == [list(WHITE), list(opaque)], "a second time, when it is decoded"


def test_a_transparent_gif_is_white_where_nothing_is_drawn():
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([0, 255, 0, 255, 0, 0])
    assert load_image(encoded(image, "GIF", transparency=0))[0].tolist() == [list(WHITE), list(RED)]


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


@pytest.mark.parametrize("mode", Image.MODES)
def test_black_and_white_survive_in_every_mode(mode):
    """A white and a black half, made in the mode itself where Pillow cannot convert to it."""
    half = Image.new("L", (8, 4), 255)
    half.paste(0, (0, 0, 4, 4))
    if mode.startswith("I;16"):
        wide = np.asarray(half).astype(">u2" if mode == "I;16B" else "<u2") * 257
        image = Image.frombytes(mode, (8, 4), wide.tobytes())
    else:
        steps = {"La": ["LA"], "RGBa": ["RGBA"], "PA": ["P"]}.get(mode, ["RGB"] if mode in ("LAB", "HSV") else [])
        image = half
        for step in [*steps, mode]:
            image = image.convert(step)
    assert image.mode == mode
    pixels = load_image(image).astype(int)
    assert pixels.shape == (4, 8, 3)
    assert pixels[:, :4].max() <= 2
    assert pixels[:, 4:].min() >= 253


def test_bilevel_pictures_are_black_and_white():
    image = Image.fromarray(np.eye(8, dtype=bool))
    for source in (image, encoded(image, "PNG"), encoded(image, "TIFF", compression="group4")):
        np.testing.assert_array_equal(load_image(source)[:, :, 1], np.eye(8) * 255)


def test_a_mode_without_a_rule_is_an_image_error():
    image = Image.new("RGB", (4, 4))
    image._mode = "XYZ"
    with pytest.raises(ImageError, match="pixel mode 'XYZ' is not supported"):
        load_image(image)


def test_pil_images_keep_pixels_mode_and_tags():
    image = Image.open(io.BytesIO(turned(6, "PNG")))
    palette = image.quantize(4)
    palette.info["transparency"] = bytes([0, 255, 255, 255])
    for source in (image, palette):
        image_before, info_before, mode = source.tobytes(), dict(source.info), source.mode
        load_image(source)[:] = 0
        assert (source.tobytes(), dict(source.info), source.mode) == (image_before, info_before, mode)
    assert image.getexif()[ExifTags.Base.Orientation] == 6

"""Pictures in the formats that Pillow reads and does not write, made by hand: one colour all over, or one grey."""

import struct

from PIL import Image

from .picture_files import encoded

__all__ = ["rare_pictures"]


def rare_pictures(width, height, colour):
    """Encoded file and the colour that it really has, by the name of the format."""
    red, green, blue = colour
    rgb, bgr = bytes(colour) * (width * height), bytes((blue, green, red)) * (width * height)
    grey = bytes([green]) * (width * height)
    grey_colour = (green, green, green)
    return {
        "PSD": (psd(width, height, colour), colour),
        "FTEX": (struct.pack("<4s8i", b"FTEX", 1, width, height, 1, 1, 1, 32, len(rgb)) + rgb, colour),
        "XPM": (xpm(width, height, colour), colour),
        "XVTHUMB": (
            b"P7 332\n#END_OF_COMMENTS\n%d %d 255\n" % (width, height) + bytes([0xE0] * len(grey)),
            (255, 0, 0),
        ),
        "SUN": (struct.pack(">8I", 0x59A66A95, width, height, 24, len(bgr), 1, 0, 0) + bgr, colour),
        "DCX": (dcx(width, height, colour), colour),
        "CUR": (cursor(width, height, bgr), colour),
        "PIXAR": (pixar(width, height, rgb), colour),
        "MCIDAS": (mcidas(width, height, grey), grey_colour),
        "FLI": (fli(width, height, colour), colour),
        "GBR": (struct.pack(">7I", 30, 2, width, height, 1, 0x47494D50, 10) + b"x\0" + grey, grey_colour),
        "PCD": (photo_cd(), (0, 0, 0)),
    }


def psd(width, height, colour):
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, height, width, 8, 3)
    planes = b"".join(bytes([level]) * (width * height) for level in colour)
    return header + struct.pack(">3IH", 0, 0, 0, 0) + planes  # no colour map, resources, layers; uncompressed


def xpm(width, height, colour):
    rows = ",\n".join(f'"{"." * width}"' for _ in range(height))
    red, green, blue = colour
    head = f'"{width} {height} 1 1",\n". c #{red:02X}{green:02X}{blue:02X}"'
    return f"/* XPM */\nstatic char *x[] = {{\n{head},\n{rows}}};\n".encode()


def dcx(width, height, colour):
    page = encoded(Image.new("RGB", (width, height), colour), "PCX")
    return struct.pack("<4I", 0x3ADE68B1, 16, 0, 0) + page


def cursor(width, height, bgr):
    bitmap = struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 24, 0, 0, 0, 0, 0, 0) + bgr + bytes(width * height)
    entry = struct.pack("<4BHHII", width, height, 0, 0, 0, 0, len(bitmap), 22)
    return b"\0\0\2\0\1\0" + entry + bitmap


def pixar(width, height, rgb):
    header = bytearray(1024)
    header[:4] = b"\x80\xe8\0\0"
    struct.pack_into("<HH4xHH", header, 416, height, width, 14, 2)
    return bytes(header) + rgb


def mcidas(width, height, grey):
    words = [0] * 64
    words[1], words[8], words[9], words[10], words[13], words[33] = 4, height, width, 1, 1, 256
    return struct.pack(">64i", *words) + grey


def fli(width, height, colour):
    palette = struct.pack("<IH", 6 + 2 + 2 + 3, 4) + struct.pack("<HBB3B", 1, 1, 1, *colour)
    pixels = struct.pack("<IH", 6 + width * height, 16) + bytes([1]) * (width * height)
    chunks = palette + pixels
    frame = struct.pack("<IHH8x", 16 + len(chunks), 0xF1FA, 2) + chunks
    header = struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF12, 1, width, height, 8, 3, 70)
    return header.ljust(128, b"\0") + frame


def photo_cd():
    """Always 768x512; no light and no colour is black."""
    data = bytearray(96 * 2048 + 768 * 512 * 3 // 2)
    data[2048:2052] = b"PCD_"
    chroma = bytes([156] * 384 + [137] * 384)
    at = 96 * 2048
    for _ in range(256):  # two rows of light, one of both colours
        data[at : at + 2304] = bytes(1536) + chroma
        at += 2304
    return bytes(data)

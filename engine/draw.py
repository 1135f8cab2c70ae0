"""Boxes drawn on their picture."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .boxes import Box

__all__ = ["draw_boxes"]

# Twelve hues that differ from their neighbours in lightness too, so that they stay apart for colour-blind readers.
_COLOURS = (
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 90, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (170, 255, 195), (128, 0, 0), (0, 128, 128), (250, 190, 212),
)  # fmt: skip

# Pillow's own font covers little more than ASCII. For other labels these are tried, by the names systems give them.
_SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")

Rectangle = tuple[int, int, int, int]  # x_min, y_min, x_max, y_max in pixels, maxima excluded


_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, slots=True)
class _Tag:
    text: str
    font: _Font
    place: Rectangle
    colour: tuple[int, int, int]


def draw_boxes(pixels: npt.NDArray[np.uint8], boxes: Iterable[Box]) -> Image.Image:
    """A copy of uint8 [H, W, 3] with each box outlined and its label on a tag beside it.

    Line width and letters grow with the picture, equal labels have equal colours, tags stay inside the picture and
    avoid each other where there is room. A label that does not fit into the width of the picture is shortened. Boxes
    are drawn as they are, whatever their `image` says: pass those of this picture.
    """
    drawn = list(boxes)
    image = Image.fromarray(pixels).copy()
    draw = ImageDraw.Draw(image)
    side = min(image.size)
    line = max(1, round(side / 250))
    letters = max(9, round(side / 32))
    labels = list(dict.fromkeys(box.label for box in drawn))
    colours = {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(labels)}

    for box in drawn:
        _outline(draw, _pixel_rectangle(box, image.size), colours[box.label], line)
    tags: list[_Tag] = []  # after all outlines, so that no line crosses a tag
    for box in drawn:
        text, font = _legible(box.label, letters)
        text = _fitting(draw, text, font, image.width - 4 * line)
        if text:
            outline = _pixel_rectangle(box, image.size)
            place = _tag_place(_tag_size(draw, text, font, line), outline, image.size, [tag.place for tag in tags])
            if place is not None:
                tags.append(_Tag(text, font, place, colours[box.label]))
    for tag in tags:
        _write(draw, tag)
    return image


def _pixel_rectangle(box: Box, size: tuple[int, int]) -> Rectangle:
    """The box on whole pixels: inside of the picture and at least one pixel wide and high."""
    width, height = size
    x_min, y_min, x_max, y_max = box.box
    left = min(max(round(x_min), 0), width - 1)
    top = min(max(round(y_min), 0), height - 1)
    return left, top, min(max(round(x_max), left + 1), width), min(max(round(y_max), top + 1), height)


def _outline(draw: ImageDraw.ImageDraw, place: Rectangle, colour: tuple[int, int, int], line: int) -> None:
    left, top, right, bottom = place
    # A thin rim in the opposite lightness: visible on a background of the very colour of the line.
    rim = max(1, line // 3)
    outer = (left - rim, top - rim, right - 1 + rim, bottom - 1 + rim)
    draw.rectangle(outer, outline=_contrast(colour), width=line + 2 * rim)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line)


def _contrast(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is further from `colour` in luminance (Rec. 709)."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in colour)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (0, 0, 0) if luminance > 0.18 else (255, 255, 255)


def _legible(label: str, size: int) -> tuple[str, _Font]:
    """The label on one line, and a font that has its characters.

    If no font has them all, accents are dropped and what is still unknown becomes a question mark.
    """
    text = " ".join(label.split())
    text = text if len(text) <= 100 else text[:99] + "…"
    default = ImageFont.load_default(size=size)
    if text.isascii():
        return text, default
    for font in (default, *_system_fonts(size)):
        if all(_has_glyph(font, character) for character in set(text)):
            return text, font
    plain = [c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)]
    return "".join(c if _has_glyph(default, c) else "?" for c in plain), default


def _system_fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    for name in _SYSTEM_FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:  # not installed
            continue


def _has_glyph(font: _Font, character: str) -> bool:
    """Whether `font` draws `character` differently from a code point that no font has."""

    def drawn(text: str) -> bytes:
        patch = Image.new("L", (64, 64))
        ImageDraw.Draw(patch).text((8, 8), text, font=font, fill=255)
        return patch.tobytes()

    return character == " " or drawn(character) != drawn("\uffff")


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    """The text, shortened with an ellipsis to fit `width` pixels; "" if nothing of it fits."""
    if not text or draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…" if text else ""


def _tag_size(draw: ImageDraw.ImageDraw, text: str, font: _Font, line: int) -> tuple[int, int]:
    """(width, height) of a tag; the height is the same for all texts, so that rows of tags look even."""
    _, top, _, bottom = draw.textbbox((0, 0), "Ágjy", font=font, anchor="lt")
    return int(draw.textlength(text, font=font)) + 1 + 2 * line, int(bottom - top) + 2 * line


def _tag_place(
    tag: tuple[int, int], outline: Rectangle, size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle | None:
    """Above the box, inside it or below it, at its left or right: the first place inside the picture that is free.

    If none is free, the first one inside the picture; None if the picture is not even as high as a tag.
    """
    width, height = tag
    left, top, right, bottom = outline
    rows = (top - height, top, bottom, bottom - height)
    corners = [(x, y) for x in (left, right - width) for y in rows]
    places = []
    for x, y in corners:
        if 0 <= y <= size[1] - height:
            x = max(0, min(x, size[0] - width))
            places.append((x, y, x + width, y + height))
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    return next(free, places[0] if places else None)


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _write(draw: ImageDraw.ImageDraw, tag: _Tag) -> None:
    left, top, right, bottom = tag.place
    draw.rectangle((left, top, right - 1, bottom - 1), fill=tag.colour)
    middle = ((left + right) / 2, (top + bottom) / 2)
    draw.text(middle, tag.text, font=tag.font, fill=_contrast(tag.colour), anchor="mm")

"""Synthetic scenes for the demo model: coloured shapes on a light background and, sometimes, a sign with text on it.

A scene is drawn from a seeded generator. Two rules keep the right answer to every question unambiguous: things do not
overlap, and no two of them start at nearly the same height, so "from top to bottom" is a total order.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "green": (46, 160, 67),
    "blue": (45, 90, 214),
    "yellow": (240, 196, 25),
    "purple": (140, 64, 180),
}
SHAPES = ("circle", "square", "triangle")
LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
SIGN_WORDS = ("STOP", "OPEN", "EXIT", "TAXI", "CAFE", "BANK", "ZOO", "BUS", "SALE", "MENU", "PARK", "FISH")

MAX_OBJECTS = 4
SIZE_RANGE = (0.10, 0.34)  # side of an object as a fraction of sqrt(width * height)
SMALL_BELOW = 0.15  # objects with a smaller side than this count as small
TOP_SEPARATION = 0.05  # least distance of two top edges, as a fraction of the height
SIGN_PROBABILITY = 0.4
ASPECT_RATIOS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))  # width : height

_SPLITS = {"train": 0, "held-out": 1}
_SUPERSAMPLE = 3  # masks are drawn this much larger and averaged down: smooth edges

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the image


def normalised(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(y1, x1, y2, x2) of `box` on the 0-1000 grid of an image of `size` (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    return (
        round(1000 * y1 / height),
        round(1000 * x1 / width),
        round(1000 * y2 / height),
        round(1000 * x2 / width),
    )


@dataclass(frozen=True)
class Thing:
    """One coloured shape; `box` is x1, y1, x2, y2 in pixels."""

    colour: str
    shape: str
    box: Box

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A white board with dark text; `box` is x1, y1, x2, y2 in pixels."""

    text: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """An RGB image and what is on it; `objects` run from top to bottom."""

    image: Image.Image
    objects: tuple[Thing, ...]
    sign: Sign | None

    def is_small(self, thing: Thing) -> bool:
        """Whether a thing is small for this image: those are the ones a larger image budget is for."""
        width, height = self.image.size
        return (thing.box[2] - thing.box[0]) < SMALL_BELOW * math.sqrt(width * height)


def generator(split: str, index: int) -> np.random.Generator:
    """The generator of scene `index` of a split; "train" and "held-out" never share a stream."""
    return np.random.default_rng([_SPLITS[split], index])


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels: one of the aspect ratios, slightly off, with sides between 192 and 512."""
    wide, high = ASPECT_RATIOS[rng.integers(len(ASPECT_RATIOS))]
    long_side = rng.integers(208, 513)
    scale = long_side / max(wide, high)
    return max(192, round(wide * scale)), max(192, round(high * scale))


def scene(
    rng: np.random.Generator | int, size: tuple[int, int] | None = None, object_count: int | None = None
) -> Scene:
    """Draw one scene. An integer means that held-out scene; `size` is (width, height) in pixels."""
    if isinstance(rng, int):
        rng = generator("held-out", rng)
    width, height = size or random_size(rng)
    unit = math.sqrt(width * height)
    wanted = object_count if object_count is not None else int(rng.integers(1, MAX_OBJECTS + 1))
    image = _background(rng, width, height)
    taken: list[Box] = []
    sign = None
    if rng.random() < SIGN_PROBABILITY:
        sign = _place_sign(rng, width, height)
        taken.append(sign.box)
        _draw_sign(image, sign)
    objects = []
    for _ in range(wanted):
        thing = _place_thing(rng, width, height, unit, taken, [o.box[1] for o in objects])
        if thing is not None:
            objects.append(thing)
            taken.append(thing.box)
            _draw_thing(rng, image, thing)
    return Scene(image, tuple(sorted(objects, key=lambda thing: thing.box[1])), sign)


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A soft gradient between four light corner colours."""
    base = rng.integers(205, 246, 3)
    corners = np.clip(base + rng.integers(-14, 15, (2, 2, 3)), 190, 255).astype(np.uint8)
    return Image.fromarray(corners, "RGB").resize((width, height), Image.Resampling.BILINEAR)


def _free(box: Box, taken: list[Box], margin: float) -> bool:
    return all(
        box[2] + margin < other[0]
        or other[2] + margin < box[0]
        or box[3] + margin < other[1]
        or other[3] + margin < box[1]
        for other in taken
    )


def _place_thing(
    rng: np.random.Generator, width: int, height: int, unit: float, taken: list[Box], tops: list[float]
) -> Thing | None:
    """A shape that overlaps nothing and starts at a height of its own, or None when no room was found."""
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    shape = SHAPES[rng.integers(len(SHAPES))]
    side = float(rng.uniform(*SIZE_RANGE)) * unit
    for attempt in range(40):
        if attempt and attempt % 10 == 0:
            side = max(SIZE_RANGE[0] * unit, side * 0.75)
        x, y = float(rng.uniform(0, width - side)), float(rng.uniform(0, height - side))
        box = (x, y, x + side, y + side)
        if all(abs(y - top) >= TOP_SEPARATION * height for top in tops) and _free(box, taken, 0.015 * unit):
            return Thing(colour, shape, box)
    return None


def _place_sign(rng: np.random.Generator, width: int, height: int) -> Sign:
    text = SIGN_WORDS[rng.integers(len(SIGN_WORDS))]
    unit = math.sqrt(width * height)
    sign_height = float(rng.uniform(0.17, 0.23)) * unit
    sign_width = sign_height * (2.0 if len(text) == 3 else 2.5)
    x, y = float(rng.uniform(0, width - sign_width)), float(rng.uniform(0, height - sign_height))
    return Sign(text, (x, y, x + sign_width, y + sign_height))


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _draw_sign(image: Image.Image, sign: Sign) -> None:
    draw = ImageDraw.Draw(image)
    x1, y1, x2, y2 = sign.box
    border = max(1, round((y2 - y1) * 0.05))
    draw.rounded_rectangle(sign.box, radius=(y2 - y1) * 0.12, fill=(255, 255, 255), outline=(60, 60, 70), width=border)
    font = _font(max(8, round((y2 - y1) * 0.74)))
    draw.text(((x1 + x2) / 2, (y1 + y2) / 2), sign.text, fill=(25, 25, 35), font=font, anchor="mm")


def _draw_thing(rng: np.random.Generator, image: Image.Image, thing: Thing) -> None:
    """Paste one shape with smooth edges: its mask is drawn `_SUPERSAMPLE` times larger, then averaged down."""
    x1, y1, x2, y2 = thing.box
    left, top = math.floor(x1), math.floor(y1)
    wide, high = math.ceil(x2) - left, math.ceil(y2) - top
    k = _SUPERSAMPLE
    mask = Image.new("L", (wide * k, high * k), 0)
    draw = ImageDraw.Draw(mask)
    corners = ((x1 - left) * k, (y1 - top) * k, (x2 - left) * k - 1, (y2 - top) * k - 1)
    if thing.shape == "circle":
        draw.ellipse(corners, fill=255)
    elif thing.shape == "square":
        draw.rectangle(corners, fill=255)
    else:
        middle = (corners[0] + corners[2]) / 2
        draw.polygon([(middle, corners[1]), (corners[0], corners[3]), (corners[2], corners[3])], fill=255)
    shade = np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3), 0, 255)
    image.paste(tuple(int(channel) for channel in shade), (left, top), mask.reduce(k))

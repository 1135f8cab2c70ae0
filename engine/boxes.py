"""Boxes in the text of a reply -> pixels of the upright image.

Each convention is one entry of `CONVENTIONS`; the manifest's `reply.boxes` names the one a model was trained on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CONVENTIONS", "TEXT_TOKENS", "Box", "Boxes", "parse_boxes"]


@dataclass(frozen=True, slots=True)
class Box:
    """One box.

    Attributes:
        label: what the model calls it, "" if it does not say.
        box: (x_min, y_min, x_max, y_max) in pixels of the upright image, not rounded. The area may be zero.
        image: index of the image, counted from 0.
    """

    label: str
    box: tuple[float, float, float, float]
    image: int = 0


@dataclass(frozen=True, slots=True)
class Boxes:
    """All complete boxes of a reply, in the order of the text. `truncated`: the text ends before its answer does."""

    boxes: tuple[Box, ...]
    truncated: bool


def parse_boxes(text: str, convention: str, images: Sequence[tuple[int, int]]) -> Boxes:
    """Read the boxes of a reply. No text is an error, and the time is linear in its length.

    Args:
        text: the reply.
        convention: a key of `CONVENTIONS`.
        images: (height, width) of each upright image of the conversation, in pixels.

    "box_2d" (Gemma 4, Gemini): JSON objects `{"box_2d": [y_min, x_min, y_max, x_max], "label": "..."}` on a grid of
    0..1000, anywhere in the text: in fences, lists, wrapper objects or prose, repeated or not. Rules:
        - swapped corners are put in order, values outside of 0..1000 are clamped to it;
        - numbers may be written as strings; a box that is not four finite numbers is left out;
        - a label that is missing or not a string is "";
        - the first image is meant, unless the object has an integer "image" (counted from 0); a box for an image that
          does not exist is left out;
        - trailing commas are accepted; an object that is no JSON otherwise is left out;
        - `truncated` is set when the text ends inside an object or before the end of its list.

    "loc" (PaliGemma): `<locY1><locX1><locY2><locX2> label`, objects joined by " ; ", on a grid of 0..1023 from edge to
    edge (big_vision, `n / 1023` of the side). Rules:
        - swapped corners are put in order; a number that is not in 0..1023 makes no location, but text;
        - a label reaches to the next ";" or the next location; `<segDDD>` tokens in it are left out;
        - of several objects without anything between them the last has the label;
        - fewer than four locations in a row are no box, and the first image is meant always;
        - `truncated` is set when the text ends inside the locations or the 16 segment tokens of an object, or after
          a ";".

    "none": the model answers without boxes; the result is empty.

    Raises:
        ValueError: the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown box convention {convention!r} (known: {', '.join(CONVENTIONS)})")
    return CONVENTIONS[convention](text, images)


def _none(text: str, images: Sequence[tuple[int, int]]) -> Boxes:
    return Boxes((), truncated=False)


_LOC = re.compile(r"<loc(0\d{3}|10[01]\d|102[0-3])>", re.ASCII)
_SEG = re.compile(r"<seg\d{3}>", re.ASCII)
_SEGMENTS = 16  # segment tokens of one mask


def _loc(text: str, images: Sequence[tuple[int, int]]) -> Boxes:
    """PaliGemma's answers to `detect` and `segment` prompts."""
    boxes: list[Box] = []
    truncated = False
    for numbers, behind, is_last in _location_runs(text):
        label, separator, rest = behind.partition(";")
        name = _SEG.sub("", label).strip()
        count = len(numbers) // 4
        if images:
            boxes += [
                _grid_box(numbers[4 * k : 4 * k + 4], 1023, name if k == count - 1 else "", images[0], 0)
                for k in range(count)
            ]
        if is_last:
            unfinished = len(numbers) % 4 or len(_SEG.findall(label)) % _SEGMENTS
            truncated = (bool(unfinished) and not name and not separator) or (bool(separator) and not rest.strip())
    return Boxes(tuple(boxes), truncated)


def _location_runs(text: str) -> Iterator[tuple[list[float], str, bool]]:
    """Each run of location tokens, the text from it to the next run, and whether it is the last run."""
    numbers: list[float] = []
    end = 0
    for match in _LOC.finditer(text):
        between = text[end : match.start()]
        if numbers and between.strip():
            yield numbers, between, False
            numbers = []
        numbers.append(float(match[1]))
        end = match.end()
    if numbers:
        yield numbers, text[end:], True


def _box_2d(text: str, images: Sequence[tuple[int, int]]) -> Boxes:
    boxes: list[Box] = []
    in_list = False
    last = end = 0  # end of the last object; of the outermost one around it
    for start, stop, found in _objects_with(text, "box_2d"):
        before = _last_visible(text, start)
        in_list = before == "[" or (in_list and before == ",")
        last, end = stop, max(end, stop)
        boxes.extend(box for item in found if (box := _read_box_2d(item, images)) is not None)
    list_is_open = in_list and not text[last:].lstrip(" \t\r\n,").startswith("]")
    return Boxes(tuple(boxes), truncated=list_is_open or _UNFINISHED.search(text, end) is not None)


def _last_visible(text: str, stop: int) -> str:
    """The last character before `stop` that is not white space, "" if there is none."""
    while stop and text[stop - 1].isspace():
        stop -= 1
    return text[stop - 1 : stop]


def _read_box_2d(item: dict[str, Any], images: Sequence[tuple[int, int]]) -> Box | None:
    """One JSON object -> Box, or None if a rule of `parse_boxes` leaves it out."""
    grid = item["box_2d"]
    index = item.get("image", 0)
    if not isinstance(index, int) or isinstance(index, bool):
        index = 0
    if not isinstance(grid, list) or len(grid) != 4 or not 0 <= index < len(images):
        return None
    values = [_number(value) for value in grid]
    if not all(map(math.isfinite, values)):
        return None
    label = item.get("label")
    # JSON can spell half of a surrogate pair, which no output stream would accept.
    text = label.encode("utf-8", "replace").decode() if isinstance(label, str) else ""
    return _grid_box(values, 1000, text, images[index], index)


def _grid_box(values: Sequence[float], grid: int, label: str, size: tuple[int, int], image: int) -> Box:
    """(y, x, y, x) on a grid of 0..`grid` -> pixels of an image of `size` (height, width)."""
    y_first, x_first, y_second, x_second = (min(max(value, 0.0), grid) for value in values)
    height, width = size
    x_min, x_max = sorted((x_first * width / grid, x_second * width / grid))
    y_min, y_max = sorted((y_first * height / grid, y_second * height / grid))
    return Box(label, (x_min, y_min, x_max, y_max), image)


def _number(value: object) -> float:
    """`value` as a float, NaN if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):  # not a number in a string; an integer beyond the range of float
        return math.nan


# A JSON object, seen from far away: braces that balance outside of strings, with at most one level of objects inside.
# It only says where to call the JSON decoder. Calling it at every brace takes quadratic time on `{"a":{"a":...`, and
# decoding from the outermost brace fails as a whole on a truncated answer. Possessive repetition (`*+`) and the absence
# of bare backslashes keep the search linear: of all attempts at most a few can be alive at one place of the text.
_STRING = r'"(?:[^"\\]++|\\.)*+"'
_FLAT_OBJECT = rf'\{{(?:[^"\\{{}}]++|{_STRING})*+\}}'
_OBJECT = re.compile(rf'\{{(?=\s*+")(?:[^"\\{{}}]++|{_STRING}|{_FLAT_OBJECT})*+\}}', re.DOTALL)
_UNFINISHED = re.compile(r'\{\s*+(?:"|\Z)|\[\s*+\Z')
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*+[\]}}])", re.DOTALL)
_DECODER = json.JSONDecoder(strict=False)  # not strict: line breaks inside strings


def _objects_with(text: str, key: str) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """Start and end of each object in the text, and the JSON objects with `key` in it: none if it is no JSON.

    An object that is no JSON is searched for objects inside it, which follow it. See `_OBJECT` for what is found.
    """
    position = 0
    while match := _OBJECT.search(text, position):
        position = match.end()
        found: list[dict[str, Any]] = []
        if f'"{key}"' in match.group():
            try:
                value, _ = _DECODER.raw_decode(_TRAILING_COMMA.sub(r"\1", match.group()))
                found = list(_walk(value, key))
            except (ValueError, RecursionError):  # ValueError also for an integer of thousands of digits
                position = match.start() + 1
        yield match.start(), match.end(), found


def _walk(value: object, key: str) -> Iterator[dict[str, Any]]:
    """All objects with `key` inside a JSON value, in order; not recursive, because arrays may be nested deeply."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if key in value:
                yield value
            pending.extend(reversed(value.values()))
        elif isinstance(value, list):
            pending.extend(reversed(value))


CONVENTIONS: dict[str, Callable[[str, Sequence[tuple[int, int]]], Boxes]] = {
    "box_2d": _box_2d,
    "loc": _loc,
    "none": _none,
}

# Tokens of a convention that are part of the text of prompts and replies, whatever a tokenizer says about them.
TEXT_TOKENS: dict[str, tuple[str, ...]] = {
    "loc": (*(f"<loc{number:04d}>" for number in range(1024)), *(f"<seg{number:03d}>" for number in range(128)))
}

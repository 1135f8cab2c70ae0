"""Boxes drawn on pictures."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine import draw
from siglance.engine.boxes import Box
from siglance.engine.draw import draw_boxes

GREY = 110


def grey(height, width):
    return np.full((height, width, 3), GREY, np.uint8)


def drawn(pixels, *boxes):
    return np.asarray(draw_boxes(pixels, boxes))


def test_the_outline_lies_on_the_box_and_the_inside_is_untouched():
    result = drawn(grey(400, 600), Box("", (100, 50, 500, 350)))
    changed = (result != GREY).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert np.abs(np.array([columns[0], rows[0], columns[-1], rows[-1]]) - (100, 50, 499, 349)).max() <= 2
    assert not changed[60:340, 110:490].any()


def test_the_input_is_not_modified():
    pixels = grey(50, 60)
    draw_boxes(pixels, [Box("car", (5, 5, 40, 40))])
    assert (pixels == GREY).all()


def test_no_boxes_give_the_picture():
    np.testing.assert_array_equal(drawn(grey(5, 6)), grey(5, 6))


def test_lines_and_letters_grow_with_the_picture():
    def share_of_changed_pixels(scale):
        box = Box("car", (20 * scale, 50 * scale, 150 * scale, 150 * scale))
        return (drawn(grey(200 * scale, 200 * scale), box) != GREY).any(axis=2).mean()

    assert share_of_changed_pixels(12) > share_of_changed_pixels(3) / 2


def tags_of(monkeypatch, pixels, *boxes):
    seen = []
    write = draw._write
    monkeypatch.setattr(draw, "_write", lambda canvas, tag: (seen.append(tag), write(canvas, tag)))
    draw_boxes(pixels, boxes)
    return seen


@pytest.mark.parametrize("size", [(24, 24), (64, 64), (40, 900), (900, 40), (1500, 2000)])
@pytest.mark.parametrize("corner", list(itertools.product((0.0, 0.9), repeat=2)))
@pytest.mark.parametrize("label", ["car", "a long label " * 20, "line\nbreak\tand tab"])
def test_tags_stay_inside_the_picture(monkeypatch, size, corner, label):
    height, width = size
    left, top = corner[0] * width, corner[1] * height
    (tag,) = tags_of(monkeypatch, grey(*size), Box(label, (left, top, left + width / 10, top + height / 10)))
    x_min, y_min, x_max, y_max = tag.place
    assert 0 <= x_min < x_max <= width
    assert 0 <= y_min < y_max <= height
    assert "\n" not in tag.text
    assert tag.text == " ".join(label.split()) or tag.text.endswith("…")


def test_tags_of_boxes_at_the_same_place_do_not_overlap(monkeypatch):
    tags = tags_of(monkeypatch, grey(400, 600), *(Box(f"box {i}", (100, 100, 300, 300)) for i in range(4)))
    for one, other in itertools.combinations(tags, 2):
        assert not draw._overlap(one.place, other.place)


def test_equal_labels_have_one_colour_and_different_labels_different_ones(monkeypatch):
    labels = ["car", "dog", "car", *(f"thing {i}" for i in range(10))]
    tags = tags_of(
        monkeypatch, grey(600, 800), *(Box(label, (50 * i, 50, 50 * i + 40, 90)) for i, label in enumerate(labels))
    )
    colours = {}
    for tag in tags:
        assert colours.setdefault(tag.text, tag.colour) == tag.colour
    assert len(set(colours.values())) == len(colours) == 12


@pytest.mark.parametrize("colour", draw._COLOURS)
def test_text_and_rim_contrast_with_every_colour(colour):
    """At least 3:1 between letters and tag (WCAG 2 for large text), and between line and rim."""

    def luminance(rgb):
        return sum(w * (c / 255) ** 2.2 for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))

    lighter, darker = sorted((luminance(colour), luminance(draw._contrast(colour))), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 3


@pytest.mark.parametrize("background", draw._COLOURS)
def test_a_box_is_visible_on_a_background_of_its_own_colour(background):
    pixels = np.full((100, 100, 3), background, np.uint8)
    assert (drawn(pixels, Box("", (20, 20, 80, 80))) != pixels).any()


@pytest.mark.parametrize("label", ["Müller", "東京", "🚗", "日本 ] \u200d\ufeff", "\x00\x07", "e\u0301"])
def test_any_script_leaves_a_tag(monkeypatch, label):
    (tag,) = tags_of(monkeypatch, grey(300, 300), Box(label, (50, 50, 200, 200)))
    assert tag.text


def test_without_a_font_for_it_a_label_loses_accents_and_keeps_its_length(monkeypatch):
    monkeypatch.setattr(draw, "_SYSTEM_FONTS", ())
    assert draw._legible("Zoë 東京", 20)[0] == "Zoe ??"


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.lists(st.builds(Box, st.text(max_size=20), st.tuples(*[st.floats(-10, 70)] * 4)), max_size=4),
)
def test_any_box_can_be_drawn_on_any_picture(size, boxes):
    result = draw_boxes(grey(*size), boxes)
    assert result.size == (size[1], size[0])
    assert result.mode == "RGB"

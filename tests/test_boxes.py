"""Boxes in replies: the conventions box_2d and loc."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.engine.boxes import CONVENTIONS, Box, Boxes, parse_boxes

SIZE = (675, 1200)  # height, width
TITLE = {"box_2d": [0, 0, 100, 1000], "label": "title bar"}
CAR = {"box_2d": [250, 500, 500, 750], "label": "car"}
TITLE_BOX = Box("title bar", (0.0, 0.0, 1200.0, 67.5))
CAR_BOX = Box("car", (600.0, 168.75, 900.0, 337.5))
BOTH = json.dumps([TITLE, CAR])


def read(text, images=(SIZE,)):
    return parse_boxes(text, "box_2d", images)


def boxes_of(*values, **rest):
    return read(json.dumps({"box_2d": list(values), **rest})).boxes


def test_y_comes_first_and_the_grid_is_a_thousand():
    """A title bar is wide and flat; with x and y mixed up it would be tall and thin."""
    assert read(json.dumps(TITLE)) == Boxes((TITLE_BOX,), truncated=False)


@pytest.mark.parametrize(
    "text",
    [
        BOTH,
        f"```json\n{BOTH}\n```",
        f"```json\n{json.dumps([TITLE, CAR], indent=2)}\n```",
        f"Here are the [two] things {{see below}} I found:\n{BOTH}\nAnything else? :}}",
        f"```json\n{json.dumps([TITLE])}\n```\nand\n```json\n{json.dumps([CAR])}\n```",
        f"{json.dumps(TITLE)}\n{json.dumps(CAR)}",
        f"[{json.dumps(TITLE)}, {json.dumps(CAR)},]",
        BOTH.replace('"}', '",}').replace("]", " , ]"),
        json.dumps({"objects": [TITLE, CAR]}),
        json.dumps({"scene": {"count": 2, "objects": [TITLE, CAR]}}),
        json.dumps([{**TITLE, "attributes": {"colour": "blue"}}, CAR]),
        json.dumps([{**TITLE, "children": [CAR]}]),
        f"{{not json: {BOTH}}}",
        BOTH.replace("car", "ca\\u0072"),
    ],
    ids=["list", "fence", "indented", "prose", "two fences", "lines", "comma in list", "commas everywhere", "wrapper",
         "two wrappers", "nested object", "boxes in boxes", "braces in prose", "escapes"],
)  # fmt: skip
def test_boxes_are_found_in_any_wrapping(text):
    assert read(text) == Boxes((TITLE_BOX, CAR_BOX), truncated=False)


@pytest.mark.parametrize("text", ["", "no boxes here", "[]", "```json\n[]\n```", "{}", '{"label": "car"}', "a { b [ c"])
def test_a_text_without_boxes_is_empty_and_complete(text):
    assert read(text) == Boxes((), truncated=False)


def test_an_answer_cut_anywhere_keeps_its_complete_objects_and_says_so():
    text = json.dumps([TITLE, CAR, {"box_2d": [1, 2, 3, 4], "label": 'third ] } , " one'}])
    ends = [text.index("}") + 1, text.index("}", text.index("}") + 1) + 1, len(text) - 1]
    for length in range(1, len(text)):
        complete = sum(end <= length for end in ends)
        result = read("```json\n" + text[:length])
        assert result.truncated, text[:length]
        assert [box.label for box in result.boxes] == ["title bar", "car", 'third ] } , " one'][:complete], text[
            :length
        ]
    assert not read(text).truncated


def test_single_objects_and_wrappers_can_be_cut_too():
    assert read(json.dumps(CAR)[:-1]) == Boxes((), truncated=True)
    assert read(json.dumps({"objects": [TITLE, CAR]})[:-12]) == Boxes((TITLE_BOX,), truncated=True)
    assert read(f"{json.dumps(TITLE)}\n" + "{") == Boxes((TITLE_BOX,), truncated=True)


def test_an_object_that_is_no_json_is_left_out_alone():
    text = f'[{json.dumps(TITLE)}, {{"box_2d": [1, 2, 3 4], "label": "bad"}}, {json.dumps(CAR)}]'
    assert read(text) == Boxes((TITLE_BOX, CAR_BOX), truncated=False)
    assert read(f'[{json.dumps(TITLE)}, {{"box_2d": [1, 2, 3 4]}}]') == Boxes((TITLE_BOX,), truncated=False)


def test_numbers_may_be_floats_or_written_as_strings():
    assert boxes_of(250.0, 500.0, 500.0, 750.0, label="car") == (CAR_BOX,)
    assert boxes_of("250", "500.0", " 500 ", "7.5e2", label="car") == (CAR_BOX,)


@pytest.mark.parametrize(
    "values",
    [[1, 2, 3], [1, 2, 3, 4, 5], [], [1, 2, 3, None], [1, 2, 3, True], [1, 2, 3, "four"], [1, 2, 3, [4]], [1, 2, 3, {}],
     [1, 2, 3, float("nan")], [1, 2, 3, float("inf")], [1, 2, 3, "nan"], [1, 2, 3, 10**400]],
)  # fmt: skip
def test_a_box_that_is_not_four_finite_numbers_is_left_out(values):
    assert boxes_of(*values) == ()


@pytest.mark.parametrize("value", ["null", "7", '"0 0 1 1"', '{"y": 1}', "1" * 10_000, "[" * 50_000 + "]" * 50_000])
def test_a_box_that_is_no_list_is_left_out(value):
    assert read(f'{{"box_2d": {value}}} {json.dumps(CAR)}').boxes == (CAR_BOX,)


def test_swapped_corners_are_put_in_order():
    assert boxes_of(500, 750, 250, 500, label="car") == (CAR_BOX,)
    assert boxes_of(250, 750, 500, 500, label="car") == (CAR_BOX,)


def test_values_outside_the_grid_are_clamped_to_the_picture():
    assert boxes_of(-3, -1000, 1001, 1e300) == (Box("", (0.0, 0.0, 1200.0, 675.0)),)
    assert boxes_of(2000, 2000, 3000, 3000) == (Box("", (1200.0, 675.0, 1200.0, 675.0)),)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("a ] b", "a ] b"), ("} { [", "} { ["), ('say "hi" \\', 'say "hi" \\'), ("東京 🚗", "東京 🚗"), ("a\nb", "a\nb"),
     ("", ""), (None, ""), (5, ""), (["a"], ""), ("\ud800", "?")],
)  # fmt: skip
def test_labels_survive_and_anything_else_is_empty(label, expected):
    for ascii_only in (True, False):
        text = json.dumps([{"box_2d": [250, 500, 500, 750], "label": label}, TITLE], ensure_ascii=ascii_only)
        assert [box.label for box in read(text).boxes] == [expected, "title bar"]
    result = read(text).boxes[0].label
    assert result.encode().decode() == result  # printable on any stream


def test_line_breaks_inside_a_string_are_accepted():
    assert read('{"box_2d": [250, 500, 500, 750], "label": "two\nlines"}').boxes[0].label == "two\nlines"


def test_a_missing_label_is_empty():
    assert boxes_of(250, 500, 500, 750) == (Box("", CAR_BOX.box),)


def test_the_first_image_is_meant_unless_the_object_names_one():
    images = [(1000, 1000), (500, 2000)]
    text = json.dumps([{"box_2d": [0, 0, 1000, 1000], "image": i} for i in (0, 1, 2, -1, "1", True, None, 1.0)])
    first, second = (0.0, 0.0, 1000.0, 1000.0), (0.0, 0.0, 2000.0, 500.0)
    found = [(box.image, box.box) for box in read(text, images).boxes]
    assert found == [(0, first), (1, second), (0, first), (0, first), (0, first), (0, first)]
    assert read(BOTH, []).boxes == ()


# --- loc


def loc(*values):
    return "".join(f"<loc{value:04d}>" for value in values)


def seg(count=16):
    return "".join(f"<seg{index % 128:03d}>" for index in range(count))


def read_loc(text, images=(SIZE,)):
    return parse_boxes(text, "loc", images)


WHOLE = (0.0, 0.0, 1200.0, 675.0)
TITLE_LOC = (0.0, 0.0, 1200.0, 675.0 * 100 / 1023)


def test_locations_are_y_before_x_on_a_grid_of_1023():
    """A title bar is wide and flat; the last bin is the edge of the picture."""
    found = read_loc(f"{loc(0, 0, 100, 1023)} title bar")
    assert found == Boxes((Box("title bar", pytest.approx(TITLE_LOC)),), truncated=False)
    assert read_loc(loc(341, 682, 1023, 1023) + " x").boxes[0].box == pytest.approx((800, 225, 1200, 675))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (f"{loc(0, 0, 1023, 1023)} cat ; {loc(0, 0, 1023, 1023)} two dogs", ["cat", "two dogs"]),
        (f"{loc(0, 0, 1023, 1023)} cat;{loc(0, 0, 1023, 1023)}dog", ["cat", "dog"]),
        (f"{loc(0, 0, 1023, 1023)} cat {loc(0, 0, 1023, 1023)} dog\n", ["cat", "dog"]),
        (f"There: {loc(0, 0, 1023, 1023)} cat ; nothing else", ["cat"]),
        (f"{loc(0, 0, 1023, 1023)}{loc(0, 0, 1023, 1023)} cat", ["", "cat"]),
        (f"{loc(0, 0, 1023, 1023)}", [""]),
        (f"{loc(0, 0, 1023, 1023)}{seg()} cat ; {loc(0, 0, 1023, 1023)}{seg()} dog", ["cat", "dog"]),
        (f"{loc(0, 0, 1023, 1023)} {seg()}", [""]),
        (f"{loc(0, 0, 1023)} cat ; {loc(0, 0, 1023, 1023)} dog", ["dog"]),
        (f"{loc(0, 0, 1023, 1023, 5)} cat", ["cat"]),
        ("<loc0000> <loc0000>\n<loc1023><loc1023> <b>東京</b>", ["<b>東京</b>"]),
    ],
    ids=["two", "no spaces", "no semicolon", "prose", "no label between", "alone", "segments", "segments alone",
         "three locations", "five locations", "white space"],
)  # fmt: skip
def test_locations_are_found_with_their_labels(text, labels):
    assert read_loc(text) == Boxes(tuple(Box(label, WHOLE) for label in labels), truncated=False)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (loc(0), 0),
        (loc(0, 0, 1023), 0),
        (f"{loc(0, 0, 1023, 1023)} cat ; {loc(0, 0)}", 1),
        (f"{loc(0, 0, 1023, 1023)} cat ;", 1),
        (f"{loc(0, 0, 1023, 1023)} cat ; ", 1),
        (f"{loc(0, 0, 1023, 1023)}{seg(7)}", 1),
    ],
)
def test_an_answer_cut_off_keeps_complete_objects_and_says_so(text, boxes):
    found = read_loc(text)
    assert found.truncated
    assert len(found.boxes) == boxes


@pytest.mark.parametrize(
    "text", ["", "a cat", "<loc12>", "<loc00001>", "<loc١٢٣٤>", "<loc1024>" * 4, "<loc9999>", seg(), "; ;", "<loc"]
)
def test_a_text_without_locations_is_empty_and_complete(text):
    assert read_loc(text) == Boxes((), truncated=False)


def test_locations_are_put_in_order():
    assert read_loc(loc(1023, 1023, 0, 0) + " x").boxes == (Box("x", WHOLE),)


def test_a_location_beyond_the_grid_is_text():
    """There is no such token: the model has spelled it."""
    assert read_loc(loc(0, 0, 1024, 1023) + " x") == Boxes((), truncated=False)
    assert [box.label for box in read_loc(f"{loc(0, 0, 9, 9)} <loc1024> x").boxes] == ["<loc1024> x"]


def test_locations_mean_the_first_image():
    assert [box.image for box in read_loc(loc(0, 0, 9, 9) * 2, [SIZE, (1, 1)]).boxes] == [0, 0]
    assert read_loc(loc(0, 0, 9), []) == Boxes((), truncated=True)
    assert read_loc(loc(0, 0, 9, 9), []).boxes == ()


loc_pieces = st.sampled_from(
    [
        loc(0),
        loc(512),
        loc(1023),
        loc(7, 8, 9, 10),
        seg(1),
        seg(16),
        "<loc",
        "9999>",
        "<",
        ">",
        ";",
        " ; ",
        " ",
        "cat",
        "\ud800",
    ]
)


@settings(deadline=None, max_examples=150)
@given(st.text() | st.lists(loc_pieces, max_size=30).map("".join))
def test_any_text_gives_locations_inside_the_picture(text):
    for box in read_loc(text).boxes:
        x_min, y_min, x_max, y_max = box.box
        assert 0 <= x_min <= x_max <= 1200
        assert 0 <= y_min <= y_max <= 675
        assert box.image == 0
        assert ";" not in box.label
        assert "<seg0" not in box.label


plain_label = st.text(st.characters(exclude_characters=";<", exclude_categories=["Cs"]), min_size=1).map(str.strip)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1023), min_size=4, max_size=4), plain_label.filter(bool)), max_size=5)
)
def test_any_valid_detection_is_read_in_full(objects):
    result = read_loc(" ; ".join(f"{loc(*values)} {label}" for values, label in objects))
    assert not result.truncated
    assert [box.label for box in result.boxes] == [label for _, label in objects]
    for box, (values, _) in zip(result.boxes, objects, strict=True):
        y_min, y_max = sorted(values[::2])
        x_min, x_max = sorted(values[1::2])
        expected = [
            value / 1023 * side for value, side in zip((x_min, y_min, x_max, y_max), (1200, 675) * 2, strict=True)
        ]
        assert box.box == pytest.approx(expected)


@pytest.mark.parametrize(
    "piece",
    ["<loc0000>", "<loc0000> ", "<loc0000>x", "<loc0000>;", "<loc", "<loc0", " ", ";", "<seg000>",
     loc(1, 2, 3, 4) + "<seg000>", loc(1, 2, 3, 4) + " a ; ", "<loc0000>\n\n<"],
)  # fmt: skip
def test_the_time_for_locations_is_linear_too(piece):
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    read_loc(text)
    assert time.process_time() - started < 2


# --- both


def test_conventions_are_a_registry(monkeypatch):
    assert parse_boxes(BOTH, "none", [SIZE]) == Boxes((), truncated=False)
    with pytest.raises(ValueError, match=r"'polygon' .*box_2d"):
        parse_boxes(BOTH, "polygon", [SIZE])
    monkeypatch.setitem(CONVENTIONS, "polygon", lambda text, images: Boxes((CAR_BOX,), truncated=False))
    assert parse_boxes(BOTH, "polygon", [SIZE]).boxes == (CAR_BOX,)


pieces = st.sampled_from(
    ['{"box_2d": [1, 2, 3, 4], "label": "a"}', '{"box_2d":', "[1,2,3,4]", "{", "}", "[", "]", '"', "\\", ",", ":",
     "label", '"box_2d"', "1e999", "NaN", "-Infinity", "null", "\\u12", " ", "\n", "```json", '"image": 1', "\ud800"]
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.text() | st.lists(pieces, max_size=30).map("".join))
def test_any_text_gives_boxes_inside_their_picture(text):
    for box in read(text).boxes:
        x_min, y_min, x_max, y_max = box.box
        assert 0 <= x_min <= x_max <= 1200
        assert 0 <= y_min <= y_max <= 675
        assert box.image == 0


@given(st.lists(st.tuples(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.text()), max_size=5))
def test_any_valid_answer_is_read_in_full(objects):
    """Whatever is in the labels."""
    text = json.dumps([{"label": label, "box_2d": values} for values, label in objects], ensure_ascii=False)
    result = read(f"Sure:\n{text}")
    assert not result.truncated
    assert [box.label for box in result.boxes] == [label for _, label in objects]


@pytest.mark.parametrize(
    "piece",
    ["[", "{", '{"', '{"box_2d":', '{"a":{"box_2d":', '{"box_2d":[', '{"box_2d":[1,', "{}", '{"\\', '{\\"', '{"a {"b" ',
     '}{"', '{"a":[1,],}', '"box_2d"', '{"box_2d" {}', ",", "{  ", '{""}', '{"box_2d": [[', "\\"],
)  # fmt: skip
def test_the_time_is_linear_in_a_megabyte_of_anything(piece):
    """Processor time, so that other work on the machine matters little. Quadratic behaviour takes minutes."""
    text = piece * (1_000_000 // len(piece))
    started = time.process_time()
    read(text)
    assert time.process_time() - started < 2

"""What a caller may put into a prompt is made one form at once, and nothing else is accepted."""

import io
import re
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image as PillowImage

from siglance.engine.errors import PromptError
from siglance.engine.parts import Audio, Image, Pdf, Turn, Video, turns_of
from siglance.engine.prompt import Text
from siglance.engine.reply import EncodedImage


def only(part):
    [(role, [normal])] = turns_of(part, None)
    assert role == "user"
    return normal


FILES = [
    *(f"a.{ending}" for ending in ("png", "jpg", "JPEG", "webp", "gif", "bmp", "tif", "tiff", "ppm", "ico", "avif")),
    *(
        f"a.{ending}"
        for ending in ("apng", "mpo", "jp2", "tga", "psd", "qoi", "dds", "pcx", "sgi", "icns", "cur", "pgm")
    ),
    *(f"a.{ending}" for ending in ("pdf", "PDF", "heic", "svg", "jxl")),
    *("/a b/photo one.png", "./x.pdf", "data:image/png;base64,AAAA", "DATA:image/x,AA", " data:image/gif,GIF"),
    *("data:application/pdf;base64,JVBE", "data:application/x-pdf,%25PDF"),
]
TEXTS = [
    "",
    "a.txt",
    "describe a.png please",
    "what is in a.png\n",
    "line\na.png",
    "png",
    ".pn",
    "data:text/plain,a.png ",
    "data:",
]


@pytest.mark.parametrize("text", FILES)
def test_a_line_that_ends_like_a_file_is_a_file(text):
    part = only(text)
    assert isinstance(part, Image)
    assert part.source == text
    assert only(Text(text)) == Text(text)


@pytest.mark.parametrize("text", TEXTS)
def test_any_other_text_is_text(text):
    assert only(text) == Text(text)


@pytest.mark.parametrize(
    "source",
    [Path("a.bin"), PurePosixPath("a.png"), b"x", bytearray(b"x"), memoryview(b"x"), io.BytesIO(b"x"),
     PillowImage.new("L", (1, 1)), np.zeros((9, 9))],
    ids=lambda source: type(source).__name__,
)  # fmt: skip
def test_everything_that_can_hold_a_file_is_one(source):
    part = only([source])
    assert isinstance(part, Image)
    assert part.source is source
    assert part.tokens is None


@pytest.mark.parametrize(
    "part", [Text("a"), Image("a.png", 70), Pdf("a.pdf", "1-2", 70), EncodedImage(np.zeros((1, 1)), (1, 1), "x")]
)
def test_what_has_a_type_of_its_own_is_left_as_it_is(part):
    assert only(part) is part


@pytest.mark.parametrize("part", [None, 3, {"type": "text"}, object(), [["nested"]], {"a.png"}])
def test_anything_else_is_refused_by_type(part):
    kinds = "text, a picture, a sound, a PDF or a video"
    with pytest.raises(PromptError, match=rf"part 1 is of type \w+, expected {kinds}"):
        turns_of(["x", part], None)


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ({"role": "user", "content": "x"}, "a message is Turn(role, parts)"),
        (["a.png", "x"], "several parts are one list"),
        ((part for part in ("a.png", "x")), "several parts are one list"),
    ],
)
def test_forms_of_other_libraries_are_refused_with_ours(part, hint):
    with pytest.raises(PromptError, match=re.escape(f"or a video: {hint}") + "$"):
        turns_of([part], None)


def test_a_system_text_is_text():
    with pytest.raises(PromptError, match="system is int, expected text"):
        turns_of("x", 5)


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (Image("a.png", 70), "Image(source='a.png', tokens=70)"),
        (Image(b"x" * 10**6), "Image(source=<1000000 bytes>, tokens=None)"),
        (Image(memoryview(np.zeros(9, "<u2"))), "Image(source=<18 bytes>, tokens=None)"),
        (Image(np.zeros((9, 8, 3), np.uint8)), "Image(source=<uint8 [9, 8, 3]>, tokens=None)"),
        (Image("data:image/png," + "A" * 10**6), f"Image(source='data:image/png,{'A' * 64}…', tokens=None)"),
        (Pdf(b"%PDF", "1-2"), "Pdf(source=<4 bytes>, pages='1-2', tokens=None)"),
        (Video(b"1234", fps=2), "Video(source=<4 bytes>, fps=2, start=None, end=None, tokens=None, sound=False)"),
        (
            Audio(np.zeros(16_000, np.float32), sample_rate=16_000),
            "Audio(source=<float32 [16000]>, start=0.0, end=None, split=False, sample_rate=16000)",
        ),
    ],
)  # fmt: skip
def test_a_part_is_shown_without_its_content(part, shown):
    """In a log or a notebook; pictures have megabytes."""
    assert repr(part) == shown
    assert repr(Turn("user", [part])) == f"Turn(role='user', parts=[{shown}])"


def test_the_order_of_parts_is_kept():
    document = Pdf("a.pdf")
    [(_, parts)] = turns_of(["one", "a.png", "two", document, "three"], None)
    assert [type(part) for part in parts] == [Text, Image, Text, Pdf, Text]
    assert parts[3] is document


def test_turns_and_a_system_text():
    turns = turns_of([Turn("user", ["a.png", "what?"]), Turn("assistant", "a dog"), Turn("user", "sure?")], "Be brief.")
    assert [role for role, _ in turns] == ["system", "user", "assistant", "user"]
    assert turns[0][1] == [Text("Be brief.")]
    assert isinstance(turns[1][1][0], Image)


def test_parts_and_turns_do_not_mix():
    with pytest.raises(PromptError, match="not a mixture"):
        turns_of([Turn("user", "a"), "b"], None)

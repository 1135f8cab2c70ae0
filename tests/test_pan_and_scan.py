"""Pan and scan: a long picture is shown whole and in crops, if a request asks for it (Gemma 3)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from siglance.engine import Bundle, Engine, cli
from siglance.engine.bundle import demo_folder
from siglance.engine.errors import BundleError, ImageError, InputError, PromptError
from siglance.engine.manifest import ImageFacts, PanAndScanFacts, PlaceholderFacts, PromptFacts, read_manifest
from siglance.engine.media import PictureSource
from siglance.engine.pictures import lay_out
from siglance.engine.prompt import Media, Message, PromptBuilder, Span, Text
from siglance.engine.self_test import formula_picture
from siglance.engine.template import ChatTemplate
from siglance.kernels import geometry

from .scripted import scripted
from .tiny_tokenizer import GEMMA3_TEMPLATE
from .toy_tokenizer import toy_tokenizer

CROPS = PanAndScanFacts(
    min_crop=256,
    max_crops=4,
    min_ratio=1.2,
    before_full="Here is the original image ",
    before_crops=" and here are some crops to help you see better ",
    between_crops=" ",
)
SQUASH = ImageFacts(
    policy="squash",
    patch_size=16,
    pool_size=3,
    budgets=(9,),
    default_budget=9,
    resample="bilinear",
    pan_and_scan=CROPS,
)
GEMMA3 = PromptFacts(
    begin="<bos>",
    image=PlaceholderFacts(
        item="<start_of_image>",
        before="\n\n<start_of_image>",
        soft="<image_soft_token>",
        after="<end_of_image>\n\n",
    ),
)
RULE = {"min_crop": 256, "max_crops": 4, "min_ratio": 1.2}


# --- geometry


@pytest.mark.parametrize(
    ("width", "height", "count"),
    [
        (1920, 1080, 2), (640, 480, 2), (1200, 1000, 2), (2000, 500, 4), (3000, 256, 4), (4000, 300, 4),
        (100, 3000, 0), (1, 1, 0), (1199, 1000, 0), (1000, 1000, 0), (511, 300, 2), (510, 300, 0), (1250, 500, 3),
    ],
)  # fmt: skip
def test_the_number_of_crops_of_the_reference_processor(width, height, count):
    """The first eight were made by running it (facts 1.3); 1250:500 is a tie that is rounded up."""
    crops = geometry.pan_and_scan_crops(height, width, **RULE)
    assert len(crops) == count
    turned = geometry.pan_and_scan_crops(width, height, **RULE)
    assert turned == [(left, top, right, bottom) for top, left, bottom, right in crops]


def test_crops_are_equal_but_for_the_last():
    assert geometry.pan_and_scan_crops(300, 1001, **RULE) == [(0, 0, 300, 334), (0, 334, 300, 668), (0, 668, 300, 1001)]


@given(*[st.integers(1, 6000)] * 2, st.integers(1, 600), st.integers(1, 9), st.floats(1, 5))
def test_crops_cover_the_picture_without_overlap(height, width, min_crop, max_crops, min_ratio):
    crops = geometry.pan_and_scan_crops(height, width, min_crop=min_crop, max_crops=max_crops, min_ratio=min_ratio)
    assert len(crops) <= max_crops
    if not crops:
        return
    assert max(height, width) / min(height, width) >= min_ratio
    ends = [(bottom, right) for _, _, bottom, right in crops]
    starts = [(top, left) for top, left, _, _ in crops]
    assert starts[0] == (0, 0)
    assert ends[-1] == (height, width)
    along = int(width >= height)
    for end, start in zip(ends, starts[1:], strict=False):
        assert (start[along], start[1 - along]) == (end[along], 0)
    assert all(bottom > top and right > left for top, left, bottom, right in crops)
    assert min(crops[0][2], crops[0][3]) >= min_crop


@pytest.mark.parametrize("wrong", [{"min_crop": 0}, {"max_crops": 0}])
def test_a_rule_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is 0"):
        geometry.pan_and_scan_crops(5, 5, **RULE | wrong)


# --- pictures


def source(pixels: np.ndarray, proportions: tuple[int, int] | None = None, asked: list | None = None) -> PictureSource:
    def draw(height: int, width: int) -> np.ndarray:
        if asked is not None:
            asked.append((height, width))
        return pixels

    size = pixels.shape[0], pixels.shape[1]
    return PictureSource("image 1", "image", size, proportions or size, draw)


def test_crops_come_from_the_original_pixels():
    pixels = formula_picture(300, 1001)
    picture = lay_out(source(pixels), SQUASH, None, pan_and_scan=True)
    assert picture.soft_tokens == (9, 9, 9, 9)
    assert picture.size == (300, 1001)
    for view, part in enumerate((slice(0, 1001), slice(0, 334), slice(334, 668), slice(668, 1001))):
        assert np.array_equal(picture.pixels(view), pixels[:, part])
        assert picture.patches(view, picture.pixels(view), SQUASH).values.shape == (81, 768)


def test_a_tall_picture_is_cut_from_top_to_bottom():
    pixels = formula_picture(700, 300)
    picture = lay_out(source(pixels), SQUASH, None, pan_and_scan=True)
    for view, part in enumerate((slice(0, 700), slice(0, 350), slice(350, 700))):
        assert np.array_equal(picture.pixels(view), pixels[part])


def test_off_by_default_and_without_effect_on_pictures_that_are_not_long():
    assert lay_out(source(formula_picture(300, 1001)), SQUASH, None).soft_tokens == (9,)
    assert lay_out(source(formula_picture(300, 301)), SQUASH, None, pan_and_scan=True).soft_tokens == (9,)


def test_a_page_is_drawn_large_enough_for_each_crop():
    """Pages have proportions, and are drawn for the size that the model sees."""
    asked: list[tuple[int, int]] = []
    pixels = formula_picture(144, 288)
    picture = lay_out(source(pixels, (5000, 10000), asked), SQUASH, 9, pan_and_scan=True)
    assert [view.box for view in picture.views] == [(0, 0, 5000, 10000), (0, 0, 5000, 5000), (0, 5000, 5000, 10000)]
    assert [picture.pixels(view).shape for view in range(3)] == [(144, 288, 3), (144, 144, 3), (144, 144, 3)]
    assert asked == [(144, 144), (144, 288), (144, 288)]


def test_a_model_without_crops_cannot_lay_them_out():
    facts = dataclasses.replace(SQUASH, pan_and_scan=None)
    with pytest.raises(ImageError, match="image 1: this model does not see pictures in crops"):
        lay_out(source(formula_picture(300, 1001)), facts, None, pan_and_scan=True)


# --- prompts


@pytest.fixture(scope="module")
def prompts():
    return PromptBuilder(toy_tokenizer(), GEMMA3, ChatTemplate(GEMMA3_TEMPLATE), CROPS)


def shown(length: int) -> str:
    return f"\n\n<start_of_image>{'<image_soft_token>' * length}<end_of_image>\n\n"


def test_the_text_around_crops_is_the_one_of_the_reference_processor(prompts):
    prompt = prompts.chat([Message("user", [Media(soft_tokens=3, crops=(3, 3)), Text("what")])])
    inside = (
        f"Here is the original image {shown(3)} and here are some crops to help you see better {shown(3)} {shown(3)}"
    )
    expected = f"<bos><start_of_turn>user\n{inside}what<end_of_turn>\n<start_of_turn>model\n"
    assert prompt.text == expected
    assert prompt.ids.tolist() == toy_tokenizer().encode(expected, add_special_tokens=False).ids
    soft = toy_tokenizer().token_to_id("<image_soft_token>")
    starts = [index for index, id in enumerate(prompt.ids[:-1]) if id != soft == prompt.ids[index + 1]]
    assert prompt.spans == tuple(Span(start + 1, 3, 0, view) for view, start in enumerate(starts))


def test_pictures_with_and_without_crops_keep_their_order(prompts):
    media = [Media(soft_tokens=2), Media(soft_tokens=3, crops=(4, 5, 6)), Media(soft_tokens=7, crops=(8,))]
    for prompt in (prompts.chat([Message("user", media)]), prompts.raw(media)):
        found = [(span.media_index, span.view, span.length) for span in prompt.spans]
        assert found == [(0, 0, 2), (1, 0, 3), (1, 1, 4), (1, 2, 5), (1, 3, 6), (2, 0, 7), (2, 1, 8)]
        soft = toy_tokenizer().token_to_id("<image_soft_token>")
        for span in prompt.spans:
            assert (prompt.ids[span.start : span.start + span.length] == soft).all()


def test_crops_of_nothing_are_refused(prompts):
    with pytest.raises(PromptError, match=r"message 0, part 0: .*crops.*\[3, 0\]"):
        prompts.chat([Message("user", [Media(soft_tokens=3, crops=(3, 0))])])


# --- in an engine


@pytest.fixture(scope="module")
def engine(tiny_model):
    """A model that has crops in its manifest."""
    bundle = tiny_model("gemma4").bundle
    image = dataclasses.replace(bundle.manifest.image, pan_and_scan=CROPS)
    with Engine(Bundle(bundle.folder, dataclasses.replace(bundle.manifest, image=image)), threads=1) as engine:
        yield engine


LONG = formula_picture(300, 1000)
SMALL = {"image_tokens": 70, "max_tokens": 1}


def test_crops_reach_the_model_in_order(engine):
    double, runtime = scripted(engine, [engine.manifest.stop_ids[0]])
    reply = double.generate([LONG, "what"], pan_and_scan=True, **SMALL)
    parts = [LONG, LONG[:, :334], LONG[:, 334:668], LONG[:, 668:]]
    expected = [double.encode(np.ascontiguousarray(part), image_tokens=70).soft_tokens for part in parts]
    assert [soft.values.shape for soft in runtime.soft] == [soft.shape for soft in expected]
    for soft, values in zip(runtime.soft, expected, strict=True):
        np.testing.assert_array_equal(soft.values, values)
    tokenizer = Tokenizer.from_file(str(engine.bundle.path("tokenizer")))
    text = tokenizer.decode(list(reply.prompt_token_ids), skip_special_tokens=True)
    assert "Here is the original image" in text
    assert reply.usage.by_modality["image"] == sum(map(len, expected))
    assert engine.count_tokens([LONG, "what"], image_tokens=70, pan_and_scan=True)["total"] == reply.usage.prompt_tokens
    assert reply.usage.prompt_tokens > double.generate([LONG, "what"], **SMALL).usage.prompt_tokens


def test_boxes_refer_to_the_whole_picture(engine):
    tokenizer = Tokenizer.from_file(str(engine.bundle.path("tokenizer")))
    answer = '{"box_2d": [0, 0, 500, 500], "label": "x"}'.replace(" ", "▁")
    script = [tokenizer.token_to_id(character) for character in answer] + [engine.manifest.stop_ids[0]]
    double, _ = scripted(engine, script)
    reply = double.generate([LONG, "what"], pan_and_scan=True, image_tokens=70)
    assert [box.box for box in reply.boxes] == [(0.0, 0.0, 500.0, 150.0)]


def test_prompt_ids_with_crops(engine):
    double, runtime = scripted(engine, [engine.manifest.stop_ids[0]])
    ids = double.generate([LONG, "what"], pan_and_scan=True, **SMALL).prompt_token_ids
    starts = [soft.start for soft in runtime.soft]
    double.generate(LONG, prompt_ids=ids, pan_and_scan=True, **SMALL)
    assert [soft.start for soft in runtime.soft] == starts
    with pytest.raises(PromptError, match="runs of"):
        double.generate(LONG, prompt_ids=ids, **SMALL)


def test_real_logits_change(engine):
    plain = engine.prompt_logits([LONG, "what"], image_tokens=70)
    crops = engine.prompt_logits([LONG, "what"], image_tokens=70, pan_and_scan=True)
    assert len(crops) > len(plain)
    assert np.abs(crops[-1] - plain[-1]).max() > 1e-3


def test_an_encoded_picture_has_no_pixels_to_cut(engine):
    seen = engine.encode(LONG, image_tokens=70)
    with pytest.raises(InputError, match=r"image 1 is encoded already.*pan_and_scan"):
        engine.generate([seen, "what"], pan_and_scan=True)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_bundle_without_crops_refuses_to_be_asked(tiny_model, family):
    with Engine(tiny_model(family).bundle, threads=1) as plain:
        for call in (plain.generate, plain.count_tokens, plain.prompt_logits):
            with pytest.raises(
                InputError, match="pan_and_scan: the model of this bundle does not see pictures in crops"
            ):
                call("what", pan_and_scan=True)


@pytest.mark.parametrize("command", ["run", "count-tokens"])
def test_the_option_of_the_command_line(monkeypatch, capsys, command):
    """The demo has no crops; that it says so shows that the option arrives."""
    monkeypatch.setattr("sys.argv", ["siglance", command, "-p", "x", "--pan-and-scan"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
    assert "pan_and_scan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_crop": 0}, "positive sizes and crops"),
        ({"max_crops": 1}, "positive sizes and crops"),
        ({"min_ratio": 0.5}, "'image.pan_and_scan.min_ratio' is 0.5"),
        ({"min_ratio": float("nan")}, "'image.pan_and_scan.min_ratio' is nan"),
        ({"texts": []}, "unknown key 'image.pan_and_scan.texts'"),
    ],
)
def test_what_a_manifest_cannot_say_about_crops(change, message):
    facts = json.loads((demo_folder() / "siglance.json").read_text())
    facts["image"]["pan_and_scan"] = dataclasses.asdict(CROPS)
    assert read_manifest(json.dumps(facts)).image.pan_and_scan == CROPS
    facts["image"]["pan_and_scan"] |= change
    with pytest.raises(BundleError, match=message):
        read_manifest(json.dumps(facts))

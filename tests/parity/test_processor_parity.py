"""Prompts and pixels against the processors of transformers: PaliGemma, and Gemma 3 with and without crops."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from siglance.engine.manifest import ImageFacts, PanAndScanFacts, PlaceholderFacts, PromptFacts
from siglance.engine.media import PictureSource
from siglance.engine.pictures import PreparedPicture, lay_out
from siglance.engine.prompt import Message, Prompt, PromptBuilder, Text
from siglance.engine.self_test import formula_picture
from siglance.engine.template import ChatTemplate
from siglance.kernels import geometry

from ..tiny_tokenizer import GEMMA3_TEMPLATE, GEMMA3_TOKENS, write_tokenizer

# The fast suite collects this file in environments without transformers, and deselects all of it.
transformers = pytest.importorskip("transformers", reason="transformers is in the parity extra only")

pytestmark = pytest.mark.parity

TEXTS = ("caption en", "what is this?", "two\n", "ends in space ", "detect <loc0003> cat ; dog", "", "\n\nlines")
SIZES = [
    (224, 224),
    (1920, 1080),
    (640, 480),
    (2000, 500),
    (100, 3000),
    (3000, 256),
    (1, 1),
    (301, 900),
]  # width, height
CROPS = PanAndScanFacts(
    min_crop=256,
    max_crops=4,
    min_ratio=1.2,
    before_full="Here is the original image ",
    before_crops=" and here are some crops to help you see better ",
    between_crops=" ",
)


def with_pixels(pixels: np.ndarray) -> PictureSource:
    size = pixels.shape[0], pixels.shape[1]
    return PictureSource("image 1", "image", size, size, lambda height, width: pixels)


def pixel_values(picture: PreparedPicture, facts: ImageFacts, side: int) -> np.ndarray:
    """What the patches of every view say about its pixels, float64 [views, 3, side, side] in [-1, 1]."""
    views = []
    for view in range(len(picture.views)):
        patches = picture.patches(view, picture.pixels(view), facts)
        image = np.zeros((side, side, 3))
        size = facts.patch_size
        for values, (x, y) in zip(patches.values, patches.positions, strict=True):
            image[size * y : size * y + size, size * x : size * x + size] = values.reshape(size, size, 3)
        views.append(image.transpose(2, 0, 1) / 127.5 - 1)
    return np.stack(views)


# --- PaliGemma

PALIGEMMA_IMAGE = ImageFacts(
    policy="squash", patch_size=14, pool_size=1, budgets=(256,), default_budget=256, resample="bicubic"
)
PALIGEMMA = PromptFacts(
    begin="<bos>",
    layout="media_first",
    end="\n",
    image=PlaceholderFacts(item="<image>", before="", soft="<image>", after=""),
)


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    """(processor, our prompt builder) on one tokenizer; the processor adds the location tokens itself."""
    folder = tmp_path_factory.mktemp("paligemma")
    write_tokenizer(folder, ("<image>",), 512)
    file = folder / "tokenizer.json"
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    images = transformers.SiglipImageProcessorPil(size={"height": 224, "width": 224}, resample=3)
    images.image_seq_length = 256
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    saved = folder / "saved"
    processor.tokenizer.save_pretrained(saved)
    return processor, PromptBuilder(Tokenizer.from_file(str(saved / "tokenizer.json")), PALIGEMMA, None)


def test_the_processor_adds_location_tokens_that_are_not_special(paligemma):
    """So they are tokens in prompts and text in replies."""
    added = paligemma[0].tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    flags = {token.content: token.special for token in added if token.content.startswith(("<loc", "<seg"))}
    assert len(flags) == 1024 + 128
    assert not any(flags.values())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("count", [1, 2])
def test_paligemma_prompts(paligemma, text, count):
    processor, prompts = paligemma
    pictures = [Image.fromarray(formula_picture(40 + 9 * index, 60)) for index in range(count)]
    # One list for one prompt of several images; without "<image>" in the text the processor puts them in front.
    expected = processor(images=[pictures], text=[text], return_tensors="np")["input_ids"][0].tolist()
    ours = [lay_out(with_pixels(np.asarray(picture)), PALIGEMMA_IMAGE, None).medium for picture in pictures]
    assert prompts.chat([Message("user", [*ours, Text(text)])]).ids.tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_paligemma_pixels(paligemma, size):
    pixels = formula_picture(size[1], size[0])
    expected = paligemma[0].image_processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    picture = lay_out(with_pixels(pixels), PALIGEMMA_IMAGE, None)
    np.testing.assert_allclose(pixel_values(picture, PALIGEMMA_IMAGE, 224), expected, atol=1e-6)


# --- Gemma 3

GEMMA3_IMAGE = ImageFacts(
    policy="squash",
    patch_size=14,
    pool_size=4,
    budgets=(256,),
    default_budget=256,
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


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    write_tokenizer(folder, GEMMA3_TOKENS, 512)
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    file = str(folder / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special, extra_special_tokens=extra)
    images = transformers.Gemma3ImageProcessorPil(
        size={"height": 896, "width": 896},
        resample=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        pan_and_scan_min_crop_size=256,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA3_TEMPLATE, image_seq_length=256)
    prompts = PromptBuilder(Tokenizer.from_file(file), GEMMA3, ChatTemplate(GEMMA3_TEMPLATE), CROPS)
    return processor, prompts


def ask_gemma3(prompts: PromptBuilder, pictures: list[PreparedPicture], text: str) -> Prompt:
    return prompts.chat([Message("user", [*(picture.medium for picture in pictures), Text(text)])])


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gemma3_pixels_and_prompts(gemma3, size, crops):
    processor, prompts = gemma3
    pixels = formula_picture(size[1], size[0])
    rendered = "<bos><start_of_turn>user\n<start_of_image>what is this?<end_of_turn>\n<start_of_turn>model\n"
    outputs = processor(
        images=[[Image.fromarray(pixels)]],
        text=[rendered],
        do_pan_and_scan=crops,
        add_special_tokens=False,
        return_tensors="np",
    )
    picture = lay_out(with_pixels(pixels), GEMMA3_IMAGE, None, pan_and_scan=crops)
    assert ask_gemma3(prompts, [picture], "what is this?").ids.tolist() == outputs["input_ids"][0].tolist()
    found = pixel_values(picture, GEMMA3_IMAGE, 896)
    assert found.shape == outputs["pixel_values"].shape
    np.testing.assert_allclose(found, outputs["pixel_values"], atol=1e-6)


def test_the_rule_for_crops_on_many_sizes(gemma3):
    """Sizes around every threshold of the rule."""
    images = gemma3[0].image_processor
    rng = np.random.default_rng(0)
    checked = 0
    for width, height in [*rng.integers(1, 1500, (300, 2)).tolist(), *SIZES]:
        crops = images.pan_and_scan(np.zeros((1, height, width), np.uint8), 256, 4, 1.2)
        expected = [crop.shape[-2:] for crop in crops]
        found = geometry.pan_and_scan_crops(height, width, min_crop=256, max_crops=4, min_ratio=1.2)
        assert [(bottom - top, right - left) for top, left, bottom, right in found] == expected, (width, height)
        checked += len(found) > 0
    assert checked > 50

"""The reference model against transformers, and the tiny checkpoints and the image rule against the official code.

Figures seen (float64 NumPy against float32 torch 2.13.0 on a CPU, transformers 5.24.0): logits differ by at most 4.8e-5
where they reach 6 to 10, soft tokens by at most 3.0e-6 where they reach 3 to 4.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from .. import reference_model as reference
from .. import tiny

pytestmark = pytest.mark.parity

GEMMA3_LAYOUTS = ("gemma3_270m", "gemma3_1b", "gemma3_scaled_untied")
GEMMA4_LAYOUTS = ("gemma4_e2b", "gemma4_e4b", "gemma4_plain")
LOGIT_TOLERANCE = 1e-4  # logits reach 8
SOFT_TOKEN_TOLERANCE = 1e-5  # soft tokens reach 3
PROMPT_LENGTHS = (1, 8, 9, 60)  # the window is 8


@pytest.fixture(scope="module")
def torch():
    """Imported late, like `checkpoints`: the fast suite collects this file too and may run without torch."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    return torch


@pytest.fixture(scope="module")
def checkpoints(torch):
    return importlib.import_module(".checkpoints", __package__)


@pytest.fixture(scope="module")
def saved(checkpoints, tmp_path_factory: pytest.TempPathFactory):
    """saved(name) -> (model of transformers, weights, config) of a layout, made once."""
    made: dict[str, tuple] = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (checkpoints.write(name, folder), *reference.load_checkpoint(folder))
        return made[name]

    return get


def token_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(40, 500, length).tolist()


def random_image(rows: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random patches (float32 in [0, 1]) and their positions (x, y), in raster order."""
    y, x = np.mgrid[:rows, :columns]
    patches = np.random.default_rng(seed).random((rows * columns, 768), np.float32)
    return patches, np.stack([x, y], axis=-1).reshape(-1, 2)


IMAGES = (random_image(6, 9, seed=1), random_image(12, 3, seed=2))  # 6 and 4 soft tokens


def two_image_prompt(config: dict) -> list[int]:
    """Text, image, text, image, text: longer than the window in every part that matters."""

    def brackets(soft_tokens: int) -> list[int]:
        return [config["boi_token_id"], *[config["image_token_id"]] * soft_tokens, config["eoi_token_id"]]

    return [2, *token_ids(5), *brackets(6), *token_ids(12, seed=1), *brackets(4), *token_ids(20, seed=2)]


def test_layouts_are_all_compared(checkpoints) -> None:
    assert set(checkpoints.LAYOUTS) == {*GEMMA3_LAYOUTS, *GEMMA4_LAYOUTS}


@pytest.mark.parametrize("name", GEMMA3_LAYOUTS)
@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_gemma3_logits(saved, checkpoints, name: str, length: int) -> None:
    model, weights, config = saved(name)
    ids = token_ids(length)
    expected = checkpoints.hf_logits(model, ids)
    assert_close(reference.gemma3_text_logits(weights, config, ids), expected, LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", GEMMA4_LAYOUTS)
@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_gemma4_logits_of_text(saved, checkpoints, name: str, length: int) -> None:
    model, weights, config = saved(name)
    ids = token_ids(length)
    expected = checkpoints.hf_logits(model, ids)
    assert_close(reference.gemma4_text_logits(weights, config, ids), expected, LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", GEMMA4_LAYOUTS)
def test_gemma4_soft_tokens(saved, checkpoints, name: str) -> None:
    model, weights, config = saved(name)
    for patches, positions in IMAGES:
        soft = reference.gemma4_soft_tokens(weights, config, patches, positions)
        expected = checkpoints.hf_soft_tokens(model, patches, positions)
        assert_close(soft, expected, SOFT_TOKEN_TOLERANCE)


@pytest.mark.parametrize("name", GEMMA4_LAYOUTS)
def test_gemma4_logits_with_two_images_of_different_shapes(saved, checkpoints, name: str) -> None:
    """transformers pads both images to one batch; the reference runs each alone."""
    model, weights, config = saved(name)
    ids = two_image_prompt(config)
    soft = [reference.gemma4_soft_tokens(weights, config, *image) for image in IMAGES]
    expected = checkpoints.hf_logits(model, ids, IMAGES)
    assert_close(reference.gemma4_text_logits(weights, config, ids, soft), expected, LOGIT_TOLERANCE)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape
    difference = float(np.abs(actual - expected).max())
    print(f"largest difference {difference:.1e} of {np.abs(expected).max():.1f}")  # shown by pytest -rP
    assert difference < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# The tiny checkpoints of tests/tiny.py are what transformers would write


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gemma3", {}),
        ("gemma3", {"key_style": "hub", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma3", {"tie_word_embeddings": False, "shards": 2}),
        ("gemma4", {}),
        ("gemma4", {"key_style": "hub", "dead_shared_kv": True, "storage": "bfloat16"}),
        ("gemma4", {"num_key_value_heads": 2, "use_double_wide_mlp": False, "vision": False}),
    ],
    ids=str,
)
def test_transformers_loads_tiny_checkpoints_and_agrees(checkpoints, torch, tmp_path, family, options) -> None:
    """Every tensor finds its place, none is missing, and the logits are those of the reference."""
    write, class_name, logits_of = {
        "gemma3": (tiny.write_gemma3, "Gemma3ForCausalLM", reference.gemma3_text_logits),
        "gemma4": (tiny.write_gemma4, "Gemma4ForConditionalGeneration", reference.gemma4_text_logits),
    }[family]
    write(tmp_path, **options)
    model_class = getattr(importlib.import_module("transformers"), class_name)
    model, report = model_class.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    weights, config = reference.load_checkpoint(tmp_path)
    ids = token_ids(30)
    np.testing.assert_allclose(
        logits_of(weights, config, ids), checkpoints.hf_logits(model, ids), rtol=0, atol=LOGIT_TOLERANCE
    )


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_tiny_checkpoints_have_the_keys_and_tensors_of_saved_ones(checkpoints, torch, tmp_path, family: str) -> None:
    """Loaded by transformers and saved again, config.json and the tensors come back as they were."""
    write, class_name = {
        "gemma3": (tiny.write_gemma3, "Gemma3ForCausalLM"),
        "gemma4": (tiny.write_gemma4, "Gemma4ForConditionalGeneration"),
    }[family]
    config = write(tmp_path / "ours")
    model_class = getattr(importlib.import_module("transformers"), class_name)
    model_class.from_pretrained(tmp_path / "ours", dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        theirs.get(part, {}).pop("dtype", None)  # written only by a model that was loaded, not by one that was built
    assert config == theirs
    ours, again = (tensor_shapes(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours == again


def tensor_shapes(file: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(file, "np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        return {name: (view.get_shape(), view.get_dtype()) for name, view in slices.items()}


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_tiny_tokenizers_work_in_transformers(checkpoints, tmp_path, family: str) -> None:
    """The same ids from tokenizer.json as from AutoTokenizer, which also renders the chat template."""
    {"gemma3": tiny.write_gemma3, "gemma4": tiny.write_gemma4}[family](tmp_path)
    theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ours = importlib.import_module("tokenizers").Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("What is this?", "hello world\n\n 日本", "two  spaces", ""):
        assert theirs.encode(text) == ours.encode(text).ids
    chat = theirs.apply_chat_template([{"role": "user", "content": " Hi "}], tokenize=False, add_generation_prompt=True)
    opening, closing = ("<start_of_turn>", "<end_of_turn>") if family == "gemma3" else ("<|turn>", "<turn|>")
    assert chat == f"<bos>{opening}user\nHi{closing}\n{opening}model\n"


# ---------------------------------------------------------------------------------------------------------------------
# Image sizes


BUDGETS = (70, 140, 280, 560, 1120)
# Width and height of an image, then height and width after resizing for each budget.
SIZES = {
    (1920, 1080): ((288, 528), (384, 720), (576, 1056), (816, 1488), (1200, 2112)),
    (1080, 1920): ((528, 288), (720, 384), (1056, 576), (1488, 816), (2112, 1200)),
    (640, 480): ((336, 432), (480, 624), (672, 912), (960, 1296), (1344, 1824)),
    (4032, 3024): ((336, 432), (480, 624), (672, 912), (960, 1296), (1344, 1824)),
    (100, 3000): ((2160, 48), (3072, 96), (4368, 144), (6192, 192), (8784, 288)),
    (3000, 100): ((48, 2160), (96, 3072), (144, 4368), (192, 6192), (288, 8784)),
    (10, 5000): ((3360, 48), (6720, 48), (13440, 48), (25392, 48), (35904, 48)),
    (1, 1): ((384, 384), (528, 528), (768, 768), (1104, 1104), (1584, 1584)),
    (48, 48): ((384, 384), (528, 528), (768, 768), (1104, 1104), (1584, 1584)),
    (224, 224): ((384, 384), (528, 528), (768, 768), (1104, 1104), (1584, 1584)),
    (768, 768): ((384, 384), (528, 528), (768, 768), (1104, 1104), (1584, 1584)),
    (960, 672): ((336, 480), (432, 672), (672, 960), (912, 1344), (1344, 1920)),
}


def resized(width: int, height: int, budget: int) -> tuple[int, int]:
    """The rule in short: the largest multiples of 48 that fit the budget at the image's own shape; a side that would
    vanish becomes 48, and then the other follows the whole part of the ratio, up to the budget in one line."""
    factor = math.sqrt(budget * 9 * 256 / (height * width))
    rows, columns = math.floor(factor * height / 48), math.floor(factor * width / 48)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return 48 * rows, 48 * columns


@pytest.mark.parametrize(("width", "height"), SIZES, ids=lambda side: str(side))
def test_image_sizes_and_token_counts(checkpoints, width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), (255, 0, 51))
    for budget, size in zip(BUDGETS, SIZES[width, height], strict=True):
        processed = checkpoints.hf_processor_outputs(image, budget)
        assert resized(width, height, budget) == processed.size == size
        assert processed.soft_tokens == size[0] * size[1] // 48**2 <= budget
        assert len(processed.pixel_values) == len(processed.position_ids) == 9 * processed.soft_tokens
        np.testing.assert_allclose(processed.pixel_values[0, :3], [1, 0, 0.2], atol=1e-6)


def test_patches_are_in_raster_order_with_channels_fastest(checkpoints) -> None:
    """480 x 336 at budget 70 keeps its size, so each value tells where it comes from."""
    y, x = np.mgrid[:336, :480]
    pixels = np.stack([y % 256, x % 256, y // 256 + 2 * (x // 256)], axis=-1).astype(np.uint8)
    processed = checkpoints.hf_processor_outputs(Image.fromarray(pixels), 70)
    assert processed.size == (336, 480)
    patches = np.rint(processed.pixel_values * 255).astype(int).reshape(21, 30, 16, 16, 3)
    np.testing.assert_array_equal(patches.transpose(0, 2, 1, 3, 4).reshape(336, 480, 3), pixels)
    np.testing.assert_array_equal(processed.position_ids[[0, 1, 30, 31]], [[0, 0], [1, 0], [0, 1], [1, 1]])

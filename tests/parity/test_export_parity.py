"""Exported bundles against transformers, on tiny random checkpoints written by its own save_pretrained."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from siglance.engine.bundle import Bundle
from siglance.engine.image_policy import POLICIES
from siglance.engine.manifest import ImageFacts
from siglance.engine.runtime import Runtime, SoftTokens
from siglance.engine.self_test import formula_picture
from siglance.export.exporter import export

from .. import tiny_tokenizer

pytestmark = pytest.mark.parity

FACTS = ImageFacts(
    policy="aspect_patches",
    patch_size=16,
    pool_size=3,
    budgets=(70, 140, 280, 560, 1120),
    default_budget=280,
    resample="bicubic",
)
# Width x height and the soft tokens that transformers gives at each budget.
SIZES = {
    (1920, 1080): (66, 120, 264, 527, 1100),
    (1080, 1920): (66, 120, 264, 527, 1100),
    (640, 480): (63, 130, 266, 540, 1064),
    (4032, 3024): (63, 130, 266, 540, 1064),
    (100, 3000): (45, 128, 273, 516, 1098),
    (3000, 100): (45, 128, 273, 516, 1098),
    (10, 5000): (70, 140, 280, 529, 748),
    (1, 1): (64, 121, 256, 529, 1089),
    (48, 48): (64, 121, 256, 529, 1089),
    (224, 224): (64, 121, 256, 529, 1089),
    (768, 768): (64, 121, 256, 529, 1089),
    (960, 672): (70, 126, 280, 532, 1120),
}


@pytest.fixture(scope="module")
def checkpoints():
    # Not at module level: the fast suite collects this file where torch is not installed.
    from . import checkpoints

    return checkpoints


@pytest.fixture(
    scope="module",
    params=["gemma3_270m", "gemma3_1b", "gemma3_scaled_untied", "gemma4_e2b", "gemma4_e4b", "gemma4_plain"],
)
def pair(request, tmp_path_factory, checkpoints):
    """(transformers model, our runtime) of one layout."""
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoints.write(request.param, folder / "checkpoint")
    tokens = tiny_tokenizer.GEMMA4_TOKENS if "gemma4" in request.param else tiny_tokenizer.GEMMA3_TOKENS
    tiny_tokenizer.write_tokenizer(folder / "checkpoint", tokens, 512)
    export(folder / "checkpoint", folder / "bundle")
    return model, Runtime(Bundle.open(folder / "bundle"))


def record(record_property, name: str, found: np.ndarray, expected: np.ndarray, limit: float) -> None:
    difference = float(np.abs(found - expected).max())
    record_property(name, difference)
    print(f"{name}: max difference {difference:.2e} of {np.abs(expected).max():.2f}")
    assert difference <= limit


def test_text_logits(pair, checkpoints, record_property):
    """Longer than the window: one chunk, chunks of 3, 8 and 64, and token by token."""
    model, runtime = pair
    ids = np.random.default_rng(1).integers(100, 490, 70)
    expected = checkpoints.hf_logits(model, ids)
    for chunk in (512, 64, 8, 3, 1):
        record(record_property, f"chunk {chunk}", runtime.session().prefill(ids, chunk=chunk), expected[-1], 1e-3)
    record(record_property, "all rows", runtime.session().prompt_logits(ids), expected, 1e-3)


def with_pictures(runtime: Runtime, checkpoints, count: int):
    """A prompt with pictures in it: its ids, our soft tokens, and what transformers is given for them."""
    pictures = [formula_picture(90, 160), formula_picture(300, 70)][:count]
    ids, blocks, media = [2, 110], [], []
    for index, picture in enumerate(pictures):
        patches = POLICIES[FACTS.policy].prepare(picture, FACTS, 70)
        soft = runtime.encode(patches.values, patches.positions, len(patches.values) // 9)
        processed = checkpoints.hf_processor_outputs(Image.fromarray(picture), 70)
        media.append((processed.pixel_values, processed.position_ids))
        blocks.append(SoftTokens(len(ids), soft))
        ids += [checkpoints.GEMMA4_TOKEN_IDS["image_token_id"]] * len(soft) + [111 + index, 113]
    return [*ids, 114], blocks, media


@pytest.mark.parametrize("count", [1, 2])
def test_image_logits(pair, checkpoints, record_property, count):
    """Images of different shape, from the same pixels: soft tokens within 1e-4, then logits, alone and together."""
    model, runtime = pair
    if runtime.vision is None:
        assert "gemma4" not in type(model).__name__.lower()
        return
    ids, blocks, media = with_pictures(runtime, checkpoints, count)
    for index, (block, picture) in enumerate(zip(blocks, media, strict=True)):
        expected = checkpoints.hf_soft_tokens(model, *picture)
        record(record_property, f"soft tokens {index}", block.values, expected, 1e-4)
    expected = checkpoints.hf_logits(model, ids, media)[-1]
    for chunk in (512, 64, 8, 3, 1)[: 1 if count == 1 else None]:  # cuts are those of the longer prompt
        found = runtime.session().prefill(np.array(ids), blocks, chunk=chunk)
        record(record_property, f"logits, chunk {chunk}", found, expected, 1e-3)


def test_greedy_ids_are_those_of_generate(pair, checkpoints):
    """The cache of transformers and ours give the same tokens, beyond the window; with two pictures where it sees."""
    model, runtime = pair
    count = 0 if runtime.vision is None else 2
    ids, blocks, media = with_pictures(runtime, checkpoints, count)
    ids += np.random.default_rng(3).integers(100, 490, 20).tolist()
    session = runtime.session()
    logits, found = session.prefill(np.array(ids), blocks), []
    for _ in range(24):
        found.append(int(logits.argmax()))
        logits = session.step(found[-1])
    assert found == checkpoints.hf_greedy(model, ids, media, tokens=24)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_pixels_and_counts_equal_the_reference_processor(size, checkpoints):
    """Zero levels of difference, at every budget."""
    width, height = size
    picture = formula_picture(height, width)
    for budget, count in zip(FACTS.budgets, SIZES[size], strict=True):
        patches = POLICIES[FACTS.policy].prepare(picture, FACTS, budget)
        processed = checkpoints.hf_processor_outputs(Image.fromarray(picture), budget)
        assert len(patches.values) // 9 == count == processed.soft_tokens
        order = np.lexsort((patches.positions[:, 0], patches.positions[:, 1]))
        levels = np.rint(processed.pixel_values * 255).astype(np.uint8)
        np.testing.assert_array_equal(patches.values[order], levels)
        np.testing.assert_array_equal(patches.positions[order], processed.position_ids)

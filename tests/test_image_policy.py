"""From pixels to patches under a policy of the manifest."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from siglance.engine.bundle import demo_folder
from siglance.engine.errors import BundleError, ImageError
from siglance.engine.image_policy import POLICIES, Layout, resize
from siglance.engine.manifest import MECHANISMS, ImageFacts, read_manifest
from siglance.kernels import reference

FACTS = ImageFacts(
    policy="aspect_patches",
    patch_size=16,
    pool_size=3,
    budgets=(70, 140, 280, 560, 1120),
    default_budget=280,
    resample="bicubic",
)
POLICY = POLICIES["aspect_patches"]


def random_pixels(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_every_policy_is_a_mechanism_of_the_manifest():
    assert {f"image:{name}" for name in POLICIES} == {name for name in MECHANISMS if name.startswith("image:")}


def test_a_small_picture_is_enlarged_to_fill_the_budget():
    """512x512 becomes 768x768 and 256 tokens, not the nearest multiple of 48 (528x528, 121 tokens)."""
    layout = POLICY.layout(512, 512, FACTS, None)
    assert (layout.height, layout.width, layout.soft_tokens) == (768, 768, 256)


@pytest.mark.parametrize("budget", FACTS.budgets)
@pytest.mark.parametrize("size", [(480, 640), (300, 1000), (37, 11), (1, 4000)])
def test_the_layout_predicts_the_patches_for_every_budget(size, budget):
    layout = POLICY.layout(*size, FACTS, budget)
    patches = POLICY.prepare(random_pixels(*size), FACTS, budget)
    assert layout.soft_tokens <= budget
    assert len(patches.values) == len(patches.positions) == layout.soft_tokens * 9
    assert patches.values.shape[1] == 768
    assert patches.positions.max(axis=0).tolist() == [layout.width // 16 - 1, layout.height // 16 - 1]


@pytest.mark.parametrize("budget", [0, -70, 71, 300, 1121])
def test_a_budget_the_bundle_does_not_allow_is_named_with_the_allowed_ones(budget):
    with pytest.raises(ImageError, match=rf"{budget} soft tokens .* 70, 140, 280, 560, 1120"):
        POLICY.layout(100, 100, FACTS, budget)


def test_a_size_without_pixels_is_an_image_error():
    with pytest.raises(ImageError, match="height is 0"):
        POLICY.layout(0, 100, FACTS, None)


def test_patch_and_pool_sizes_come_from_the_manifest():
    facts = dataclasses.replace(FACTS, patch_size=14, pool_size=4, budgets=(16,), default_budget=16)
    layout = POLICY.layout(112, 112, facts, None)
    assert (layout.height, layout.width, layout.soft_tokens) == (224, 224, 16)
    assert POLICY.prepare(random_pixels(112, 112), facts).values.shape == (256, 588)


@pytest.mark.parametrize("size", [(480, 640), (911, 333), (20, 700)])
def test_prepare_is_one_pillow_resize_and_the_patches_of_the_reference(size):
    """The definition that the reference processors follow: no second resize, no float in between."""
    pixels = random_pixels(*size)
    patches = POLICY.prepare(pixels, FACTS, 70)
    layout = POLICY.layout(*size, FACTS, 70)
    resized = Image.fromarray(pixels).resize((layout.width, layout.height), Image.Resampling.BICUBIC)
    expected = reference.patchify(np.asarray(resized), 16)
    order = np.lexsort((patches.positions[:, 0], patches.positions[:, 1]))
    np.testing.assert_array_equal(patches.values[order], expected.values)
    np.testing.assert_array_equal(patches.positions[order], expected.positions)


@pytest.mark.parametrize("budget", FACTS.budgets)
@pytest.mark.parametrize("size", [(480, 640), (300, 1000)])
def test_the_lower_half_of_a_picture_arrives_in_the_lower_half_of_the_tokens(size, budget):
    """With a tower that only takes the mean colour, each token is the colour of its own 3x3 patches."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[size[0] // 2 :] = (255, 0, 0)
    layout = POLICY.layout(*size, FACTS, budget)
    patches = POLICY.prepare(pixels, FACTS, budget)
    colours = patches.values.reshape(-1, 256, 3).mean(axis=1)
    cells = colours.reshape(-1, 9, 3).mean(axis=1).reshape(layout.height // 48, layout.width // 48, 3)
    np.testing.assert_allclose(cells.reshape(-1, 3), reference.pool(colours, patches.positions, 3))
    assert (cells[-1] == (255, 0, 0)).all()
    assert (cells[0] == 0).all()


def test_a_picture_that_has_its_size_already_is_not_resampled():
    pixels = random_pixels(672, 960)
    assert resize(pixels, 672, 960, "bicubic") is pixels
    patches = POLICY.prepare(pixels, FACTS, 280)
    assert np.bincount(patches.values.ravel(), minlength=256).tolist() == np.bincount(pixels.ravel()).tolist()


def test_fine_stripes_become_flat_grey():
    """Shrinking is antialiased: one-pixel stripes average out, where plain interpolation would alias to bands."""
    stripes = np.zeros((1008, 1344, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = resize(stripes, 336, 432, "bicubic")[:, 2:-2]  # the kernel is cut off at the border
    assert 120 <= shrunk.min() <= shrunk.max() <= 135


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_extreme_contrast_stays_in_range(resample):
    """Bicubic overshoots at edges; the result is clamped to uint8 and never wraps around."""
    board = (
        np.kron(np.indices((64, 64)).sum(axis=0) % 2 * 255, np.ones((8, 8)))[:, :, None].repeat(3, 2).astype(np.uint8)
    )
    for pixels in (board, np.zeros_like(board), np.full_like(board, 255)):
        large = resize(pixels, 768, 768, resample)
        assert large[:: 768 - 1, :: 768 - 1].tolist() == pixels[:: 512 - 1, :: 512 - 1].tolist()  # the four corners
        assert len(np.unique(large)) == 1 or (large == 0).mean() > 0.2 < (large == 255).mean()


# --- squash

PALIGEMMA = ImageFacts(
    policy="squash", patch_size=14, pool_size=1, budgets=(256,), default_budget=256, resample="bicubic"
)
GEMMA3 = ImageFacts(
    policy="squash", patch_size=14, pool_size=4, budgets=(256,), default_budget=256, resample="bilinear"
)
SQUASH = POLICIES["squash"]


@pytest.mark.parametrize("size", [(1, 1), (224, 224), (686, 960), (3000, 100), (7, 4000)])
def test_every_picture_is_squashed_to_the_one_size(size):
    assert SQUASH.layout(*size, PALIGEMMA, None) == Layout(224, 224, 256)
    assert SQUASH.layout(*size, GEMMA3, 256) == Layout(896, 896, 256)
    larger = dataclasses.replace(PALIGEMMA, budgets=(4096,), default_budget=4096)
    assert SQUASH.layout(*size, larger, None) == Layout(896, 896, 4096)


@pytest.mark.parametrize("facts", [PALIGEMMA, GEMMA3])
def test_a_squashed_picture_is_one_resize(facts):
    pixels = random_pixels(100, 300)
    layout = SQUASH.layout(100, 300, facts, None)
    patches = SQUASH.prepare(pixels, facts)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[facts.resample]
    expected = np.asarray(Image.fromarray(pixels).resize((layout.width, layout.height), resample))
    for values, (x, y) in zip(patches.values, patches.positions, strict=True):
        block = expected[14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
        assert np.array_equal(values.reshape(14, 14, 3), block)
    assert len(patches.values) == layout.soft_tokens * facts.pool_size**2


@pytest.mark.parametrize("budget", [70, 0, -256, 257, 256.0, "256"])
def test_a_squash_bundle_has_one_size(budget):
    with pytest.raises(
        ImageError, match=rf"{budget!r} soft tokens is not possible, this bundle has one image size of 256"
    ):
        SQUASH.layout(100, 100, GEMMA3, budget)


def test_a_size_without_pixels_cannot_be_squashed():
    with pytest.raises(ImageError, match="0x5 pixels"):
        SQUASH.layout(5, 0, GEMMA3, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": [256, 1024], "default_budget": 256}, "one square number"),
        ({"budgets": [255], "default_budget": 255}, "one square number"),
        ({"budgets": [256], "default_budget": 1024}, "'image.default_budget' is 1024"),
        ({"policy": "crop"}, "'image:crop' among them"),
    ],
)
def test_what_a_squash_manifest_cannot_say(change, message):
    facts = json.loads((demo_folder() / "siglance.json").read_text())
    facts["requires"] = [name.replace("aspect_patches", "squash") for name in facts["requires"]]
    facts["image"] |= {"policy": "squash", "budgets": [256], "default_budget": 256}
    assert read_manifest(json.dumps(facts)).image.policy == "squash"
    facts["image"] |= change
    with pytest.raises(BundleError, match=message):
        read_manifest(json.dumps(facts))

"""Patches, positions and sizes: the fast routines against the readable ones and against the reference's numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siglance.kernels import geometry, reference
from siglance.kernels.patches import patchify

GEMMA4 = {"patch_size": 16, "pool_size": 3}

grids = st.tuples(st.integers(1, 6), st.integers(1, 6)) | st.sampled_from([(1, 1), (1, 40), (40, 1)])


def random_pixels(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def in_position_order(patches):
    order = np.lexsort((patches.positions[:, 0], patches.positions[:, 1]))
    return patches.values[order], patches.positions[order]


@settings(deadline=None)
@given(grid=grids, patch_size=st.integers(1, 7), pool_size=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_patchify_is_the_reference_in_another_order(grid, patch_size, pool_size, seed):
    step = patch_size * pool_size
    pixels = random_pixels(grid[0] * step, grid[1] * step, seed)
    fast, slow = patchify(pixels, patch_size, pool_size), reference.patchify(pixels, patch_size)
    assert fast.values.dtype == np.uint8
    assert fast.positions.dtype == np.int64
    values, positions = in_position_order(fast)
    np.testing.assert_array_equal(values, slow.values)
    np.testing.assert_array_equal(positions, slow.positions)


@settings(deadline=None)
@given(grid=grids, patch_size=st.integers(1, 5), pool_size=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_pooling_block_major_patches_is_a_reshape_and_a_mean(grid, patch_size, pool_size, seed):
    """Every block holds exactly its own patches, and the blocks come in raster order."""
    step = patch_size * pool_size
    pixels = random_pixels(grid[0] * step, grid[1] * step, seed)
    patches = patchify(pixels, patch_size, pool_size)
    features = np.random.default_rng(seed).normal(size=(len(patches.values), 4)) + patches.values.mean(1, keepdims=True)
    pooled = features.reshape(-1, pool_size**2, 4).mean(axis=1)
    np.testing.assert_allclose(pooled, reference.pool(features, patches.positions, pool_size), rtol=0, atol=1e-9)


def test_patches_of_a_picture_worked_out_by_hand():
    """2x4 pixels, patches of one pixel, blocks of 2x2: left block first, rows within it, channel fastest."""
    red = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    pixels = np.stack([red, red + 10, red + 20], axis=-1)
    patches = patchify(pixels, 1, 2)
    assert patches.values[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert patches.values[0].tolist() == [0, 10, 20]
    assert patches.positions.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [3, 0], [2, 1], [3, 1]]


def test_patchify_accepts_views():
    pixels = random_pixels(96, 192)
    for view in (pixels[::-1], pixels[:, ::-1], pixels.transpose(1, 0, 2), pixels[:48, 48:]):
        np.testing.assert_array_equal(patchify(view, 16, 3).values, patchify(view.copy(), 16, 3).values)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((48, 48, 3), np.float32),
        np.zeros((48, 48), np.uint8),
        np.zeros((48, 48, 4), np.uint8),
        np.zeros((48, 50, 3), np.uint8),
        np.zeros((0, 48, 3), np.uint8),
    ],
)
def test_patchify_refuses_what_it_cannot_cut(pixels):
    with pytest.raises(ValueError, match="pixels"):
        patchify(pixels, 16, 3)


# (height, width): {budget: (height, width, soft tokens)}, computed by transformers 5.24.0
REFERENCE_SIZES = {
    (1080, 1920): {
        70: (288, 528, 66),
        140: (384, 720, 120),
        280: (576, 1056, 264),
        560: (816, 1488, 527),
        1120: (1200, 2112, 1100),
    },
    (1920, 1080): {70: (528, 288, 66), 280: (1056, 576, 264), 1120: (2112, 1200, 1100)},
    (480, 640): {
        70: (336, 432, 63),
        140: (480, 624, 130),
        280: (672, 912, 266),
        560: (960, 1296, 540),
        1120: (1344, 1824, 1064),
    },
    (3000, 100): {70: (2160, 48, 45), 140: (3072, 96, 128), 560: (6192, 192, 516), 1120: (8784, 288, 1098)},
    (5000, 10): {70: (3360, 48, 70), 280: (13440, 48, 280), 560: (25392, 48, 529), 1120: (35904, 48, 748)},
    (1, 1): {70: (384, 384, 64), 140: (528, 528, 121), 280: (768, 768, 256), 1120: (1584, 1584, 1089)},
    (512, 512): {70: (384, 384, 64), 280: (768, 768, 256), 1120: (1584, 1584, 1089)},
    (3507, 2481): {70: (432, 336, 63), 280: (912, 672, 266), 1120: (1872, 1344, 1092)},
    (672, 960): {70: (336, 480, 70), 140: (432, 672, 126), 280: (672, 960, 280), 560: (912, 1344, 532)},
    (100, 1600): {280: (192, 3168, 264)},
    (16, 1600): {280: (48, 8016, 167)},
    (1, 279): {280: (48, 13392, 279)},
    (1, 4000): {280: (48, 13440, 280), 1120: (48, 53760, 1120)},
}


@pytest.mark.parametrize(("size", "expected"), REFERENCE_SIZES.items(), ids=str)
def test_target_size_and_token_count_are_the_references(size, expected):
    for budget, (height, width, tokens) in expected.items():
        assert geometry.aspect_patches_size(*size, **GEMMA4, budget=budget) == (height, width)
        assert geometry.soft_token_count(height, width, **GEMMA4) == tokens


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([70, 140, 280, 560, 1120]))
def test_any_picture_fits_its_budget_in_whole_blocks(height, width, budget):
    new_height, new_width = geometry.aspect_patches_size(height, width, **GEMMA4, budget=budget)
    assert new_height % 48 == new_width % 48 == 0
    assert 1 <= geometry.soft_token_count(new_height, new_width, **GEMMA4) <= budget
    # an image that is turned gives the turned size
    assert geometry.aspect_patches_size(width, height, **GEMMA4, budget=budget) == (new_width, new_height)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="height is 0"):
        geometry.aspect_patches_size(0, 5, **GEMMA4, budget=280)
    with pytest.raises(ValueError, match="budget is -1"):
        geometry.aspect_patches_size(5, 5, **GEMMA4, budget=-1)
    with pytest.raises(ValueError, match="multiples of 48"):
        geometry.soft_token_count(48, 50, **GEMMA4)


def zone_plate(height, width):
    y, x = np.mgrid[:height, :width] - np.array([height, width]).reshape(2, 1, 1) / 2
    grey = 127.5 + 127.5 * np.cos((x**2 + y**2) * np.pi / max(height, width))
    return np.repeat(np.round(grey).astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    ("old", "new"),
    [((61, 47), (96, 48)), ((1, 1), (48, 48)), ((1, 97), (48, 96)), ((301, 203), (96, 48)), ((128, 128), (192, 192))],
)
@pytest.mark.parametrize(("name", "resample"), [("bicubic", 3), ("bilinear", 2)])
def test_pillow_resamples_as_the_reference_says(old, new, name, resample):
    """The engine relies on Pillow's antialiased filters on uint8; a Pillow that changes them must not pass unseen."""
    for pixels in (zone_plate(*old), random_pixels(*old)):
        ours = reference.resize(pixels, *new, name).astype(int)
        pillow = np.asarray(Image.fromarray(pixels).resize(new[::-1], Image.Resampling(resample))).astype(int)
        difference = np.abs(ours - pillow)
        assert difference.max() <= 2  # a level in each of the two passes, where a sum lies next to a half
        assert difference.mean() < 0.15


def test_reference_pool_takes_any_order_of_patches():
    pixels = random_pixels(96, 144)
    patches = patchify(pixels, 16, 3)
    shuffle = np.random.default_rng(1).permutation(len(patches.values))
    features = patches.values.astype(float)
    np.testing.assert_allclose(
        reference.pool(features[shuffle], patches.positions[shuffle], 3), reference.pool(features, patches.positions, 3)
    )

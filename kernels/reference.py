"""Image routines written to be read: loops, float64, no cleverness. Tests judge the fast routines by these.

The definitions are the reference processors' (transformers' Gemma 4 classes, Pillow's resampler), restated.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .patches import Patches

__all__ = ["patchify", "pool", "resize"]


def patchify(pixels: npt.NDArray[np.uint8], patch_size: int) -> Patches:
    """Patches of uint8 [H, W, 3] in raster order, as transformers' `convert_image_to_patches` gives them."""
    height, width, _ = pixels.shape
    values, positions = [], []
    for y in range(height // patch_size):
        for x in range(width // patch_size):
            top, left = y * patch_size, x * patch_size
            patch = pixels[top : top + patch_size, left : left + patch_size, :]
            values.append(patch.reshape(-1))  # (row, column, channel), channel fastest
            positions.append((x, y))
    return Patches(np.array(values, np.uint8), np.array(positions, np.int64))


def pool(
    features: npt.NDArray[np.floating], positions: npt.NDArray[np.int64], pool_size: int
) -> npt.NDArray[np.float64]:
    """Mean of every pool_size x pool_size block of patches, found by position, whatever the order of the rows.

    Args:
        features: [N, D], one row per patch.
        positions: int64 [N, 2], (x, y) of each patch.

    Returns:
        float64 [N / pool_size**2, D], raster order over the blocks. The factor sqrt(D) which follows in Gemma 4's
        pooler is not applied here.
    """
    blocks_per_row = (int(positions[:, 0].max()) + 1) // pool_size
    pooled = np.zeros((len(features) // pool_size**2, features.shape[1]), np.float64)
    for feature, (x, y) in zip(features, positions, strict=True):
        pooled[x // pool_size + blocks_per_row * (y // pool_size)] += feature
    return pooled / pool_size**2


def resize(pixels: npt.NDArray[np.uint8], height: int, width: int, resample: str) -> npt.NDArray[np.uint8]:
    """Antialiased resize of uint8 [H, W, C] in Pillow's convention: columns first, rounded to uint8, then rows.

    `resample` is "bicubic" (Keys, a = -0.5) or "bilinear". Pillow computes with 22-bit weights, so that
    its result may differ from this one by a level where a sum lies next to a half.
    """
    kernel, support = _FILTERS[resample]
    columns_done = _resize_first_axis(pixels.transpose(1, 0, 2), width, kernel, support).transpose(1, 0, 2)
    return _resize_first_axis(columns_done, height, kernel, support)


def _resize_first_axis(
    pixels: npt.NDArray[np.uint8], size: int, kernel: Callable[[float], float], support: float
) -> npt.NDArray[np.uint8]:
    old_size = pixels.shape[0]
    scale = old_size / size
    stretch = max(scale, 1.0)  # shrinking widens the kernel (that is the antialiasing), enlarging does not narrow it
    result = np.empty((size, *pixels.shape[1:]), np.uint8)
    for index in range(size):
        centre = (index + 0.5) * scale  # pixel i covers [i, i + 1), its centre is i + 0.5
        first = max(0, math.floor(centre - support * stretch + 0.5))
        last = min(old_size, math.floor(centre + support * stretch + 0.5))
        weights = np.array([kernel((source + 0.5 - centre) / stretch) for source in range(first, last)])
        weights /= weights.sum()  # at the border a part of the kernel is cut off
        total = np.tensordot(weights, pixels[first:last].astype(np.float64), axes=1)
        result[index] = np.clip(np.floor(total + 0.5), 0, 255)
    return result


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float, a: float = -0.5) -> float:
    """Keys, "Cubic convolution interpolation for digital image processing", 1981."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


_FILTERS: dict[str, tuple[Callable[[float], float], float]] = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}

"""Integer geometry of images: which size an image is resized to, how many soft tokens that gives, how it is cropped."""

import math

__all__ = ["aspect_patches_size", "pan_and_scan_crops", "soft_token_count", "squash_side"]


def aspect_patches_size(height: int, width: int, *, patch_size: int, pool_size: int, budget: int) -> tuple[int, int]:
    """The size that fills a budget of soft tokens and keeps the aspect ratio to within one step per side.

    Both sides of the result are whole multiples of `patch_size * pool_size` pixels, rounded down, at least one
    step. Small images are enlarged without limit. The order of the float64 operations is the one of Gemma 4's
    reference processors (transformers `get_aspect_ratio_preserving_size`, JAX `get_target_dimensions`): another order
    gives another size where a side falls on a multiple exactly.

    Args:
        height, width: size of the image in pixels.
        patch_size: side of a patch in pixels.
        pool_size: patches per side of one soft token.
        budget: greatest number of soft tokens.

    Returns:
        (height, width) in pixels, with `soft_token_count(...) <= budget`.

    Raises:
        ValueError: an argument is below 1, or no such size exists.
    """
    _require_positive(height=height, width=width, patch_size=patch_size, pool_size=pool_size, budget=budget)
    step = patch_size * pool_size
    target_pixels = budget * pool_size**2 * patch_size**2
    factor = math.sqrt(target_pixels / (height * width))
    new_height = math.floor(factor * height / step) * step
    new_width = math.floor(factor * width / step) * step
    if new_height == 0 and new_width == 0:
        raise ValueError(f"{width}x{height} pixels cannot fill {budget} soft tokens of {step}x{step} pixels")
    # A strip thinner than one step: one row (or column) of soft tokens, as long as the aspect ratio and the budget say.
    if new_height == 0:
        new_height, new_width = step, min(math.floor(width / height) * step, budget * step)
    elif new_width == 0:
        new_height, new_width = min(math.floor(height / width) * step, budget * step), step
    if new_height * new_width > target_pixels:
        raise ValueError(f"{width}x{height} pixels would become {new_width}x{new_height}, over {budget} soft tokens")
    return new_height, new_width


def squash_side(*, patch_size: int, pool_size: int, budget: int) -> int:
    """Side in pixels of the square image that becomes `budget` soft tokens.

    Raises ValueError if an argument is below 1 or the budget is no square number.
    """
    _require_positive(patch_size=patch_size, pool_size=pool_size, budget=budget)
    side = math.isqrt(budget)
    if side * side != budget:
        raise ValueError(f"a square image cannot become {budget} soft tokens, which is no square number")
    return side * pool_size * patch_size


def pan_and_scan_crops(
    height: int, width: int, *, min_crop: int, max_crops: int, min_ratio: float
) -> list[tuple[int, int, int, int]]:
    """The crops in which a long image is shown beside its full view: Gemma 3's "pan and scan".

    The long side is cut into about as many equal pieces as it is longer than the short side, at least 2 and at most
    `max_crops`. The order of operations is the one of Gemma 3's reference processor (transformers
    `pan_and_scan_batched`).

    Args:
        height, width: size of the image in pixels.
        min_crop: shortest side in pixels that a crop may have; if one is shorter there are no crops at all.
        max_crops: greatest number of crops.
        min_ratio: long side over short side from which an image is cut.

    Returns:
        (top, left, bottom, right) of each crop in pixels, left to right or top to bottom; bottom and right are
        excluded. Together they cover the image without overlap, and only the last may be smaller than the others.

    Raises:
        ValueError: an argument is below 1.
    """
    _require_positive(height=height, width=width, min_crop=min_crop, max_crops=max_crops)
    long, short = max(height, width), min(height, width)
    if long / short < min_ratio:
        return []
    count = min(long // min_crop, math.floor(long / short + 0.5))
    count = min(max_crops, max(2, count))
    piece = math.ceil(long / count)
    if min(piece, short) < min_crop:
        return []
    spans = [(start, min(start + piece, long)) for start in range(0, long, piece)]
    if width >= height:
        return [(0, first, height, last) for first, last in spans]
    return [(first, 0, last, width) for first, last in spans]


def soft_token_count(height: int, width: int, *, patch_size: int, pool_size: int) -> int:
    """Soft tokens of an image whose sides are already whole multiples of `patch_size * pool_size` pixels.

    Raises ValueError if an argument is below 1 or a side is not such a multiple.
    """
    _require_positive(height=height, width=width, patch_size=patch_size, pool_size=pool_size)
    step = patch_size * pool_size
    if height % step or width % step:
        raise ValueError(f"{width}x{height} pixels: both sides must be multiples of {step}")
    return (height // step) * (width // step)


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")

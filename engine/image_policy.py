"""Pixels to patches. A policy is the rule that says to which size an image is resized; the manifest names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..kernels import geometry
from ..kernels.patches import Patches, patchify
from .errors import ImageError
from .manifest import ImageFacts

__all__ = ["POLICIES", "Layout", "Policy", "resize"]

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, slots=True)
class Layout:
    """The size an image is resized to, in pixels, and the number of soft tokens it becomes."""

    height: int
    width: int
    soft_tokens: int


@dataclass(frozen=True, slots=True)
class Policy:
    """How an image becomes patches.

    `layout(height, width, facts, budget)` works on integers only, so that a prompt can be laid out and refused before
    a pixel is touched. `budget` is a number of soft tokens; None means the default of the bundle.
    """

    layout: Callable[[int, int, ImageFacts, int | None], Layout]

    def prepare(self, pixels: npt.NDArray[np.uint8], facts: ImageFacts, budget: int | None = None) -> Patches:
        """Resize uint8 [H, W, 3] to its layout and cut it into block-major patches.

        Callers that time the stages call `layout`, `resize` and `patchify` themselves.
        """
        layout = self.layout(pixels.shape[0], pixels.shape[1], facts, budget)
        resized = resize(pixels, layout.height, layout.width, facts.resample)
        return patchify(resized, facts.patch_size, facts.pool_size)


def resize(pixels: npt.NDArray[np.uint8], height: int, width: int, resample: str) -> npt.NDArray[np.uint8]:
    """One Pillow resize of uint8 [H, W, 3] straight to (height, width); the input itself if it has that size.

    `resample` is "bicubic" or "bilinear": antialiased, on uint8, the definition that the reference processors
    (transformers' Pillow classes) follow to the last level.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), _RESAMPLE[resample]))


def _aspect_patches(height: int, width: int, facts: ImageFacts, budget: int | None) -> Layout:
    """Fill a token budget and keep the aspect ratio (Gemma 4); see `geometry.aspect_patches_size`."""
    budget = facts.default_budget if budget is None else budget
    if not _is_among(budget, facts.budgets):
        allowed = ", ".join(map(str, facts.budgets))
        raise ImageError(f"an image budget of {budget!r} soft tokens is not possible, this bundle allows {allowed}")
    try:
        new_height, new_width = geometry.aspect_patches_size(
            height, width, patch_size=facts.patch_size, pool_size=facts.pool_size, budget=budget
        )
    except ValueError as error:
        raise ImageError(str(error)) from None
    soft_tokens = geometry.soft_token_count(
        new_height, new_width, patch_size=facts.patch_size, pool_size=facts.pool_size
    )
    return Layout(new_height, new_width, soft_tokens)


def _squash(height: int, width: int, facts: ImageFacts, budget: int | None) -> Layout:
    """One square size for every image, whatever its aspect ratio (PaliGemma, Gemma 3)."""
    [only] = facts.budgets
    if budget is not None and not _is_among(budget, facts.budgets):
        raise ImageError(
            f"an image budget of {budget!r} soft tokens is not possible, this bundle has one image size of {only}"
        )
    if height < 1 or width < 1:
        raise ImageError(f"{width}x{height} pixels: both sides must be at least 1")
    side = geometry.squash_side(patch_size=facts.patch_size, pool_size=facts.pool_size, budget=only)
    return Layout(side, side, only)


def _is_among(budget: object, budgets: tuple[int, ...]) -> bool:
    """Whether an integer is one of the budgets; 70.0 equals 70 and is refused."""
    return isinstance(budget, (int, np.integer)) and budget in budgets


POLICIES: dict[str, Policy] = {"aspect_patches": Policy(layout=_aspect_patches), "squash": Policy(layout=_squash)}

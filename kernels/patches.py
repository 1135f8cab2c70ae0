"""Pixels to patches, in the order that makes pooling a reshape.

The graph pools each block of `pool_size` x `pool_size` patches into one soft token. With the patches of a block next to
each other this is `reshape [n, pool_size**2, D]` and a mean, without any position arithmetic. Full attention with
explicit positions does not care about the order of its tokens, so nothing else in the graph changes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Patches", "patchify"]


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """The patches of one image.

    Attributes:
        values: uint8 [N, 3 * patch_size**2]; one patch is (row in patch, column in patch, channel), channel fastest.
        positions: int64 [N, 2]; (x, y) of each patch on the patch grid, x is the column.
    """

    values: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.int64]


def patchify(pixels: npt.NDArray[np.uint8], patch_size: int, pool_size: int) -> Patches:
    """Cut an image into patches, block-major.

    Blocks of pool_size x pool_size patches come in raster order, and the patches of a block in raster order within it.
    Values stay uint8: normalisation is part of the vision graph.

    Args:
        pixels: uint8 [H, W, 3], H and W whole multiples of `patch_size * pool_size`.
        patch_size: side of a patch in pixels.
        pool_size: patches per side of a block.

    Raises:
        ValueError: another dtype or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    height, width, _ = pixels.shape
    step = patch_size * pool_size
    if not height or not width or height % step or width % step:
        raise ValueError(f"{width}x{height} pixels: both sides must be positive multiples of {step}")
    rows, columns = height // step, width // step
    # One patch row (patch_size pixels) is moved as one opaque item: half the time of copying single bytes.
    patch_rows = np.ascontiguousarray(pixels).reshape(height, width * 3).view(f"V{patch_size * 3}")
    grid = patch_rows.reshape(rows, pool_size, patch_size, columns, pool_size)
    # from [block row, patch row, pixel row, block column, patch column]
    # to   [block row, block column, patch row, patch column, pixel row]
    values = np.ascontiguousarray(grid.transpose(0, 3, 1, 4, 2)).view(np.uint8)
    return Patches(values.reshape(-1, patch_size * patch_size * 3), _positions(rows, columns, pool_size))


def _positions(rows: int, columns: int, pool_size: int) -> npt.NDArray[np.int64]:
    """(x, y) of every patch of rows x columns blocks, block-major: int64 [N, 2]."""
    shape = (rows, columns, pool_size, pool_size)
    positions = np.empty((*shape, 2), np.int64)
    within = np.arange(pool_size)
    positions[..., 0] = np.arange(columns)[None, :, None, None] * pool_size + within[None, None, None, :]
    positions[..., 1] = np.arange(rows)[:, None, None, None] * pool_size + within[None, None, :, None]
    return positions.reshape(-1, 2)

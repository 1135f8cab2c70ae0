"""Block quantisation (being written)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Blocks:
    bits: int
    block: int
    codes: np.ndarray
    scales: np.ndarray


def quantize(matrix: np.ndarray, bits: int, block: int) -> Blocks:
    rows, columns = matrix.shape
    half = 2 ** (bits - 1)
    cut = matrix.reshape(rows, columns // block, block)
    scales = np.abs(cut).max(-1) / (half - 1)
    scales[scales == 0] = 1
    codes = np.clip(np.rint(cut / scales[..., None]) + half, 0, 2 * half - 1).astype(np.uint8).reshape(rows, columns)
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Blocks(bits, block, codes, scales.astype(np.float32))

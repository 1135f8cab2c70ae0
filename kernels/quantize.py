"""Block quantisation of matrices: a scale for each block of columns of a row, codes of 4 or 8 bits.

The layout is what ONNX Runtime's MatMulNBits and GatherBlockQuantized read: w = scale * (code - zero point) with the
zero point in the middle (8 or 128), 4-bit codes two to a byte, low nibble first. The range is used whole: a scale may
be negative, so that the largest weight of a block, whatever its sign, can take the one code that has no opposite (-8).

Scales are searched: among scales that send the largest weight to some place near the end of the range the one with the
least squared error wins, then scale and codes are fitted to each other in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = [
    "BLOCK_SIZES",
    "Blocks",
    "dequantize",
    "fit_scales",
    "pack",
    "plain_scales",
    "quantize",
    "round_codes",
    "unpack",
]

BLOCK_SIZES = (16, 32, 64, 128, 256)  # what MatMulNBits reads

# Rows are worked on in slices of about this many weights: the temporaries of one slice stay in the processor's cache.
_SLICE = 1 << 16
# Where the largest weight of a block may land, in codes relative to the zero point. The first two are the scales of
# plain rounding, with and without the code that has no opposite; beyond the end of the range the weight is clipped.
_PLACES = {
    4: (-7.0, -8.0, -7.4, -7.8, -8.2, -8.6, -9.0),
    8: (-127.0, -128.0, -126.0, -129.0, -131.0, -133.0),
}
_POLISH = 2  # rounds of fitting scale and codes to each other


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [rows, columns] in blocks of `block` columns.

    `codes` uint8 [rows, columns * bits // 8] (4 bits: low nibble first, zero point 8; 8 bits: zero point 128), `scales`
    float32 [rows, columns // block]. Raises ValueError when the parts do not fit each other.
    """

    bits: int
    block: int
    codes: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        _check_format(self.bits, self.block)
        rows, count = self.scales.shape
        if self.codes.shape != (rows, count * self.block * self.bits // 8):
            raise ValueError(
                f"codes {list(self.codes.shape)} and scales {list(self.scales.shape)} do not fit each other at "
                f"{self.bits} bits in blocks of {self.block}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.scales.shape[0], self.scales.shape[1] * self.block

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def quantize(matrix: np.ndarray, bits: int, block: int, importance: np.ndarray | None = None) -> Blocks:
    """`matrix` [rows, columns] in blocks whose scales make the squared error small.

    `importance` [columns], not negative, weighs the error of each column (the mean square of the input that meets it);
    equal weights without it. No block has a larger error than plain rounding to the nearest code, and a matrix that was
    dequantised from the result of this function comes back unchanged. A block of zeros has the scale zero.
    Raises ValueError for columns that `block` does not divide and for values that are not finite.
    """
    rows, columns = matrix.shape
    _check_format(bits, block)
    if columns % block:
        raise ValueError(f"{columns} columns cannot be cut into blocks of {block}")
    codes = np.empty((rows, columns * bits // 8), np.uint8)
    scales = np.empty((rows, columns // block), np.float32)
    step = max(1, _SLICE // columns)
    for start in range(0, rows, step):
        part = matrix[start : start + step].astype(np.float32, copy=False).reshape(-1, columns // block, block)
        found = fit_scales(part, bits, None if importance is None else importance.reshape(-1, block))
        scales[start : start + step] = found
        codes[start : start + step] = pack(round_codes(part, found, bits).reshape(-1, columns), bits)
    return Blocks(bits, block, codes, scales)


def dequantize(blocks: Blocks) -> np.ndarray:
    """The matrix that `blocks` stand for, float32 [rows, columns]: scale * (code - zero point), rounded once."""
    values = unpack(blocks).astype(np.float32)
    values -= 2 ** (blocks.bits - 1)
    cut = values.reshape(blocks.scales.shape[0], -1, blocks.block)
    cut *= blocks.scales[..., None]
    return values


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 [rows, columns] as they are stored, [rows, columns * bits // 8]."""
    return codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(blocks: Blocks) -> np.ndarray:
    """The codes of all entries, uint8 [rows, columns]."""
    if blocks.bits == 8:
        return blocks.codes
    codes = np.empty((blocks.codes.shape[0], blocks.codes.shape[1] * 2), np.uint8)
    codes[:, 0::2] = blocks.codes & 15
    codes[:, 1::2] = blocks.codes >> 4
    return codes


def round_codes(values: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The nearest codes, uint8 [..., n], of `values` [..., n] at `scales` [...]; ties go to the even code."""
    half = 2 ** (bits - 1)
    codes = np.rint(values / _divisors(scales)[..., None])
    np.clip(codes, -half, half - 1, out=codes)
    codes += half
    return codes.astype(np.uint8)


def fit_scales(values: np.ndarray, bits: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Scales float32 [...] of blocks `values` float32 [..., n] that make the squared error of rounding small.

    `importance`, broadcast against `values`, weighs the errors. Raises ValueError for values that are not finite.
    """
    scales = plain_scales(values, bits)
    largest = scales * np.float32(_PLACES[bits][0])
    root = None if importance is None else np.sqrt(importance, dtype=np.float32)
    errors, codes = _errors(values, scales, largest, bits, root)
    for place in _PLACES[bits][1:]:
        _keep_better(values, scales, errors, codes, largest / np.float32(place), largest, bits, root)
    for _ in range(_POLISH):
        fitted = _least_squares(values, codes, scales, importance)
        _keep_better(values, scales, errors, codes, fitted, largest, bits, root)
    return _restore(values, scales, errors, bits)


def plain_scales(values: np.ndarray, bits: int) -> np.ndarray:
    """The scales float32 [...] of plain rounding: the largest weight of a block [..., n] takes the last code.

    Raises ValueError for values that are not finite.
    """
    at = np.abs(values).argmax(-1)[..., None]
    largest = np.take_along_axis(values, at, -1)[..., 0]
    if not np.isfinite(largest).all():
        raise ValueError("the matrix has values that are not finite")
    return (largest / np.float32(_PLACES[bits][0])).astype(np.float32)


def _keep_better(
    values: np.ndarray,
    scales: np.ndarray,
    errors: np.ndarray,
    codes: np.ndarray,
    tried: np.ndarray,
    largest: np.ndarray,
    bits: int,
    root: np.ndarray | None,
) -> None:
    """Take over, in place, the scales `tried` of the blocks that they make better."""
    found, new_codes = _errors(values, tried, largest, bits, root)
    better = found < errors
    np.copyto(scales, tried, where=better)
    np.copyto(errors, found, where=better)
    np.copyto(codes, new_codes, where=better[..., None])


def _errors(
    values: np.ndarray, scales: np.ndarray, largest: np.ndarray, bits: int, root: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors [...] of rounding, in units of the block's largest square, and the codes less the zero point.

    In these units nothing overflows or vanishes, whatever the size of the weights.
    """
    half = 2 ** (bits - 1)
    exact = values / _divisors(scales)[..., None]
    codes = np.rint(exact)
    np.clip(codes, -half, half - 1, out=codes)
    exact -= codes
    if root is not None:
        exact *= root
    return np.square(scales / _divisors(largest)) * np.einsum("...n,...n->...", exact, exact), codes


def _least_squares(
    values: np.ndarray, codes: np.ndarray, scales: np.ndarray, importance: np.ndarray | None
) -> np.ndarray:
    """The scales that fit given codes best: sum(w x q) / sum(w q q)."""
    weighted = codes if importance is None else codes * importance.astype(np.float32)
    squares = np.einsum("...n,...n->...", weighted, codes)
    # In units of the present scale, where the sums can neither overflow nor vanish.
    ratio = np.einsum("...n,...n->...", values / _divisors(scales)[..., None], weighted) / _divisors(squares)
    return (scales * ratio).astype(np.float32)


def _restore(values: np.ndarray, scales: np.ndarray, errors: np.ndarray, bits: int) -> np.ndarray:
    """Let blocks that are multiples of a scale but for rounding have exactly that scale.

    The scale of such a block was computed by a division and can be off by its last bit; a neighbour is exact.
    """
    near = np.flatnonzero(errors.ravel() < 1e-9)
    if not len(near):
        return scales
    half = 2 ** (bits - 1)
    blocks, tried = values.reshape(-1, values.shape[-1])[near], scales.ravel()[near]
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[:, None], -1)[:, 0]
    divided = largest / _divisors(np.rint(largest / _divisors(tried)))
    best, misses = tried.copy(), np.full(len(near), np.inf)
    for other in (
        *(tried, divided),
        *(np.nextafter(divided, np.float32(np.inf)), np.nextafter(divided, np.float32(-np.inf))),
    ):
        codes = round_codes(blocks, other, bits).astype(np.float32) - half
        missed = np.abs(codes * other[:, None] - blocks).max(-1)
        np.copyto(best, other, where=missed < misses)
        np.minimum(misses, missed, out=misses)
    restored = scales.copy()
    restored.ravel()[near] = best
    return restored


def _divisors(scales: np.ndarray) -> np.ndarray:
    """`scales` with 1 for 0, which divides zeros only."""
    return np.where(scales == 0, np.float32(1), scales)


def _check_format(bits: int, block: int) -> None:
    if bits not in _PLACES:
        raise ValueError(f"{bits} bits are not supported (supported: 4, 8)")
    if block not in BLOCK_SIZES:
        raise ValueError(f"blocks of {block} columns are not supported (supported: {', '.join(map(str, BLOCK_SIZES))})")

"""Block quantisation with error feedback: what rounding does to a product is made up for by the columns still to come.

Method: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022). Rows
w of a matrix meet inputs x with the second moments H = E[x x^T]; rounded to r they cause the mean squared error
(w - r) H (w - r)^T. Columns are rounded in order, and the error of each is spread over the later ones so that this
quantity grows as little as it can; the coefficients are the rows of U, the upper factor of inverse(H) = U^T U.
Scales are searched block by block, for the columns as they are when their turn comes.
"""

from __future__ import annotations

import numpy as np

from .quantize import Blocks, fit_scales, pack

__all__ = ["ErrorFeedback", "product_error"]

# Rows do not depend on each other; a slice of about this many weights keeps the working set in the processor's cache.
_SLICE = 1 << 19
# Beyond so many columns the factorisation is done in float32, so that it never takes more than about 2 GB.
_DOUBLE_COLUMNS = 8192


class ErrorFeedback:
    """Quantises matrices [rows, columns] whose inputs have the second moments `moments` [columns, columns].

    `damping`, in units of the mean square of an input, is added to the diagonal: it stands for what a sample of inputs
    does not know, and keeps columns that met no input harmless. Raises ValueError for moments that are not finite.
    """

    def __init__(self, moments: np.ndarray, damping: float = 0.01):
        columns = len(moments)
        if moments.shape != (columns, columns):
            raise ValueError(f"moments {list(moments.shape)} must be square")
        if not np.isfinite(moments).all():
            raise ValueError("the second moments of the inputs are not finite")
        mean = float(np.diag(moments).mean(dtype=np.float64)) or 1.0
        # Reversed, so that the lower factor that numpy computes is the upper one of the matrix itself: H = P P^T.
        reverse = moments[::-1, ::-1].astype(np.float64 if columns <= _DOUBLE_COLUMNS else np.float32)
        reverse /= mean
        reverse[np.diag_indices(columns)] += damping
        self._importance = np.diag(reverse)[::-1].astype(np.float32)
        upper = np.linalg.cholesky(reverse)[::-1, ::-1]
        del reverse
        self._factor = np.triu(np.linalg.inv(upper)).astype(np.float32)

    def quantize(self, matrix: np.ndarray, bits: int, block: int) -> Blocks:
        """`matrix`, or some rows of it, in blocks. Raises ValueError as `kernels.quantize.quantize` does."""
        rows, columns = matrix.shape
        if columns != len(self._factor):
            raise ValueError(f"a matrix of {columns} columns does not fit moments of {len(self._factor)}")
        if columns % block:
            raise ValueError(f"{columns} columns cannot be cut into blocks of {block}")
        codes = np.empty((rows, columns * bits // 8), np.uint8)
        scales = np.empty((rows, columns // block), np.float32)
        step = max(1, _SLICE // columns)
        for start in range(0, rows, step):
            # Transposed, so that a column, with which everything is done, lies in one piece.
            turned = np.array(matrix[start : start + step].T, np.float32, order="C")
            scales[start : start + step] = self._round(turned, bits, block).T
            codes[start : start + step] = pack(np.ascontiguousarray(turned.T).astype(np.uint8), bits)
        return Blocks(bits, block, codes, scales)

    def _round(self, turned: np.ndarray, bits: int, block: int) -> np.ndarray:
        """Replace weights float32 [columns, rows] by their codes; returns the scales [columns / block, rows]."""
        columns, rows = turned.shape
        scales = np.empty((columns // block, rows), np.float32)
        errors = np.empty((block, rows), np.float32)
        for start in range(0, columns, block):
            stop = start + block
            part, factor = turned[start:stop], self._factor[start:stop]
            scale = fit_scales(np.ascontiguousarray(part.T), bits, self._importance[start:stop])
            _round_block(part, factor[:, start:stop], scale, bits, errors)
            scales[start // block] = scale
            if stop < columns:
                turned[stop:] -= factor[:, stop:].T @ errors
        return scales


def _round_block(part: np.ndarray, factor: np.ndarray, scale: np.ndarray, bits: int, errors: np.ndarray) -> None:
    """Replace one block of weights [block, rows] by codes, and put the error of each column, divided by its own
    coefficient, into `errors` [block, rows]."""
    half = 2 ** (bits - 1)
    divisor = np.where(scale == 0, np.float32(1), scale)
    spread = np.empty_like(part)
    code = np.empty_like(scale)
    for index, column in enumerate(part):
        np.divide(column, divisor, out=code)
        np.rint(code, out=code)
        np.clip(code, -half, half - 1, out=code)
        error = errors[index]
        np.multiply(code, scale, out=error)
        np.subtract(column, error, out=error)
        error /= factor[index, index]
        np.add(code, half, out=column)
        later = slice(index + 1, len(part))
        np.multiply(factor[index, later, None], error, out=spread[later])
        part[later] -= spread[later]


def product_error(matrix: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """The mean squared error of the product with inputs of these moments, relative to its mean square."""
    difference = rounded - matrix
    squares = [float(np.einsum("ij,ij->", part @ moments, part, dtype=np.float64)) for part in (difference, matrix)]
    return squares[0] / squares[1] if squares[1] else 0.0

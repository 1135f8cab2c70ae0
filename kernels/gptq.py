"""Block quantisation with error feedback: what rounding does to a product is made up for by the other columns.

Rows w of a matrix meet inputs x with the second moments H = E[x x^T]; rounded to r they cause the mean squared error
(w - r) H (w - r)^T. Three steps make it small:

1. Columns are rounded in order, and the error of each is spread over the later ones so that the whole grows as little
   as it can; the coefficients are the rows of U, the upper factor of inverse(H) = U^T U. Scales are searched block by
   block, for the columns as they are when their turn comes.
   (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022)
2. With the scales fixed, each code in turn becomes the best one for all the others.
   (Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", 2023)
3. With the codes fixed, the scales of all blocks of a row are the solution of a small least squares problem.
"""

from __future__ import annotations

import numpy as np

from .quantize import Blocks, fit_scales, pack, plain_scales

__all__ = ["ErrorFeedback"]

# Rows do not depend on each other; a slice of about this many weights bounds the memory of their copies.
_SLICE = 1 << 22
# Columns rounded before what they cause elsewhere is added up by one matrix product.
_STEP = 32
# Beyond so many columns the factorisation is done in float32, which takes half the time and memory.
_DOUBLE_COLUMNS = 1024


class ErrorFeedback:
    """Quantises matrices [rows, columns] whose inputs have the second moments `moments` [columns, columns].

    `damping`, in units of the mean square of an input, is added to the diagonal: it stands for what a sample of inputs
    does not know, and keeps columns that met no input harmless. Raises ValueError for moments that are not finite or
    not those of any inputs.
    """

    def __init__(self, moments: np.ndarray, damping: float):
        columns = len(moments)
        if moments.shape != (columns, columns):
            raise ValueError(f"moments {list(moments.shape)} must be square")
        mean = float(np.diag(moments).mean(dtype=np.float64))
        if not np.isfinite(mean) or not np.isfinite(moments).all():
            raise ValueError("the second moments of the inputs are not finite")
        damped = moments.astype(np.float64 if columns <= _DOUBLE_COLUMNS else np.float32)
        damped /= mean or 1.0
        damped[np.diag_indices(columns)] += damping
        try:
            # Reversed, so that the lower factor that numpy computes is the upper one of the matrix itself: H = P P^T.
            upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        except np.linalg.LinAlgError:
            raise ValueError("the second moments of the inputs are not positive") from None
        self._factor = _inverse(upper).astype(np.float32)
        self._moments = damped.astype(np.float32)
        self._importance = np.diag(self._moments).copy()

    def quantize(self, matrix: np.ndarray, bits: int, block: int, *, polish: bool = True) -> Blocks:
        """`matrix`, or some rows of it, in blocks. With the damped moments no row has a larger error than with plain
        rounding. `polish` False does step 1 only, without that promise. Raises ValueError as
        `kernels.quantize.quantize` does.
        """
        rows, columns = matrix.shape
        if columns != len(self._factor):
            raise ValueError(f"a matrix of {columns} columns does not fit moments of {len(self._factor)}")
        if columns % block:
            raise ValueError(f"{columns} columns cannot be cut into blocks of {block}")
        packed = np.empty((rows, columns * bits // 8), np.uint8)
        stored = np.empty((rows, columns // block), np.float32)
        step = max(1, _SLICE // columns)
        for start in range(0, rows, step):
            part = np.ascontiguousarray(matrix[start : start + step], np.float32)
            codes, scales = self._round(part, bits, block)
            if polish:
                self._improve(part, codes, scales, bits)
                scales = self._fit(part, codes, scales)
                self._keep_plain(part, codes, scales, bits)
            stored[start : start + step] = scales.T
            codes += 2 ** (bits - 1)
            packed[start : start + step] = pack(np.ascontiguousarray(codes.T).astype(np.uint8), bits)
        return Blocks(bits, block, packed, stored)

    def errors(self, matrix: np.ndarray, rounded: np.ndarray) -> np.ndarray:
        """The mean squared errors [rows] of the products with `rounded`, in units of the mean square of an input."""
        difference = rounded - matrix
        return np.einsum("ij,ij->i", difference @ self._moments, difference, dtype=np.float64)

    # Inside, a slice of a matrix is turned: codes (less the zero point) are float32 [columns, rows] and scales
    # float32 [blocks, rows], so that a column, with which everything is done, lies in one piece.

    def _round(self, part: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Step 1: codes and scales of `part` [rows, columns]."""
        turned = np.array(part.T, order="C")
        columns, rows = turned.shape
        scales = np.empty((columns // block, rows), np.float32)
        errors = np.empty((_STEP, rows), np.float32)
        for start in range(0, columns, _STEP):
            stop = min(start + _STEP, columns)
            for column in range(start, stop):
                if column % block == 0:
                    # Steps and blocks begin together, or two blocks make one step: these columns are up to date.
                    ahead = np.ascontiguousarray(turned[column : column + block].T)
                    scales[column // block] = fit_scales(ahead, bits, self._importance[column : column + block])
                scale = scales[column // block]
                code = _nearest(turned[column], scale, bits)
                error = errors[column - start]
                np.multiply(code, scale, out=error)
                np.subtract(turned[column], error, out=error)
                error /= self._factor[column, column]
                turned[column] = code
                turned[column + 1 : stop] -= self._factor[column, column + 1 : stop, None] * error
            if stop < columns:
                turned[stop:] -= self._factor[start:stop, stop:].T @ errors[: stop - start]
        return turned, scales

    def _improve(self, part: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int) -> None:
        """Step 2, in place: the best code for each entry, the others as they are."""
        columns, rows = codes.shape
        block = columns // len(scales)
        gradient = (self._moments @ (part - _values(codes, scales)).T).astype(np.float32, copy=False)
        changes = np.empty((_STEP, rows), np.float32)
        for start in range(0, columns, _STEP):
            stop = min(start + _STEP, columns)
            for column in range(start, stop):
                scale = scales[column // block]
                change = changes[column - start]
                np.multiply(codes[column], scale, out=change)
                best = _nearest(change + gradient[column] / self._moments[column, column], scale, bits)
                np.subtract(best, codes[column], out=change)
                change *= scale
                codes[column] = best
                gradient[column + 1 : stop] -= self._moments[column, column + 1 : stop, None] * change
            if stop < columns:
                gradient[stop:] -= self._moments[stop:, start:stop] @ changes[: stop - start]

    def _fit(self, part: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Step 3: the best scales for given codes."""
        columns, rows = codes.shape
        count = len(scales)
        block = columns // count
        cut = np.ascontiguousarray(codes.T).reshape(rows, count, block)
        sides = np.empty((rows, count, count))
        for index in range(count):
            products = cut[:, index] @ self._moments[index * block : (index + 1) * block]
            sides[:, index] = np.einsum("rbk,rbk->rb", products.reshape(rows, count, block), cut)
        wanted = np.einsum("rbk,rbk->rb", (part @ self._moments).reshape(rows, count, block), cut)
        diagonal = np.einsum("rbb->rb", sides)
        unused = diagonal <= 0  # all codes are zero: any scale will do, and the matrix would be singular
        sides += sides.transpose(0, 2, 1)
        sides /= 2
        mean = diagonal.mean(1, keepdims=True)
        diagonal += np.where(unused, 1.0, 1e-7 * mean)
        found = np.linalg.solve(sides, wanted[..., None].astype(np.float64))[..., 0]
        return np.where(unused | ~np.isfinite(found), scales.T, found).astype(np.float32).T

    def _keep_plain(self, part: np.ndarray, codes: np.ndarray, scales: np.ndarray, bits: int) -> None:
        """Round the rows plainly, in place, for which that is better."""
        rows, columns = part.shape
        block = columns // len(scales)
        plain = plain_scales(part.reshape(rows, -1, block), bits).T
        plain_codes = _nearest(part.T, np.repeat(plain, block, axis=0), bits)
        worse = self.errors(part, _values(codes, scales)) > self.errors(part, _values(plain_codes, plain))
        codes[:, worse], scales[:, worse] = plain_codes[:, worse], plain[:, worse]


def _inverse(upper: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, by halves: a tenth of the work of `numpy.linalg.inv`."""
    size = len(upper)
    if size <= 64:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    found = np.zeros_like(upper)
    found[:half, :half], found[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found[:half, half:] = -found[:half, :half] @ (upper[:half, half:] @ found[half:, half:])
    return found


def _nearest(values: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """The nearest codes, less the zero point, of `values` at `scale`, float32."""
    half = 2 ** (bits - 1)
    codes = values / np.where(scale == 0, np.float32(1), scale)
    np.rint(codes, out=codes)
    return np.clip(codes, -half, half - 1, out=codes)


def _values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The matrix [rows, columns] that turned codes and scales stand for."""
    values = codes.reshape(len(scales), -1, codes.shape[1]) * scales[:, None]
    return values.reshape(codes.shape).T

"""Blocks of 4 and 8 bits: the layout that onnxruntime reads, and what `quantize` promises for any matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.kernels.quantize import BLOCK_SIZES, Blocks, dequantize, pack, quantize, round_codes, unpack

BITS = [4, 8]


def drawn(seed: int, rows: int, columns: int, size: float, zeros: float = 0.0) -> np.ndarray:
    """Weights with heavy tails, a share of them zero, float32."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, (rows, columns)) * size
    return np.where(rng.random(values.shape) < zeros, 0, values).astype(np.float32)


def plainly_rounded(weights: np.ndarray, bits: int) -> np.ndarray:
    """One block by the definition, float64: the largest weight is 7 (or 127) steps from zero."""
    half = 2 ** (bits - 1)
    largest = weights[np.abs(weights).argmax()]
    step = float(largest) / -(half - 1)
    codes = [min(max(round(float(weight) / step), -half), half - 1) if step else 0 for weight in weights]
    return np.array([step * code for code in codes])


def test_codes_lie_where_the_operator_looks_for_them():
    """MatMulNBits: two codes to a byte, the first in the low nibble; the zero point is 8, or 128."""
    codes = np.array([[0, 8, 15, 1], [7, 9, 8, 8]], np.uint8)
    assert pack(codes, 4).tolist() == [[0x80, 0x1F], [0x97, 0x88]]
    assert pack(codes, 8) is codes
    wide = np.zeros((1, 16), np.uint8)
    wide[0, :4] = 0, 8, 15, 1
    scales = np.array([[0.5]], np.float32)
    four, eight = Blocks(4, 16, pack(wide, 4), scales), Blocks(8, 16, wide, scales)
    assert np.array_equal(unpack(four), wide)
    assert np.array_equal(unpack(eight), wide)
    assert dequantize(four)[0, :4].tolist() == [-4, 0, 3.5, -3.5]
    assert dequantize(eight)[0, :4].tolist() == [-64, -60, -56.5, -63.5]


def test_codes_are_the_nearest_ties_to_even_and_never_beyond_the_ends():
    values = np.array([[0.5, 1.5, 2.5, -0.5, 100, -100]], np.float32)
    assert (round_codes(values, np.ones(1, np.float32), 4) - 8.0).tolist() == [[0, 2, 2, 0, 7, -8]]


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    block=st.sampled_from(BLOCK_SIZES),
    exponent=st.integers(-30, 30),
    zeros=st.sampled_from([0.0, 0.5, 0.98]),
    weighted=st.booleans(),
)
def test_law_no_block_is_worse_than_plain_rounding(bits, seed, rows, blocks, block, exponent, zeros, weighted):
    matrix = drawn(seed, rows, blocks * block, 10.0**exponent, zeros)
    rng = np.random.default_rng(seed + 1)
    importance = np.exp(rng.standard_normal(matrix.shape[1])).astype(np.float32) if weighted else None
    found = dequantize(quantize(matrix, bits, block, importance)).astype(np.float64)
    weights = np.ones(matrix.shape[1]) if importance is None else importance.astype(np.float64)
    for row in range(rows):
        for start in range(0, blocks * block, block):
            part = slice(start, start + block)
            exact, size = matrix[row, part].astype(np.float64), float(np.abs(matrix[row, part]).max()) or 1.0
            plain = plainly_rounded(matrix[row, part], bits)
            error, bound = (
                float(weights[part] @ np.square((values - exact) / size)) for values in (found[row, part], plain)
            )
            assert error <= bound * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), block=st.sampled_from(BLOCK_SIZES), exponent=st.integers(-30, 30))
def test_law_a_matrix_that_was_rounded_comes_back_bit_for_bit(bits, seed, block, exponent):
    once = dequantize(quantize(drawn(seed, 3, 2 * block, 10.0**exponent), bits, block))
    assert np.array_equal(dequantize(quantize(once, bits, block)), once)


@pytest.mark.parametrize("bits", BITS)
def test_the_search_is_worth_it(bits):
    """The squared error of normal weights: a tenth below that of plain rounding, which is why there is a search."""
    matrix = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    plain = np.array([[plainly_rounded(row[at : at + 32], bits) for at in range(0, 128, 32)] for row in matrix])
    found = dequantize(quantize(matrix, bits, 32))
    assert np.square(found - matrix).sum() < 0.9 * np.square(plain.reshape(matrix.shape) - matrix).sum()


@pytest.mark.parametrize("bits", BITS)
def test_importance_moves_the_error_to_columns_that_matter_less(bits):
    matrix = drawn(7, 32, 64, 1.0)
    importance = np.where(np.arange(64) % 2, 100.0, 1.0).astype(np.float32)
    errors = [
        np.square(dequantize(quantize(matrix, bits, 32, chosen)) - matrix).sum(axis=0) for chosen in (importance, None)
    ]
    assert errors[0][1::2].sum() < errors[1][1::2].sum()


def test_a_block_of_zeros_has_the_scale_zero():
    matrix = np.zeros((2, 64), np.float32)
    matrix[0, :32] = 1
    found = quantize(matrix, 4, 32)
    assert found.scales.tolist()[1] == [0, 0]
    assert np.array_equal(dequantize(found), matrix)


def test_slices_of_rows_do_not_show(monkeypatch):
    matrix = drawn(3, 40, 64, 1.0)
    whole = quantize(matrix, 4, 32)
    monkeypatch.setattr("siglance.kernels.quantize._SLICE", 7 * 64)
    sliced = quantize(matrix, 4, 32)
    assert np.array_equal(sliced.codes, whole.codes)
    assert np.array_equal(sliced.scales, whole.scales)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    matrix = np.ones((2, 32), np.float32)
    matrix[1, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize(matrix, 4, 32)


@pytest.mark.parametrize(
    ("bits", "block", "message"),
    [(3, 32, "3 bits are not supported"), (4, 48, "blocks of 48 columns"), (4, 64, "96 columns cannot be cut")],
)
def test_formats_that_there_are_not(bits, block, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.ones((2, 96), np.float32), bits, block)


def test_parts_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match=r"codes \[2, 16\] and scales \[2, 2\] do not fit"):
        Blocks(4, 32, np.zeros((2, 16), np.uint8), np.zeros((2, 2), np.float32))

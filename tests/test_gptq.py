"""Error feedback against a float64 reference, and what it promises for any matrix and any inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siglance.kernels.gptq import ErrorFeedback
from siglance.kernels.quantize import Blocks, dequantize, fit_scales, plain_scales, quantize, round_codes


def draw(seed: int, rows: int, columns: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [rows, columns] and inputs [tokens, columns] that are correlated, a few of them far larger."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, columns)) @ (rng.standard_normal((columns, columns)) / columns**0.5)
    sizes = np.exp(rng.standard_normal(columns))
    return rng.standard_normal((rows, columns)).astype(np.float32), (mixed * sizes).astype(np.float32)


def damped(inputs: np.ndarray, damping: float) -> np.ndarray:
    """The moments as `ErrorFeedback` understands them, float64."""
    moments = inputs.T.astype(np.float64) @ inputs
    mean = np.diag(moments).mean()
    return moments / mean + damping * np.eye(len(moments))


def output_errors(matrix: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """(w - r) H (w - r)^T of each row, float64."""
    difference = rounded.astype(np.float64) - matrix
    return np.einsum("ij,jk,ik->i", difference, moments, difference)


def plainly_rounded(matrix: np.ndarray, bits: int, block: int) -> np.ndarray:
    cut = matrix.reshape(len(matrix), -1, block)
    scales = plain_scales(cut, bits)
    codes = round_codes(cut, scales, bits).astype(np.float32) - 2 ** (bits - 1)
    return (codes * scales[..., None]).reshape(matrix.shape)


def reference(matrix: np.ndarray, moments: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Step 1 as the paper states it: column by column, and the inverse of what is left of H made again each time."""
    half, left = 2 ** (bits - 1), matrix.astype(np.float64)
    rounded = np.empty_like(left)
    for column in range(left.shape[1]):
        if column % block == 0:
            importance = np.diag(moments)[column : column + block].astype(np.float32)
            values = np.ascontiguousarray(left[:, column : column + block], np.float32)
            scale = fit_scales(values, bits, importance).astype(np.float64)
        divisor = np.where(scale == 0, 1, scale)
        codes = np.clip(np.rint(left[:, column] / divisor), -half, half - 1)
        rounded[:, column] = codes * scale
        inverse = np.linalg.inv(moments[column:, column:])
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, column:] -= np.outer(error, inverse[0])
    return rounded


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 64), (8, 128)])
def test_feedback_is_the_paper_s(bits, block):
    matrix, inputs = draw(1, 12, 128, 300)
    feedback = ErrorFeedback(inputs.T @ inputs, 0.1)
    found = dequantize(feedback.quantize(matrix, bits, block, polish=False))
    expected = reference(matrix, damped(inputs, 0.1), bits, block)
    # A value halfway between two codes may go either way in float32, and everything after it follows.
    same = np.isclose(found, expected, atol=1e-4).all(1)
    assert same.mean() > 0.7
    errors = [output_errors(matrix, each, damped(inputs, 0.1)).sum() for each in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.03)


@pytest.mark.parametrize("block", [16, 32, 128])
def test_each_step_helps(block):
    matrix, inputs = draw(2, 64, 256, 1000)
    moments, feedback = damped(inputs, 0.1), ErrorFeedback(inputs.T @ inputs, 0.1)
    candidates = [
        plainly_rounded(matrix, 4, block),
        dequantize(quantize(matrix, 4, block)),
        dequantize(feedback.quantize(matrix, 4, block, polish=False)),
        dequantize(feedback.quantize(matrix, 4, block)),
    ]
    errors = [float(output_errors(matrix, each, moments).sum()) for each in candidates]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.97 * errors[2] < 0.7 * errors[1]


def test_errors_are_those_of_products():
    matrix, inputs = draw(3, 20, 64, 500)
    rounded = plainly_rounded(matrix, 4, 32)
    feedback = ErrorFeedback(inputs.T @ inputs, 0.1)
    np.testing.assert_allclose(
        feedback.errors(matrix, rounded), output_errors(matrix, rounded, damped(inputs, 0.1)), rtol=1e-4
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    block=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from([4, 8]),
    tokens=st.integers(0, 200),
    damping=st.sampled_from([1e-3, 0.1, 1.0]),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    zeros=st.floats(0, 1),
)
def test_no_row_is_worse_than_plain_rounding(seed, rows, blocks, block, bits, tokens, damping, size, zeros):
    matrix, inputs = draw(seed, rows, blocks * block, tokens)
    rng = np.random.default_rng(seed)
    matrix *= np.float32(size) * (rng.random(matrix.shape) >= zeros)
    inputs *= rng.random(inputs.shape[1]) >= zeros  # columns that meet no input
    found = ErrorFeedback(inputs.T @ inputs, damping).quantize(matrix, bits, block)
    assert np.isfinite(found.scales).all()
    moments = damped(inputs, damping) if np.any(inputs) else damping * np.eye(matrix.shape[1])
    errors = output_errors(matrix, dequantize(found), moments)
    plain = output_errors(matrix, plainly_rounded(matrix, bits, block), moments)
    # float32 compares the two: it can miss differences at the end of its digits.
    scale = np.einsum("ij,jk,ik->i", matrix.astype(np.float64), moments, matrix.astype(np.float64))
    assert (errors <= plain * (1 + 1e-4) + 1e-9 * scale).all()


def test_a_matrix_that_blocks_can_hold_comes_back():
    matrix, inputs = draw(4, 16, 128, 400)
    exact = dequantize(quantize(matrix, 4, 32))
    found = ErrorFeedback(inputs.T @ inputs, 0.1).quantize(exact, 4, 32)
    np.testing.assert_allclose(dequantize(found), exact, atol=1e-5)


def test_rows_do_not_depend_on_each_other(monkeypatch):
    """Slices are for memory only."""
    matrix, inputs = draw(5, 30, 64, 200)
    feedback = ErrorFeedback(inputs.T @ inputs, 0.1)
    whole = feedback.quantize(matrix, 4, 32)
    monkeypatch.setattr("siglance.kernels.gptq._SLICE", 7 * 64)
    np.testing.assert_allclose(dequantize(feedback.quantize(matrix, 4, 32)), dequantize(whole), atol=1e-5)


def test_float32_factors_are_good_enough(monkeypatch):
    """Wide moments are factorised in float32."""
    matrix, inputs = draw(6, 32, 256, 1000)
    errors = []
    for limit in (1024, 0):
        monkeypatch.setattr("siglance.kernels.gptq._DOUBLE_COLUMNS", limit)
        found = ErrorFeedback(inputs.T @ inputs, 0.1).quantize(matrix, 4, 32)
        errors.append(output_errors(matrix, dequantize(found), damped(inputs, 0.1)).sum())
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        (np.ones((4, 3), np.float32), "square"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
        (np.diag(np.float32([1, 1, -9, 1])), "not positive"),
    ],
)
def test_moments_that_are_none(moments, message):
    with pytest.raises(ValueError, match=message):
        ErrorFeedback(moments, 0.1)


def test_matrices_that_do_not_fit():
    feedback = ErrorFeedback(np.eye(32, dtype=np.float32), 0.1)
    with pytest.raises(ValueError, match="64 columns does not fit"):
        feedback.quantize(np.ones((2, 64), np.float32), 4, 32)
    with pytest.raises(ValueError, match="blocks of 64"):
        feedback.quantize(np.ones((2, 32), np.float32), 4, 64)
    with pytest.raises(ValueError, match="not finite"):
        feedback.quantize(np.full((2, 32), np.inf, np.float32), 4, 32)
    assert isinstance(feedback.quantize(np.zeros((2, 32), np.float32), 4, 32), Blocks)

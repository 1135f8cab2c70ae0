"""Rotary positions of exported graphs, near and far: short prompts say next to nothing about them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

POSITIONS = (0, 1, 8, 1000, 30_000)
CONTEXT = 32_768
LINEAR = {"rope_type": "linear", "factor": 8.0}


def plain(head: int, theta: float, divisor: float = 1.0) -> np.ndarray:
    """Angle that a position of one turns each pair by, float64 [head / 2]."""
    return np.array([theta ** (-2 * pair / head) / divisor for pair in range(head // 2)])


def partial(head: int, theta: float, turning: int) -> np.ndarray:
    """The first `turning` pairs turn, and their exponents count the whole head."""
    return np.where(np.arange(head // 2) < turning, plain(head, theta), 0.0)


# Model, its arguments, and the angles of windowed and of global layers.
MODELS = {
    "gemma3, factor 8": ("gemma3", {"rope_scaling": LINEAR}, plain(16, 1e4), plain(16, 1e6, 8)),
    "gemma3, factor 8 in old keys": (
        *("gemma3", {"rope_scaling": LINEAR, "key_style": "hub"}),
        *(plain(16, 1e4), plain(16, 1e6, 8)),
    ),
    "gemma3 without scaling in old keys": ("gemma3", {"key_style": "hub"}, plain(16, 1e4), plain(16, 1e6)),
    "gemma3 with bases of its own": (
        *("gemma3", {"key_style": "hub", "rope_theta": 5e5, "rope_local_base_freq": 2e4}),
        *(plain(16, 2e4), plain(16, 5e5)),
    ),
    "gemma3 that sees": ("gemma3_vision", {"rope_scaling": LINEAR}, plain(16, 1e4), plain(16, 1e6, 8)),
    "gemma4": ("gemma4", {"vision": False}, plain(16, 1e4), partial(32, 1e6, 4)),
    "gemma4, large": ("gemma4_dense", {}, plain(16, 1e4), partial(32, 1e6, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_are_those_of_each_kind_of_layer(tiny_model, name):
    """Case 66: windowed layers turn with their own base and are never scaled; the factor, or the share of pairs that
    turn, is that of global layers, and of checkpoints that say so."""
    family, arguments, windowed, everywhere = MODELS[name]
    model = tiny_model(family, max_position_embeddings=CONTEXT, **arguments)
    values = ir.load(model.bundle.path("decoder")).graph.initializers
    for table, angles in (("local", windowed), ("global", everywhere)):
        for function in (np.cos, np.sin):
            rows = values[f"rope.{table}.{function.__name__}"].const_value.numpy()
            assert rows.shape == (CONTEXT, len(angles))
            for position in POSITIONS:
                np.testing.assert_allclose(rows[position], function(position * angles), atol=1e-6, err_msg=table)

"""Building blocks of graphs: plain functions (graph, values, weights) -> value, composed by the family files.

Everything a family needs is a name of this module: norms, MLPs and rotary tables are here, matrix products in
`matrices.py`, lookups and the head in `tables.py`, attention in `attention.py`.

Shapes in comments: S tokens of a chunk, D hidden size, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .attention import (
    Attention,
    DecoderInputs,
    SharedRows,
    State,
    attention,
    block_bias,
    decoder_inputs,
    key_value_state,
    shared_attention,
    shared_rows,
    state_pairs,
    take_rows,
)
from .builder import MICROSOFT, GraphBuilder
from .checkpoint import Weights
from .matrices import clipped_linear, constant_scale, fused_linear, linear, scalar, to_float
from .tables import Table, logits, lookup, stack_product, table

__all__ = [
    "Attention",
    "DecoderInputs",
    "SharedRows",
    "State",
    "Table",
    "add_rms_norm",
    "attention",
    "block_bias",
    "clipped_linear",
    "constant_scale",
    "decoder_inputs",
    "fused_linear",
    "gated_mlp",
    "inverse_frequencies",
    "key_value_state",
    "linear",
    "logits",
    "lookup",
    "ones",
    "query_key_value",
    "rms_norm",
    "rope_tables",
    "scalar",
    "shared_attention",
    "shared_rows",
    "split_heads",
    "stack_product",
    "state_pairs",
    "table",
    "take_rows",
    "to_float",
]

RMS_EPSILON = 1e-6


# --- elementary pieces


def ones(graph: GraphBuilder, size: int) -> ir.Value:
    """The weight of a norm without one."""
    return graph.weight(f"ones.{size}", (size,), lambda: [np.ones(size, np.float32)])


def rms_norm(graph: GraphBuilder, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last axis, in float32."""
    y = graph.op("SimplifiedLayerNormalization", x, weight, name=name, axis=-1, epsilon=RMS_EPSILON, stash_type=1)
    return graph.set_bound(y, _norm_bound(graph, weight))


def _norm_bound(graph: GraphBuilder, weight: ir.Value) -> float | None:
    """Longest possible output of a norm: a normed row has length sqrt(D), and no weight is larger than the largest."""
    assert weight.shape is not None
    assert weight.name is not None
    return float(np.sqrt(weight.shape.numpy()[0])) * graph.recorded(weight.name)


def add_rms_norm(
    graph: GraphBuilder, x: ir.Value, residual: ir.Value, weight: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    """(rms_norm(x + residual), x + residual) in one node."""
    normed, _, _, total = graph.ops(
        "SkipSimplifiedLayerNormalization",
        [x, residual, weight],
        [True, False, False, True],
        domain=MICROSOFT,
        name=name,
        epsilon=RMS_EPSILON,
    )
    return graph.set_bound(normed, _norm_bound(graph, weight)), total


def split_heads(graph: GraphBuilder, x: ir.Value, heads: int, head_size: int, weight: ir.Value, name: str) -> ir.Value:
    """RMS norm of each head on its own: [1, S, heads * d] -> the same shape."""
    if heads == 1:
        return rms_norm(graph, x, weight, name)
    split = graph.op("Reshape", x, graph.constant(np.array([0, 0, heads, head_size], np.int64), f"{name}.heads"))
    normed = rms_norm(graph, split, weight, name)
    return graph.op("Reshape", normed, graph.constant(np.array([0, 0, heads * head_size], np.int64), f"{name}.flat"))


def query_key_value(
    graph: GraphBuilder, x: ir.Value, weights: Weights, prefix: str, sizes: tuple[int, int, int], width: int
) -> list[ir.Value]:
    """The products of `prefix`.{q,k,v}_proj, of these sizes, as one product that is split."""
    parts = [(f"{prefix}.{part}_proj.weight", size) for part, size in zip("qkv", sizes, strict=True)]
    joined = fused_linear(graph, x, weights, parts, width, f"{prefix}.qkv_proj.weight")
    cuts = graph.constant(np.array(sizes, np.int64), "qkv_sizes")
    return graph.ops("Split", [joined, cuts], 3, name="split_qkv", axis=-1)


def gated_mlp(
    graph: GraphBuilder, x: ir.Value, weights: Weights, prefix: str, hidden: int, intermediate: int
) -> ir.Value:
    """down(gelu_tanh(gate(x)) * up(x)); every Gemma decoder."""
    both = fused_linear(
        graph,
        x,
        weights,
        [(f"{prefix}.gate_proj.weight", intermediate), (f"{prefix}.up_proj.weight", intermediate)],
        hidden,
        f"{prefix}.gate_up_proj.weight",
    )
    gate, up = graph.ops("Split", [both], 2, name="split_gate_up", axis=-1, num_outputs=2)
    product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
    return linear(graph, product, weights, f"{prefix}.down_proj.weight", (hidden, intermediate))


# --- rotary positions


def inverse_frequencies(
    head_size: int, theta: float, *, linear_factor: float = 1.0, partial_factor: float | None = None
) -> np.ndarray:
    """Angles per position of the head_size / 2 rotated pairs, float64.

    `partial_factor` is the "proportional" type of Gemma 4: that share of the pairs rotates, the exponent still counts
    the whole head, and the other pairs have frequency zero (cos 1, sin 0: they pass through unchanged).
    """
    frequencies = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size) / linear_factor
    if partial_factor is not None:
        frequencies[int(partial_factor * head_size // 2) :] = 0.0
    return frequencies


def rope_tables(
    graph: GraphBuilder, name: str, frequencies: np.ndarray, context: int, first: int = 0
) -> tuple[ir.Value, ir.Value]:
    """cos and sin tables [context, d / 2] for GroupQueryAttention and RotaryEmbedding, of positions from `first` on."""
    dtype = graph.plan.dtype

    def read(function: np.ufunc) -> Iterator[np.ndarray]:
        for start in range(first, first + context, 4096):
            positions = np.arange(start, min(start + 4096, first + context), dtype=np.float64)
            yield function(np.outer(positions, frequencies)).astype(dtype.numpy())

    shape = (context, len(frequencies))
    cos = graph.weight(f"rope.{name}.cos", shape, lambda: read(np.cos), dtype)
    sin = graph.weight(f"rope.{name}.sin", shape, lambda: read(np.sin), dtype)
    return cos, sin

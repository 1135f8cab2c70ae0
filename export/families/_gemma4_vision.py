"""The vision graph of Gemma 4: patches -> transformer with 2-D rotary positions -> 3x3 mean -> projection.

Formulas: transformers `modeling_gemma4.py` (Gemma4VisionPatchEmbedder, Gemma4VisionEncoderLayer, Gemma4VisionPooler,
Gemma4MultimodalEmbedder).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import blocks
from ..builder import FLOAT, INT64, MICROSOFT, UINT8, GraphBuilder
from ..checkpoint import Weights
from . import ExportOptions
from ._gemma4_config import Config, VisionConfig

__all__ = ["build_vision"]


def build_vision(graph: GraphBuilder, weights: Weights, config: Config, options: ExportOptions) -> None:
    """patches uint8 [n, 3 p p] and positions int64 [n, 2], block-major -> soft_tokens [n / k^2, D]."""
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    patches = graph.input("patches", UINT8, ["patches", 3 * vision.patch**2])
    positions = graph.input("positions", INT64, ["patches", 2])
    columns, rows = (
        graph.op("Gather", positions, graph.constant(np.array(axis, np.int64), name), axis=1, name=name)
        for axis, name in enumerate(("x", "y"))
    )
    x = _embed_patches(graph, weights, vision, patches, columns, rows)
    tables = _rope_2d(graph, vision, columns, rows)
    for layer in range(vision.layers):
        with graph.scope(f"layers.{layer}"):
            x = _layer(graph, weights, vision, f"vision.encoder.layers.{layer}", x, tables)
    graph.output(
        _pool_and_project(graph, weights, config, vision, x), "soft_tokens", FLOAT, ["soft_tokens", config.text.hidden]
    )


def _embed_patches(
    graph: GraphBuilder, weights: Weights, vision: VisionConfig, patches: ir.Value, columns: ir.Value, rows: ir.Value
) -> ir.Value:
    """W (2 (v / 255) - 1) + table[0][x] + table[1][y], as ((v - 127.5) W / 127.5): [1, n, hidden]."""
    shape = (vision.hidden, 3 * vision.patch**2)
    name = "vision.patch_embedder.input_proj.weight"
    matrix = graph.weight(
        f"{name}.transposed", shape[::-1], lambda: [(weights.read(name, shape) / np.float32(127.5)).T]
    )
    centred = graph.op(
        "Sub", graph.op("Cast", patches, to=int(FLOAT)), graph.constant(np.array(127.5, np.float32), "centre")
    )
    x = graph.op("MatMul", centred, matrix, name="input_proj")
    tables = (2, vision.table, vision.hidden)
    for axis, index in enumerate((columns, rows)):
        table = graph.weight(
            f"vision.position_table.{axis}",
            tables[1:],
            lambda axis=axis: [weights.read("vision.patch_embedder.position_embedding_table", tables)[axis]],
        )
        x = graph.op("Add", x, graph.op("Gather", table, index, name=f"position_{axis}"))
    return graph.op("Unsqueeze", x, graph.constant(np.array([0], np.int64), "batch_axis"))


def _rope_2d(
    graph: GraphBuilder, vision: VisionConfig, columns: ir.Value, rows: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """cos and sin [n, d / 2] of every patch, and the row numbers [1, n] that select them.

    Each half of a head is rotated on its own, the first by x, the second by y, pairs (i, i + d/4). `_interleave_halves`
    reorders the head so that one rotation with pairs (j, j + d/2) does both: angles of x first, then angles of y.
    """
    half = vision.head_size // 2
    frequencies = blocks.inverse_frequencies(half, vision.theta).astype(np.float32)[None, :]
    angles = []
    for index, name in ((columns, "x"), (rows, "y")):
        column = graph.op("Unsqueeze", index, graph.constant(np.array([1], np.int64), f"{name}_axis"))
        column = graph.op("Cast", column, to=int(FLOAT))
        angles.append(
            graph.op("Mul", column, graph.constant(frequencies, f"{name}_frequencies"), name=f"{name}_angles")
        )
    joined = graph.op("Concat", *angles, axis=1, name="angles")
    count = graph.op("Squeeze", graph.op("Shape", columns))
    zero, one = (graph.constant(np.array(value, np.int64), f"range_{value}") for value in (0, 1))
    numbers = graph.op("Unsqueeze", graph.op("Range", zero, count, one), zero)
    return graph.op("Cos", joined), graph.op("Sin", joined), numbers


def _interleave_halves(head_size: int) -> np.ndarray:
    """Order of head elements that turns two half-head rotations into one: [x first, y first, x second, y second]."""
    quarters = np.arange(head_size).reshape(4, head_size // 4)
    return quarters[[0, 2, 1, 3]].reshape(-1)


def _layer(
    graph: GraphBuilder,
    weights: Weights,
    vision: VisionConfig,
    prefix: str,
    x: ir.Value,
    tables: tuple[ir.Value, ir.Value, ir.Value],
) -> ir.Value:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def norm(value: ir.Value, name: str) -> ir.Value:
        return blocks.rms_norm(graph, value, _norm_weight(graph, weights, f"{prefix}.{name}", vision.hidden), name)

    attended = _attention(graph, weights, vision, f"{prefix}.self_attn", norm(x, "input_layernorm"), tables)
    x = graph.op("Add", x, norm(attended, "post_attention_layernorm"))
    normed = norm(x, "pre_feedforward_layernorm")
    gate, up = (
        _linear(graph, weights, vision, normed, f"{prefix}.mlp.{name}", (vision.intermediate, vision.hidden))
        for name in ("gate_proj", "up_proj")
    )
    product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
    fed = _linear(graph, weights, vision, product, f"{prefix}.mlp.down_proj", (vision.hidden, vision.intermediate))
    return graph.op("Add", x, norm(fed, "post_feedforward_layernorm"))


def _attention(
    graph: GraphBuilder,
    weights: Weights,
    vision: VisionConfig,
    prefix: str,
    x: ir.Value,
    tables: tuple[ir.Value, ir.Value, ir.Value],
) -> ir.Value:
    """Attention of every patch to every patch: scale 1 (the norms of query and key carry it), no mask."""
    heads, size = vision.heads, vision.head_size
    order = _interleave_halves(size)
    rows = (np.arange(heads)[:, None] * size + order).reshape(-1)
    rotated = []
    for part in ("q", "k"):
        projected = _linear(graph, weights, vision, x, f"{prefix}.{part}_proj", (heads * size, vision.hidden), rows)
        weight = graph.weight(
            f"{prefix}.{part}_norm.weight",
            (size,),
            lambda part=part: [weights.read(f"{prefix}.{part}_norm.weight", (size,))[order]],
        )
        normed = blocks.split_heads(graph, projected, heads, size, weight, f"{part}_norm")
        cos, sin, numbers = tables
        rotated.append(
            graph.op(
                "RotaryEmbedding", normed, numbers, cos, sin, domain=MICROSOFT, num_heads=heads, name=f"{part}_rope"
            )
        )
    value = _linear(graph, weights, vision, x, f"{prefix}.v_proj", (heads * size, vision.hidden))
    value = blocks.split_heads(graph, value, heads, size, blocks.ones(graph, size), "v_norm")
    mixed = graph.op(
        "MultiHeadAttention", *rotated, value, domain=MICROSOFT, num_heads=heads, scale=1.0, name="attention"
    )
    return _linear(graph, weights, vision, mixed, f"{prefix}.o_proj", (vision.hidden, heads * size))


def _linear(
    graph: GraphBuilder,
    weights: Weights,
    vision: VisionConfig,
    x: ir.Value,
    name: str,
    shape: tuple[int, int],
    order: np.ndarray | None = None,
) -> ir.Value:
    if vision.clipped:
        return blocks.clipped_linear(graph, x, weights, name, shape, order)
    return blocks.linear(graph, x, weights, f"{name}.linear.weight", shape, order)


def _norm_weight(graph: GraphBuilder, weights: Weights, name: str, size: int) -> ir.Value:
    return graph.weight(f"{name}.weight", (size,), lambda: [weights.read(f"{name}.weight", (size,))])


def _pool_and_project(
    graph: GraphBuilder, weights: Weights, config: Config, vision: VisionConfig, x: ir.Value
) -> ir.Value:
    """Mean over each block of k x k patches (contiguous, because patches come block-major), norm, projection."""
    blocks_shape = graph.constant(np.array([-1, vision.pool**2, vision.hidden], np.int64), "blocks_shape")
    grouped = graph.op("Reshape", x, blocks_shape)
    pooled = graph.op(
        "ReduceMean", grouped, graph.constant(np.array([1], np.int64), "block_axis"), keepdims=0, name="pool"
    )
    pooled = blocks.constant_scale(graph, pooled, float(vision.hidden) ** 0.5, "scale_pooled")
    if vision.standardize:
        bias, scale = (_vector(graph, weights, f"vision.{name}", vision.hidden) for name in ("std_bias", "std_scale"))
        pooled = graph.op("Mul", graph.op("Sub", pooled, bias), scale, name="standardize")
    normed = blocks.rms_norm(graph, pooled, blocks.ones(graph, vision.hidden), "embed_vision_norm")
    shape = (config.text.hidden, vision.hidden)
    return blocks.linear(graph, normed, weights, "embed_vision.embedding_projection.weight", shape)


def _vector(graph: GraphBuilder, weights: Weights, name: str, size: int) -> ir.Value:
    return graph.weight(name, (size,), lambda: [weights.read(name, (size,))])

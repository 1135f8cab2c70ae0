"""Building blocks of graphs: plain functions (graph, values, weights) -> value, composed by the family files.

Shapes in comments: S tokens of a chunk, D hidden size, H query heads, G key/value heads, d head size, n patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .builder import FLOAT, INT32, INT64, MICROSOFT, GraphBuilder
from .checkpoint import Weights

__all__ = [
    "Attention",
    "DecoderInputs",
    "SharedRows",
    "State",
    "add_rms_norm",
    "attention",
    "clipped_linear",
    "constant_scale",
    "decoder_inputs",
    "fused_linear",
    "gated_mlp",
    "inverse_frequencies",
    "key_value_state",
    "linear",
    "logits",
    "ones",
    "rms_norm",
    "rope_tables",
    "shared_attention",
    "shared_rows",
    "split_heads",
    "take_rows",
]

RMS_EPSILON = 1e-6


# --- elementary pieces


def linear(
    graph: GraphBuilder,
    x: ir.Value,
    weights: Weights,
    name: str,
    shape: tuple[int, int],
    order: np.ndarray | None = None,
) -> ir.Value:
    """y = x W^T for the checkpoint's `name` of `shape` [out, in]; `order` permutes the outputs."""
    return fused_linear(graph, x, weights, [(name, shape[0])], shape[1], name, order)


def fused_linear(
    graph: GraphBuilder,
    x: ir.Value,
    weights: Weights,
    parts: list[tuple[str, int]],
    width: int,
    key: str,
    order: np.ndarray | None = None,
) -> ir.Value:
    """The outputs of several linear layers over the same input, concatenated: one matrix product instead of several."""

    def read() -> Iterator[np.ndarray]:
        matrix = np.concatenate([weights.read(name, (rows, width)) for name, rows in parts])
        yield (matrix if order is None else matrix[order]).T

    rows = sum(rows for _, rows in parts)
    matrix = graph.weight(f"{key}.transposed", (width, rows), read)
    return graph.op("MatMul", x, matrix, name=key.rsplit(".", 2)[-2])


def clipped_linear(
    graph: GraphBuilder,
    x: ir.Value,
    weights: Weights,
    name: str,
    shape: tuple[int, int],
    order: np.ndarray | None = None,
) -> ir.Value:
    """y = clamp(clamp(x, input bounds) W^T, output bounds), with scalar bounds from the checkpoint.

    Formula: transformers Gemma4ClippableLinear. The bounds are part of the trained function.
    """

    def bounds(side: str) -> tuple[float, float]:
        return weights.scalar(f"{name}.{side}_min"), weights.scalar(f"{name}.{side}_max")

    x = _clip(graph, x, *bounds("input"))
    y = linear(graph, x, weights, f"{name}.linear.weight", shape, order)
    return _clip(graph, y, *bounds("output"))


def _clip(graph: GraphBuilder, x: ir.Value, low: float, high: float) -> ir.Value:
    limit = float(np.finfo(np.float32).max)
    # Bounds at or beyond the largest float (infinite ones, and bfloat16's largest number) cut nothing.
    if low <= -0.99 * limit and high >= 0.99 * limit:
        return x
    low, high = max(low, -limit), min(high, limit)
    return graph.op("Clip", x, _scalar(graph, low, "low"), _scalar(graph, high, "high"))


def _scalar(graph: GraphBuilder, value: float, name: str) -> ir.Value:
    return graph.constant(np.array(value, np.float32), name)


def constant_scale(graph: GraphBuilder, x: ir.Value, factor: float, name: str) -> ir.Value:
    return graph.op("Mul", x, _scalar(graph, factor, f"{name}.factor"), name=name)


def ones(graph: GraphBuilder, size: int) -> ir.Value:
    """The weight of a norm without one."""
    return graph.weight(f"ones.{size}", (size,), lambda: [np.ones(size, np.float32)])


def rms_norm(graph: GraphBuilder, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
    """x / sqrt(mean(x^2) + 1e-6) * weight over the last axis, in float32."""
    return graph.op("SimplifiedLayerNormalization", x, weight, name=name, axis=-1, epsilon=RMS_EPSILON, stash_type=1)


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
    return normed, total


def split_heads(graph: GraphBuilder, x: ir.Value, heads: int, head_size: int, weight: ir.Value, name: str) -> ir.Value:
    """RMS norm of each head on its own: [1, S, heads * d] -> the same shape."""
    split = graph.op("Reshape", x, graph.constant(np.array([0, 0, heads, head_size], np.int64), f"{name}.heads"))
    normed = rms_norm(graph, split, weight, name)
    return graph.op("Reshape", normed, graph.constant(np.array([0, 0, heads * head_size], np.int64), f"{name}.flat"))


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


def rope_tables(graph: GraphBuilder, name: str, frequencies: np.ndarray, context: int) -> tuple[ir.Value, ir.Value]:
    """cos and sin tables [context, d / 2] for GroupQueryAttention and RotaryEmbedding."""

    def read(function: np.ufunc) -> Iterator[np.ndarray]:
        for start in range(0, context, 4096):
            positions = np.arange(start, min(start + 4096, context), dtype=np.float64)
            yield function(np.outer(positions, frequencies)).astype(np.float32)

    shape = (context, len(frequencies))
    cos = graph.weight(f"rope.{name}.cos", shape, lambda: read(np.cos))
    sin = graph.weight(f"rope.{name}.sin", shape, lambda: read(np.sin))
    return cos, sin


# --- decoder inputs and attention


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """Inputs that every decoder declares and the engine makes."""

    embeddings: ir.Value  # float32 [1, S, D]
    lengths: ir.Value  # int32 [1]: number of tokens after this chunk, minus one
    total: ir.Value  # int32 []: number of tokens after this chunk
    rows: ir.Value  # int64 [k]: rows of the chunk whose logits are wanted


def decoder_inputs(graph: GraphBuilder, hidden: int) -> DecoderInputs:
    return DecoderInputs(
        graph.input("inputs_embeds", FLOAT, [1, "tokens", hidden]),
        graph.input("seqlens_k", INT32, [1]),
        graph.input("total_sequence_length", INT32, []),
        graph.input("logit_rows", INT64, ["logit_rows"]),
    )


@dataclass(frozen=True, slots=True)
class State:
    """Key and value buffers of one layer. `window` is None for a global layer."""

    layer: int
    past_key: ir.Value  # [1, G, capacity, d]
    past_value: ir.Value
    window: int | None
    capacity: int | str


def key_value_state(
    graph: GraphBuilder, layer: int, heads: int, head_size: int, window: int | None, capacity: int | str
) -> State:
    """Declare the state inputs of a layer: a fixed capacity for windows, the symbol "capacity" for global layers."""
    shape = [1, heads, capacity, head_size]
    key = graph.input(f"past.{layer}.key", FLOAT, shape)
    value = graph.input(f"past.{layer}.value", FLOAT, shape)
    return State(layer, key, value, window, capacity)


@dataclass(frozen=True, slots=True)
class Attention:
    """Shape and scale of one layer's attention, with its rotary tables."""

    heads: int
    key_value_heads: int
    head_size: int
    scale: float
    cos: ir.Value
    sin: ir.Value


def attention(
    graph: GraphBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    state: State,
    inputs: DecoderInputs,
    facts: Attention,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Causal attention over the state and the chunk; returns (output [1, S, H*d], present key, present value).

    Keys are rotated by the operator before they enter the state.
    """
    window = {} if state.window is None else {"local_window_size": state.window, "sliding_window_cache": 1}
    output, present_key, present_value = graph.ops(
        "GroupQueryAttention",
        [
            *(query, key, value, state.past_key, state.past_value),
            *(inputs.lengths, inputs.total, facts.cos, facts.sin),
        ],
        3,
        domain=MICROSOFT,
        name="attention",
        num_heads=facts.heads,
        kv_num_heads=facts.key_value_heads,
        scale=facts.scale,
        do_rotary=1,
        **window,
    )
    shape = [1, facts.key_value_heads, state.capacity, facts.head_size]
    graph.output(present_key, f"present.{state.layer}.key", FLOAT, shape)
    graph.output(present_value, f"present.{state.layer}.value", FLOAT, shape)
    return output, present_key, present_value


@dataclass(frozen=True, slots=True)
class SharedRows:
    """What attention over another layer's state needs to know about the rows that are still computed."""

    positions: ir.Value  # int64 [1, k], absolute
    total: ir.Value  # int32 []
    lengths: ir.Value  # int32 [1]
    window_total: ir.Value | None = None
    window_lengths: ir.Value | None = None


def shared_rows(graph: GraphBuilder, inputs: DecoderInputs, window: int | None) -> SharedRows:
    """Positions and visible lengths of the logit rows for layers that own no keys and values."""
    tokens = graph.op("Shape", inputs.embeddings, start=1, end=2)
    total = graph.op("Cast", inputs.total, to=int(INT64))
    positions = graph.op("Add", inputs.rows, graph.op("Sub", total, tokens), name="positions")
    positions = graph.op("Unsqueeze", positions, graph.constant(np.array([0], np.int64), "axis"))
    if window is None:
        return SharedRows(positions, inputs.total, inputs.lengths)
    # A window buffer of capacity W holds exactly the min(T, W) latest positions, in order from row 0.
    window_total = graph.op(
        "Min", inputs.total, graph.constant(np.array(window, np.int32), "window"), name="window_total"
    )
    last = graph.constant(np.array(window - 1, np.int32), "window_last")
    window_lengths = graph.op("Min", inputs.lengths, last, name="window_lengths")
    return SharedRows(positions, inputs.total, inputs.lengths, window_total, window_lengths)


def shared_attention(
    graph: GraphBuilder,
    query: ir.Value,
    present: tuple[ir.Value, ir.Value],
    rows: SharedRows,
    facts: Attention,
    windowed: bool,
) -> ir.Value:
    """Attention of a layer that reads another layer's keys and values (Gemma 4 E2B / E4B).

    Key and value are passed with length zero and the source's `present` as a filled past. The query is rotated before
    the operator, because in a window buffer row numbers are not positions. There are no present outputs: declaring
    them makes the operator copy the buffers.
    """
    query = graph.op(
        "RotaryEmbedding", query, rows.positions, facts.cos, facts.sin, domain=MICROSOFT, num_heads=facts.heads
    )
    width = facts.key_value_heads * facts.head_size
    empty = graph.weight(f"empty.{width}", (1, 0, width), lambda: [np.zeros((1, 0, width), np.float32)])
    lengths, total = (rows.window_lengths, rows.window_total) if windowed else (rows.lengths, rows.total)
    return graph.op(
        "GroupQueryAttention",
        *(query, empty, empty, *present, lengths, total),
        domain=MICROSOFT,
        name="attention",
        num_heads=facts.heads,
        kv_num_heads=facts.key_value_heads,
        scale=facts.scale,
        do_rotary=0,
    )


def take_rows(graph: GraphBuilder, x: ir.Value, inputs: DecoderInputs, name: str) -> ir.Value:
    """[1, S, D] -> [1, k, D]: from here on only the rows whose logits are wanted are computed."""
    return graph.op("Gather", x, inputs.rows, axis=1, name=name)


def logits(
    graph: GraphBuilder, x: ir.Value, table: ir.Value, vocabulary: int, hidden: int, soft_cap: float | None
) -> None:
    """Logits of rows [1, k, D] against the (usually tied) table [V, D], and the graph's output `logits` [k, V]."""
    flat = graph.op("Reshape", x, graph.constant(np.array([-1, hidden], np.int64), "rows_shape"))
    # transB reads the embedding table as it is stored: a tied head costs no second copy.
    output = graph.op("Gemm", flat, table, transB=1, name="lm_head")
    if soft_cap is not None:
        capped = graph.op("Tanh", constant_scale(graph, output, 1.0 / soft_cap, "soft_cap_in"))
        output = constant_scale(graph, capped, soft_cap, "soft_cap_out")
    graph.output(output, "logits", FLOAT, ["logit_rows", vocabulary])

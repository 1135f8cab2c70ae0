"""Attention of decoders: inputs that the engine makes, state, masks, and the operator in its three uses.

Causal attention over the state and the chunk (with or without a window), attention with blocks of tokens that see each
other, and attention over another layer's state.

Shapes in comments: S tokens of a chunk, T tokens so far, D hidden size, H query heads, G key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..engine.manifest import StatePair
from .builder import FLOAT, INT8, INT32, INT64, MICROSOFT, GraphBuilder
from .plan import StateScales

__all__ = [
    "Attention",
    "DecoderInputs",
    "SharedRows",
    "State",
    "attention",
    "block_bias",
    "decoder_inputs",
    "key_value_state",
    "shared_attention",
    "shared_rows",
    "state_pairs",
    "take_rows",
]

_PARTS = ("key", "value")


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """Inputs that every decoder declares and the engine makes."""

    embeddings: ir.Value  # float32 [1, S, D]
    lengths: ir.Value  # int32 [1]: number of tokens after this chunk, minus one
    total: ir.Value  # int32 [], on the host: number of tokens after this chunk, or more (at most the capacity)
    rows: ir.Value  # int64 [k]: rows of the chunk whose logits are wanted
    block_ends: ir.Value | None  # int64 [S]: where the block of a row ends (absolute, exclusive), 0 outside of blocks
    single: ir.Value | None  # bool [1]: S is 1; for states of 8 bits


def decoder_inputs(graph: GraphBuilder, hidden: int, *, blocks: bool = False) -> DecoderInputs:
    """Declare the inputs; `blocks` for decoders in which tokens of a block (a picture, a prefix) see each other."""
    embeddings = graph.input("inputs_embeds", FLOAT, [1, "tokens", hidden])
    single = None
    if graph.plan.states:
        one = graph.constant(np.array([1], np.int64), "one_row")
        single = graph.op("Equal", graph.op("Shape", embeddings, start=1, end=2), one, name="single")
    return DecoderInputs(
        embeddings,
        graph.input("seqlens_k", INT32, [1]),
        graph.input("total_sequence_length", INT32, []),
        graph.input("logit_rows", INT64, ["logit_rows"]),
        graph.input("block_ends", INT64, ["tokens"]) if blocks else None,
        single,
    )


def _row_positions(graph: GraphBuilder, inputs: DecoderInputs) -> ir.Value:
    """Positions of the rows of the chunk in the sequence, int64 [S].

    They come from the lengths alone. On a GPU those are device memory that may change under a captured graph, while
    what lies on the host (`total`, shapes) is frozen at capture; and no node here mixes the two, which would cost a
    copy and forbid capture.
    """
    tokens = graph.op("Squeeze", graph.op("Shape", inputs.embeddings, start=1, end=2))
    one, back = (graph.constant(np.array(value, np.int64), name) for value, name in ((1, "one"), (-1, "back")))
    behind = graph.op("Range", graph.op("Sub", tokens, one), back, back, name="rows_behind")  # S - 1 .. 0
    return graph.op("Sub", graph.op("Cast", inputs.lengths, to=int(INT64)), behind, name="row_positions")


def block_bias(
    graph: GraphBuilder, inputs: DecoderInputs, *, window: int | None = None, inside_window: bool = True
) -> ir.Value:
    """The mask of one kind of layer as a bias [1, 1, S, T]: 0 where row i may see column j, else far below any score.

    With W the window and end_i the end of the block of row i (transformers masking_utils, `create_masks_for_*`):
    `inside_window` (Gemma 3, Gemma 4 with bidirectional pictures): (j <= i or j < end_i) and j > i - W;
    otherwise (PaliGemma): (j <= i and j > i - W) or j < end_i.
    """
    assert inputs.block_ends is not None
    with graph.scope("mask.global" if window is None else "mask.window"):
        axis = graph.constant(np.array([1], np.int64), "axis")
        # `total` is read where it lies, on the host. It may be an upper bound: `_row_positions` do not come from it.
        start, step = (graph.constant(np.array(value, np.int32), name) for value, name in ((0, "start"), (1, "step")))
        columns = graph.op("Cast", graph.op("Range", start, inputs.total, step), to=int(INT64), name="columns")
        rows = graph.op("Unsqueeze", _row_positions(graph, inputs), axis, name="rows")
        seen = graph.op("LessOrEqual", columns, rows, name="causal")
        in_block = graph.op("Less", columns, graph.op("Unsqueeze", inputs.block_ends, axis), name="in_block")
        if window is None:
            seen = graph.op("Or", seen, in_block)
        else:
            first = graph.op("Sub", rows, graph.constant(np.array(window, np.int64), "window"))
            near = graph.op("Greater", columns, first, name="in_window")
            parts = (seen, in_block, near) if inside_window else (seen, near, in_block)
            operators = ("Or", "And") if inside_window else ("And", "Or")
            seen = graph.op(operators[1], graph.op(operators[0], parts[0], parts[1]), parts[2])
        dtype = graph.plan.dtype.numpy()
        # Half of the lowest number: adding a score must not make it infinite.
        nothing, hidden = (
            graph.constant(np.array(value, dtype), name)
            for value, name in ((0, "visible"), (np.finfo(dtype).min / 2, "hidden"))
        )
        bias = graph.op("Where", seen, nothing, hidden)
        bias = graph.op("Unsqueeze", bias, graph.constant(np.array([0, 1], np.int64), "batch_and_head"), name="bias")
    return graph.mark_half(bias) if graph.plan.half else bias


@dataclass(frozen=True, slots=True)
class State:
    """Key and value buffers of one layer. `window` is None for a global layer."""

    layer: int
    past_key: ir.Value  # [1, G, capacity, d]
    past_value: ir.Value
    window: int | None
    capacity: int | str
    value_step: float | None = None  # of buffers of 8 bits: value = step * number, keys are numbers themselves


def key_value_state(
    graph: GraphBuilder,
    layer: int,
    heads: int,
    head_size: int,
    window: int | None,
    capacity: int | str,
    scales: StateScales | None = None,
) -> State:
    """Declare the state inputs of a layer: a fixed capacity for windows, the symbol "capacity" for global layers.

    With `scales` they have 8 bits, and the caller divides keys by theirs, and multiplies queries.
    """
    shape, dtype = [1, heads, capacity, head_size], graph.plan.dtype if scales is None else INT8
    key, value = (graph.input(_name("past", layer, part), dtype, shape) for part in _PARTS)
    return State(layer, key, value, window, capacity, None if scales is None else scales.value)


def state_pairs(windowed: Iterable[bool]) -> tuple[StatePair, ...]:
    """What the manifest says of the states declared here, for each layer that owns one: whether it is a window."""
    return tuple(
        StatePair(
            input=_name("past", layer, part),
            output=_name("present", layer, part),
            kind="window" if is_window else "global",
        )
        for layer, is_window in enumerate(windowed)
        for part in _PARTS
    )


def _name(side: str, layer: int, part: str) -> str:
    return f"{side}.{layer}.{part}"


@dataclass(frozen=True, slots=True)
class Attention:
    """Shape and scale of one layer's attention, with its rotary tables."""

    heads: int
    key_value_heads: int
    head_size: int
    scale: float
    cos: ir.Value
    sin: ir.Value
    soft_cap: float | None = None  # scores become cap * tanh(score / cap), before the mask


def attention(
    graph: GraphBuilder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    state: State,
    inputs: DecoderInputs,
    facts: Attention,
    *,
    bias: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Attention over the state and the chunk; returns (output [1, S, H*d], present key, present value).

    Causal, or with the mask `bias` (see `block_bias`). Keys are rotated by the operator before they enter the state.
    The output has the dtype of the state. On the CPU windows decode fastest with a scale of 1: see `_no_sink`.
    """
    if bias is not None and state.window is not None:
        raise ValueError("a window buffer cannot have a mask: the operator would evict what a block still needs")
    query, key, value = (_in_state_dtype(graph, part) for part in (query, key, value))

    def attend(past: Sequence[ir.Value], behind: Sequence[ir.Value | None], **attributes: Any) -> list[ir.Value]:
        """The operator over a past; `behind` are its inputs from the position ids on."""
        if state.window is not None:
            attributes |= {"local_window_size": state.window, "sliding_window_cache": 1}
        if bias is not None:
            attributes |= {"causal": 0}
        if facts.soft_cap is not None:
            attributes |= {"softcap": facts.soft_cap}
        return graph.ops(
            "GroupQueryAttention",
            [query, key, value, *past, inputs.lengths, inputs.total, facts.cos, facts.sin, *behind],
            3,
            domain=MICROSOFT,
            name="attention",
            num_heads=facts.heads,
            kv_num_heads=facts.key_value_heads,
            scale=facts.scale,
            do_rotary=1,
            **attributes,
        )

    past = (state.past_key, state.past_value)
    behind = (None, bias) if bias is not None else _no_sink(graph, facts) if state.window is not None else ()
    in_bytes = state.value_step is not None
    output, present_key, present_value = (
        _over_bytes(graph, state, inputs, attend, behind) if in_bytes else attend(past, behind)
    )
    shape = [1, facts.key_value_heads, state.capacity, facts.head_size]
    for part, present in zip(_PARTS, (present_key, present_value), strict=True):
        dtype = INT8 if in_bytes else graph.plan.dtype
        graph.output(present, _name("present", state.layer, part), dtype, shape)
    return _typed(graph, output), present_key, present_value


def _over_bytes(
    graph: GraphBuilder,
    state: State,
    inputs: DecoderInputs,
    attend: Callable[..., list[ir.Value]],
    behind: Sequence[ir.Value | None],
) -> list[ir.Value]:
    """Attention over a state of 8 bits: (output, present key, present value).

    A single row, which is bound by the memory that it reads, goes to the operator's kernel for bytes. With more rows
    that one takes two to three times as long as the kernel for floats, so for them the state is widened and narrowed
    again. What it held stays the same by that, bit for bit; rows of a chunk see each other before they are rounded.
    """
    assert inputs.single is not None
    assert state.value_step is not None
    past = (state.past_key, state.past_value)
    steps = [
        graph.constant(np.array(step, np.float32), f"{part}_step")
        for part, step in zip(_PARTS, (1.0, state.value_step), strict=True)
    ]

    def one_row() -> list[ir.Value]:
        kinds = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        return attend(past, (None, None, None, *steps), **kinds)

    def more_rows() -> list[ir.Value]:
        wide = [graph.op("DequantizeLinear", part, step) for part, step in zip(past, steps, strict=True)]
        output, *present = attend(wide, behind)
        # The type of what is narrowed to comes from a zero point, which is 0.
        zero = graph.weight("state_zero", (), lambda: [np.zeros((1,), np.int8)], INT8)
        return [
            output,
            *(graph.op("QuantizeLinear", part, step, zero) for part, step in zip(present, steps, strict=True)),
        ]

    return graph.branch(inputs.single, one_row, more_rows, "by_rows")


def _no_sink(graph: GraphBuilder, facts: Attention) -> tuple[ir.Value | None, ...]:
    """Inputs of attention from the position ids on, with sinks that take nothing: exp(-inf) = 0 for every head.

    On the CPU a sink makes the operator leave its tiled kernel, which computes a single row with 128-bit instructions,
    for products of matrices, which have wider ones for a row if the scale is 1: half the time of a decode step over 512
    keys. They also hold a score for every row and column, which only windows keep few.
    """
    if graph.plan.half or facts.scale != 1.0 or facts.soft_cap is not None:
        return ()
    heads = facts.heads
    nothing = graph.weight(f"no_sink.{heads}", (heads,), lambda: [np.full(heads, -np.inf, np.float32)])
    return None, None, nothing


def _in_state_dtype(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    return graph.half(value) if graph.plan.half else value


def _typed(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    return graph.mark_half(value) if graph.plan.half else value


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
    positions = graph.op("Gather", _row_positions(graph, inputs), inputs.rows, name="positions")
    positions = graph.op("Unsqueeze", positions, graph.constant(np.array([0], np.int64), "axis"))
    if window is None:
        return SharedRows(positions, inputs.total, inputs.lengths)
    # A window buffer of capacity W holds exactly the min(T, W) latest positions, in order from row 0.
    window_total = graph.constant(np.array(window, np.int32), "window_total")  # the lengths say how many rows are used
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
        *("RotaryEmbedding", _in_state_dtype(graph, query), rows.positions, facts.cos, facts.sin),
        domain=MICROSOFT,
        num_heads=facts.heads,
    )
    width, dtype = facts.key_value_heads * facts.head_size, graph.plan.dtype
    empty = graph.weight(f"empty.{width}", (1, 0, width), lambda: [np.zeros((1, 0, width), dtype.numpy())], dtype)
    lengths, total = (rows.window_lengths, rows.window_total) if windowed else (rows.lengths, rows.total)
    output = graph.op(
        "GroupQueryAttention",
        *(query, empty, empty, *present, lengths, total),
        *((None, None, *sink) if windowed and (sink := _no_sink(graph, facts)) else ()),
        domain=MICROSOFT,
        name="attention",
        num_heads=facts.heads,
        kv_num_heads=facts.key_value_heads,
        scale=facts.scale,
        do_rotary=0,
    )
    return _typed(graph, output)


def take_rows(graph: GraphBuilder, x: ir.Value, inputs: DecoderInputs, name: str) -> ir.Value:
    """[1, S, D] -> [1, k, D]: from here on only the rows whose logits are wanted are computed."""
    rows = graph.op("Gather", x, inputs.rows, axis=1, name=name)
    return graph.mark_half(rows) if graph.is_half(x) else graph.set_bound(rows, graph.bound(x))

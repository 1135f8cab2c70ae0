"""Lookup tables, stacks of matrices and the head, in the storage formats that the plan gives them.

Embedding tables in blocks are read by GatherBlockQuantized, from the same bytes that the head multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..kernels.quantize import Blocks, quantize
from .builder import FLOAT, FLOAT16, INT64, MICROSOFT, GraphBuilder
from .checkpoint import SLICE_BYTES, Weights
from .matrices import as_half, block_product, block_weights, constant_scale, half_product, largest_row, to_float
from .plan import Span, Storage

__all__ = ["Table", "logits", "lookup", "stack_product", "table"]


@dataclass(frozen=True, slots=True)
class TablePart:
    """Rows `start` to `stop` of a table in the weights file: floats, or codes and scales."""

    key: str
    start: int
    stop: int
    storage: Storage
    values: ir.Value
    scales: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table [rows, columns], in parts of one format each.

    A stack of matrices of one shape is a table of all their rows, one matrix after the other.
    """

    shape: tuple[int, int]
    parts: tuple[TablePart, ...]
    stack: int = 1


def table(
    graph: GraphBuilder, weights: Weights, key: str, name: str, shape: tuple[int, int], stack: int | None = None
) -> Table:
    """The checkpoint's `name`, stored once under `key` for all graphs that use it.

    With `stack` the checkpoint has that many matrices of `shape`, as one tensor [stack, rows, columns].
    """
    stored = shape if stack is None else (stack, *shape)
    stack = stack or 1
    shape = (stack * shape[0], shape[1])

    def slices() -> Iterator[np.ndarray]:
        return (part.reshape(-1, shape[1]) for part in weights.read_rows(name, stored))

    spans = graph.plan.spans(graph.name, key, shape)
    kept = weights.blocks(name, shape) if graph.plan.keep else None
    if kept is not None:
        spans = (Span(0, shape[0], Storage(kept.bits, kept.block)),)
    if any(span.blocks is not None for span in spans):
        weights.shape(name)  # counts as used
    parts = tuple(_table_part(graph, weights, key, name, shape, span, kept, slices) for span in spans)
    return Table(shape, parts, stack)


def _table_part(
    graph: GraphBuilder,
    weights: Weights,
    key: str,
    name: str,
    shape: tuple[int, int],
    span: Span,
    kept: Blocks | None,
    slices: Callable[[], Iterator[np.ndarray]],
) -> TablePart:
    storage, rows = span.storage, (span.stop - span.start, shape[1])
    if rows[0] != shape[0]:
        key = f"{key}.{span.start}-{span.stop}"

    def packed() -> Iterator[Blocks]:
        if span.blocks is not None:
            yield span.blocks.load()
        elif kept is not None:
            yield kept
        elif not weights.random:
            yield from (quantize(part, storage.bits, storage.block) for part in slices())
        else:
            step = max(1, SLICE_BYTES // (4 * shape[1]))
            for start in range(0, shape[0], step):
                blocks = weights.random_blocks(name, (min(step, shape[0] - start), shape[1]), storage)
                assert blocks is not None
                yield blocks

    def halves() -> Iterator[np.ndarray]:
        largest = 0.0
        for part in slices():
            largest = max(largest, largest_row(part))
            yield as_half(key, part)
        graph.record(key, largest)

    if storage.block:
        return TablePart(key, span.start, span.stop, storage, *block_weights(graph, key, rows, storage, packed))
    values = graph.weight(key, shape, halves, FLOAT16) if storage.bits == 16 else graph.weight(key, shape, slices)
    return TablePart(key, span.start, span.stop, storage, values)


def lookup(graph: GraphBuilder, table: Table, ids: ir.Value, name: str) -> ir.Value:
    """Rows `ids` of the table, float32 [..., columns]."""
    if len(table.parts) == 1:
        return to_float(graph, _rows(graph, table.parts[0], ids, name))
    rows: ir.Value | None = None
    for part in reversed(table.parts):
        # Ids of other parts are looked up as the nearest row of this one, and not taken.
        first, last = (
            graph.constant(np.array(value, np.int64), f"{name}.{end}")
            for value, end in ((part.start, "first"), (part.stop - 1, "last"))
        )
        inside = graph.op("Sub", graph.op("Clip", ids, first, last), first)
        found = to_float(graph, _rows(graph, part, inside, name))
        if rows is not None:
            here = graph.op("LessOrEqual", ids, last)
            found = graph.op(
                "Where", graph.op("Unsqueeze", here, graph.constant(np.array([-1], np.int64), "axis")), found, rows
            )
        rows = found
    assert rows is not None
    return rows


def _rows(graph: GraphBuilder, part: TablePart, ids: ir.Value, name: str) -> ir.Value:
    """Rows `ids`, counted from the first of the part, float16 if it stores that or the graph multiplies that."""
    if part.scales is None:
        rows = graph.op("Gather", part.values, ids, name=name)
        return graph.mark_half(rows) if part.storage.bits == 16 else rows
    rows = graph.op(
        "GatherBlockQuantized",
        *(graph.alias(part.values, f"{part.key}.rows", (part.stop - part.start, -1)), ids, part.scales),
        domain=MICROSOFT,
        name=name,
        bits=part.storage.bits,
        block_size=part.storage.block,
        gather_axis=0,
        quantize_axis=1,
    )
    return graph.mark_half(rows) if graph.plan.half else rows


def stack_product(graph: GraphBuilder, x: ir.Value, table: Table, index: ir.Value, name: str) -> ir.Value:
    """x [n, in] times the transpose of matrix `index` (int64 []) of a stack: float32 [n, out].

    The matrix is turned into floats before the product: MatMulNBits takes ten times as long for a matrix that it could
    not prepare when the session was made.
    """
    count = table.shape[0] // table.stack
    first = graph.op("Mul", index, graph.constant(np.array(count, np.int64), f"{name}.count"))
    every = graph.weight(f"range.{count}", (count,), lambda: [np.arange(count, dtype=np.int64)], INT64)
    [part] = table.parts
    matrix = _rows(graph, part, graph.op("Add", first, every), f"{name}.rows")

    def multiply(value: ir.Value) -> ir.Value:
        return graph.op("Gemm", value, matrix, transB=1, name=name)

    if graph.is_half(matrix):
        return half_product(graph, x, part.key, multiply)
    return multiply(to_float(graph, x))


def logits(graph: GraphBuilder, x: ir.Value, table: Table, soft_cap: float | None) -> None:
    """Logits of rows [1, k, D] against the (usually tied) table [V, D], and the graph's output `logits` [k, V]."""
    flat = graph.op("Reshape", x, graph.constant(np.array([-1, table.shape[1]], np.int64), "rows_shape"))
    graph.set_bound(flat, graph.bound(x))
    parts = [_head_product(graph, flat, part, table.shape[1]) for part in table.parts]
    output = parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=-1, name="join_logits")
    if soft_cap is not None:
        capped = graph.op("Tanh", constant_scale(graph, output, 1.0 / soft_cap, "soft_cap_in"))
        output = constant_scale(graph, capped, soft_cap, "soft_cap_out")
    graph.output(output, "logits", FLOAT, ["logit_rows", table.shape[0]])


def _head_product(graph: GraphBuilder, x: ir.Value, part: TablePart, columns: int) -> ir.Value:
    """x [k, D] times the transpose of a part of the head's table."""
    if part.scales is not None:
        shape = (part.stop - part.start, columns)
        return block_product(graph, x, part.key, shape, part.storage, part.values, part.scales, "lm_head")

    # transB reads the embedding table as it is stored: a tied head costs no second copy.
    def multiply(value: ir.Value) -> ir.Value:
        return graph.op("Gemm", value, part.values, transB=1, name="lm_head")

    return half_product(graph, x, part.key, multiply) if part.storage.bits == 16 else multiply(x)

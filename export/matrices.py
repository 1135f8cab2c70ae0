"""Matrix products of graphs, in the storage format that the plan gives each matrix.

Formats: float32 (transposed, for MatMul), float16, or blocks of 8 or 4 bits with a scale each (MatMulNBits; embedding
tables are read by GatherBlockQuantized from the same bytes).

Float16 products cannot overflow: |W x| <= |W| |x| row by row, so the input is divided by a factor that keeps this bound
within range, and the product is multiplied by it in float32. Inputs whose size is bounded when the graph is built (the
outputs of norms) need no factor, or a constant one; others get theirs from their own length at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ..engine.errors import ExportError
from ..kernels.quantize import Blocks, quantize
from .builder import FLOAT, FLOAT16, MICROSOFT, UINT8, GraphBuilder
from .checkpoint import Weights
from .plan import Storage

__all__ = [
    "as_half",
    "block_product",
    "block_weights",
    "clipped_linear",
    "constant_scale",
    "fused_linear",
    "half_product",
    "largest_row",
    "linear",
    "scalar",
    "to_float",
]

HALF_LIMIT = 30_000.0  # half of float16's largest number: room for the rounding of a long sum


def scalar(graph: GraphBuilder, value: float, name: str) -> ir.Value:
    return graph.constant(np.array(value, np.float32), name)


def constant_scale(graph: GraphBuilder, x: ir.Value, factor: float, name: str) -> ir.Value:
    return graph.op("Mul", x, scalar(graph, factor, f"{name}.factor"), name=name)


def to_float(graph: GraphBuilder, x: ir.Value) -> ir.Value:
    """`x` as float32."""
    return graph.op("Cast", x, to=int(FLOAT)) if graph.is_half(x) else x


# --- linear layers


def linear(
    graph: GraphBuilder,
    x: ir.Value,
    weights: Weights,
    name: str,
    shape: tuple[int, int],
    order: np.ndarray | None = None,
    *,
    bias: bool = False,
    stored_transposed: bool = False,
) -> ir.Value:
    """y = x W^T for the checkpoint's `name` of `shape` [out, in]; `order` selects or permutes the outputs.

    `bias` adds the checkpoint's vector of the same layer (".bias" instead of ".weight"). `stored_transposed`: the
    checkpoint has the matrix as [in, out].
    """
    y = fused_linear(graph, x, weights, [(name, shape[0])], shape[1], name, order, stored_transposed=stored_transposed)
    if not bias:
        return y
    vector, size = name.removesuffix(".weight") + ".bias", (shape[0],)

    def read() -> list[np.ndarray]:
        values = weights.read(vector, size)
        return [values if order is None else values[order]]

    return graph.op("Add", y, graph.weight(vector, size if order is None else (len(order),), read))


def fused_linear(
    graph: GraphBuilder,
    x: ir.Value,
    weights: Weights,
    parts: list[tuple[str, int]],
    width: int,
    key: str,
    order: np.ndarray | None = None,
    *,
    stored_transposed: bool = False,
) -> ir.Value:
    """The outputs of several linear layers over the same input, concatenated: one matrix product instead of several."""
    kept = [weights.blocks(name, (count, width)) for name, count in parts] if graph.plan.keep else []
    formats = {(blocks.bits, blocks.block) for blocks in kept if blocks is not None}
    if len(formats) > 1 or (formats and None in kept):
        # The checkpoint stores the parts in different formats: they stay products of their own.
        ys = [fused_linear(graph, x, weights, [part], width, part[0]) for part in parts]
        joined = graph.op("Concat", *ys, axis=-1, name="join")
        return joined if order is None else graph.op("Gather", joined, graph.constant(order, "order"), axis=-1)

    def rows() -> np.ndarray:
        if stored_transposed:
            matrix = np.concatenate([weights.read(name, (width, count)).T for name, count in parts])
        else:
            matrix = np.concatenate([weights.read(name, (count, width)) for name, count in parts])
        return matrix if order is None else matrix[order]

    def ready(storage: Storage) -> Blocks | None:
        if span.blocks is not None:
            for name, _ in parts:
                weights.shape(name)  # counts as used
            return span.blocks.load()
        packed = kept or [weights.random_blocks(name, (count, width), storage) for name, count in parts]
        blocks = [part for part in packed if part is not None]
        return _join(blocks, order) if blocks else None

    count = sum(count for _, count in parts) if order is None else len(order)
    [span] = graph.plan.spans(graph.name, key, (count, width))
    storage = Storage(*formats.pop()) if formats else span.storage
    return _product(graph, x, key, (count, width), storage, rows, ready)


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
    return graph.op("Clip", to_float(graph, x), scalar(graph, low, "low"), scalar(graph, high, "high"))


# --- products


def _product(
    graph: GraphBuilder,
    x: ir.Value,
    key: str,
    shape: tuple[int, int],
    storage: Storage,
    read: Callable[[], np.ndarray],
    ready: Callable[[Storage], Blocks | None],
) -> ir.Value:
    """x [..., in] times the transpose of the matrix `read` or `ready` gives, [out, in]: float32 [..., out]."""
    name = key.rsplit(".", 2)[-2]
    if storage.bits == 32:

        def floats() -> Iterator[np.ndarray]:
            yield read().T

        matrix = graph.weight(f"{key}.transposed", shape[::-1], floats)
        return graph.op("MatMul", to_float(graph, x), matrix, name=name)
    if storage.bits == 16:

        def halves() -> Iterator[np.ndarray]:
            matrix = read()
            graph.record(key, largest_row(matrix))
            yield as_half(key, matrix.T)

        matrix = graph.weight(f"{key}.transposed", shape[::-1], halves, FLOAT16)
        return half_product(graph, x, key, lambda half: graph.op("MatMul", half, matrix, name=name))

    def packed() -> Iterator[Blocks]:
        blocks = ready(storage)
        yield quantize(read(), storage.bits, storage.block) if blocks is None else blocks

    codes, scales = block_weights(graph, key, shape, storage, packed)
    return block_product(graph, x, key, shape, storage, codes, scales, name)


def block_product(
    graph: GraphBuilder,
    x: ir.Value,
    key: str,
    shape: tuple[int, int],
    storage: Storage,
    codes: ir.Value,
    scales: ir.Value,
    name: str,
) -> ir.Value:
    """x [..., in] times the transpose of a matrix [out, in] in blocks: float32 [..., out]."""

    def multiply(value: ir.Value) -> ir.Value:
        return graph.op(
            "MatMulNBits",
            *(value, codes, scales),
            domain=MICROSOFT,
            name=name,
            N=shape[0],
            K=shape[1],
            bits=storage.bits,
            block_size=storage.block,
            accuracy_level=graph.plan.accuracy_level,
        )

    return half_product(graph, x, key, multiply) if graph.plan.half else multiply(to_float(graph, x))


def half_product(graph: GraphBuilder, x: ir.Value, key: str, multiply: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """`multiply` in float16, with an input scaled so that no product can overflow."""
    if graph.is_half(x):
        return graph.op("Cast", multiply(x), to=int(FLOAT))  # the mean of values: see `blocks.attention`
    row = max(graph.recorded(key), 1.0)  # at least 1: the input itself must fit too
    bound = graph.bound(x)
    if bound is not None and bound * row <= HALF_LIMIT:
        return graph.op("Cast", multiply(graph.half(x)), to=int(FLOAT))
    length = graph.op("ReduceL2", x, graph.constant(np.array([-1], np.int64), "last_axis"), keepdims=1, name="length")
    factor = graph.op("Max", constant_scale(graph, length, row / HALF_LIMIT, "excess"), scalar(graph, 1.0, "one"))
    product = multiply(graph.op("Cast", graph.op("Div", x, factor), to=int(FLOAT16)))
    return graph.op("Mul", graph.op("Cast", product, to=int(FLOAT)), factor, name="rescale")


def as_half(key: str, values: np.ndarray) -> np.ndarray:
    largest, limit = float(np.abs(values).max(initial=0.0)), float(np.finfo(np.float16).max)
    if not largest <= limit:
        raise ExportError(f"weight {key!r} has an entry of {largest:g}; float16 ends at {limit:g}")
    return values.astype(np.float16)


def largest_row(matrix: np.ndarray) -> float:
    """The largest Euclidean length of a row."""
    return float(np.sqrt(np.einsum("ij,ij->i", matrix, matrix).max()))


def block_weights(
    graph: GraphBuilder,
    key: str,
    shape: tuple[int, int],
    storage: Storage,
    packed: Callable[[], Iterable[Blocks]],
) -> tuple[ir.Value, ir.Value]:
    """Codes uint8 [out, in / block, block * bits / 8] and scales [out, in / block] of a matrix given in row slices."""
    count = shape[1] // storage.block
    scales: list[np.ndarray] = []

    def codes() -> Iterator[np.ndarray]:
        largest = 0.0
        for blocks in packed():
            scales.append(as_half(f"{key}.scales", blocks.scales) if graph.plan.half else blocks.scales)
            if graph.plan.half:
                # |row| <= sqrt(sum over blocks of block * (largest code * scale)^2)
                peak = np.sqrt(storage.block) * 2 ** (storage.bits - 1)
                largest = max(largest, float(np.linalg.norm(blocks.scales, axis=1).max()) * peak)
            yield blocks.codes
        graph.record(key, largest)

    layout = (shape[0], count, storage.block * storage.bits // 8)
    stored = graph.weight(f"{key}.codes", layout, codes, UINT8)
    dtype = FLOAT16 if graph.plan.half else FLOAT
    return stored, graph.weight(f"{key}.scales", (shape[0], count), lambda: scales, dtype)


def _join(blocks: list[Blocks], order: np.ndarray | None) -> Blocks:
    codes = np.concatenate([part.codes for part in blocks])
    scales = np.concatenate([part.scales for part in blocks])
    if order is not None:
        codes, scales = codes[order], scales[order]
    return Blocks(blocks[0].bits, blocks[0].block, codes, scales)

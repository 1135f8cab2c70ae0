"""What onnxruntime's CUDA provider asks of a graph, checked without a GPU.

A graph that breaks one of `broken_rules` fails on a card, or runs there with wrong results or on the CPU.
`capture_obstacles` are what keeps its runs from being captured as a CUDA graph: control flow, and data that crosses
between host and device.

Source: the kernel registry and the error messages of the onnxruntime-gpu 1.31.1 wheel, its `docs/contrib_ops/cuda`,
and `core/framework/fallback_cpu_capability.cc` for which operators move to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from .builder import FLOAT16, MICROSOFT

__all__ = ["broken_rules", "capture_obstacles", "product_kernels"]

# Operators of our graphs that have CUDA kernels for the element types we use. `Unique` has none: where the experts of a
# layer are chosen it runs on the host, which costs a copy of a few numbers.
_ON_CUDA = frozenset(
    {
        *("Add", "And", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Cos", "Div", "Equal", "Expand", "Gather"),
        *(
            "GatherND",
            "Gelu",
            "Gemm",
            "Greater",
            "Identity",
            "LayerNormalization",
            "Less",
            "LessOrEqual",
            "Log",
            "Loop",
        ),
        *(
            "MatMul",
            "Max",
            "Min",
            "Mul",
            "Neg",
            "NonZero",
            "Not",
            "Or",
            "Pad",
            "Pow",
            "Range",
            "ReduceL2",
            "ReduceMean",
        ),
        *("ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "ScatterND", "Shape", "Sigmoid"),
        *("SimplifiedLayerNormalization", "Sin", "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh"),
        *("TopK", "Transpose", "Unsqueeze", "Where"),
    }
)
_ON_HOST = frozenset({"Unique"})
_MICROSOFT_ON_CUDA = frozenset(
    {
        *("GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "RotaryEmbedding"),
        "SkipSimplifiedLayerNormalization",
    }
)
# Inputs that CUDA kernels read on the host.
_HOST_INPUTS: dict[str, frozenset[int]] = {
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Expand", "TopK", "Split"), frozenset({1})),
    **dict.fromkeys(("ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"), frozenset({1})),
    "GroupQueryAttention": frozenset({6}),
    "Range": frozenset({0, 1, 2}),
    "Slice": frozenset({1, 2, 3, 4}),
    "ConstantOfShape": frozenset({0}),
    "Pad": frozenset({1, 2, 3}),
}
_SMALL = 100  # elements of an initializer that an operator may take along to the host


def broken_rules(graph: ir.Graph) -> list[str]:
    """Every rule that a node of `graph` or of a loop's body breaks, with the node's name. Empty for a good graph."""
    return [f"{node.name}: {text}" for node in _nodes(graph) for text in _broken(node)]


def _broken(node: ir.Node) -> Iterator[str]:
    known = _MICROSOFT_ON_CUDA if node.domain == MICROSOFT else _ON_CUDA | _ON_HOST
    if node.op_type not in known:
        yield f"{node.op_type} is not known to have a CUDA kernel"
    if node.op_type == "GroupQueryAttention":
        yield from _attention(node)
    elif node.op_type == "MatMulNBits":
        # The operator has one type for both; the input's is not always noted in the graph.
        types = {value.dtype for value in (node.inputs[0], node.inputs[2]) if value is not None}
        if types - {None} != {FLOAT16}:
            yield f"scales and input must be float16 for the fast kernels, here they are {types}"
    elif node.op_type.endswith("LayerNormalization") and any(_has_type(value, FLOAT16) for value in node.inputs):
        # Sums of squares in float16 end at 65504 (onnxruntime issue 29034), and so does a residual stream.
        yield f"{node.op_type} in float16; norms and the residual stream must be float32"


def _attention(node: ir.Node) -> Iterator[str]:
    query, key, past, bias = (node.inputs[index] if index < len(node.inputs) else None for index in (0, 1, 3, 10))
    for value in (query, key, past, bias):
        if value is not None and value.dtype not in (None, FLOAT16):
            yield f"attention takes float16, {value.name!r} is {value.dtype}"
    if not _has_type(past, FLOAT16):
        yield "the type of the state is not float16"
    assert past is not None
    assert past.shape is not None
    window, rows, size = _attribute(node, "local_window_size", -1), past.shape[2], past.shape[3]
    if not isinstance(size, int) or size % 8:
        yield f"the head size is {size}, it must be a multiple of 8"
    if _attribute(node, "sliding_window_cache", 0):
        if rows != window:
            yield f"a window of {window} in a buffer of {rows} rows; CUDA takes exactly the window"
        if bias is not None:
            yield "a mask with a window buffer"
    if not _attribute(node, "causal", 1) and window != -1:
        yield "a local window without causal attention"
    shape = None if key is None else key.shape
    if shape is not None and shape[1] == 0 and any(output.name for output in node.outputs[1:]):
        yield "layers that read the state of another one must not give it out: that copies it"


def capture_obstacles(graph: ir.Graph) -> list[str]:
    """What keeps runs of `graph` from being captured, with the name of the node. Empty if nothing is known to."""
    found: list[str] = []
    host: set[ir.Value] = {value for value in graph.inputs if value.name == "total_sequence_length"}
    made_on_host: set[ir.Value] = set()
    for node in graph:
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            found.append(f"{node.name}: control flow")
            continue
        if node.op_type in _ON_HOST:
            found.append(f"{node.name}: {node.op_type} runs on the host")
            continue
        if node.op_type in ("Shape", "Size"):
            made_on_host.update(node.outputs)
            continue
        if _moves_to_host(node, host, made_on_host):
            made_on_host.update(node.outputs)
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.is_initializer():
                continue
            reads_host = index in _HOST_INPUTS.get(node.op_type, frozenset())
            if reads_host != (value in host | made_on_host):
                found.append(
                    f"{node.name}: {value.name!r} has to be copied to the {'host' if reads_host else 'device'}"
                )
    return found


def _moves_to_host(node: ir.Node, host: set[ir.Value], made_on_host: set[ir.Value]) -> bool:
    """Whether the node depends on the host alone, on a result there (an input of the graph does not draw it there)."""
    values = [value for value in node.inputs if value is not None]
    draws = [value in made_on_host for value in values]
    kept = _HOST_INPUTS.get(node.op_type, frozenset())
    if any(is_drawn and index in kept for index, is_drawn in enumerate(draws)):
        return False  # the CUDA kernel reads it there anyhow
    return any(draws) and all(
        value in made_on_host or value in host or (value.is_initializer() and _elements(value) <= _SMALL)
        for value in values
    )


def product_kernels(graph: ir.Graph) -> Counter[str]:
    """How many block-quantised products can use which kernel, and how many bytes of codes they read.

    "fpA_intB" (prefill and decode, if switched on: ORT_FPA_INTB_GEMM=1) takes blocks of 32, rows in multiples of 64 (4
    bits) or 32 (8 bits), in the kernels that the wheel has. The "fused" kernel for up to 16 rows takes multiples of 8.
    What has neither is turned into float16 and multiplied by cuBLAS, at every step.
    """
    counts: Counter[str] = Counter()
    for node in _nodes(graph):
        if node.op_type != "MatMulNBits":
            continue
        rows, columns, bits, block = (_attribute(node, name, 0) for name in ("N", "K", "bits", "block_size"))
        plain = len([value for value in node.inputs if value is not None]) == 3  # neither zero points nor bias
        fused = plain and bits in (4, 8) and rows % 8 == 0 and columns % 8 == 0
        kernels = {"fpA_intB": fused and block == 32 and rows % {4: 64, 8: 32}[bits] == 0, "fused": fused}
        for name in [name for name, fits in kernels.items() if fits] or ["dequantised"]:
            counts[name] += 1
            counts[f"{name} bytes"] += rows * columns * bits // 8
        counts["products"] += 1
    return counts


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(graph))


def _has_type(value: ir.Value | None, dtype: ir.DataType) -> bool:
    return value is not None and value.dtype == dtype


def _attribute(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.value)


def _elements(value: ir.Value) -> int:
    assert value.shape is not None
    count = 1
    for side in value.shape.numpy():
        count *= side
    return count

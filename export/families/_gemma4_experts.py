"""The experts of Gemma 4 26B-A4B: a router, and a loop over the experts that the rows of a chunk use.

Formulas: transformers `modeling_gemma4.py` (Gemma4TextRouter, Gemma4TextExperts).

Shapes in comments: R rows, D hidden size, E experts, K experts per row, I intermediate size of an expert.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .. import blocks
from ..builder import GraphBuilder
from ..checkpoint import Weights
from ._gemma4_config import ExpertFacts

__all__ = ["routed_experts"]


def routed_experts(
    graph: GraphBuilder,
    weights: Weights,
    prefix: str,
    facts: ExpertFacts,
    hidden: int,
    x: ir.Value,
    residual: ir.Value,
) -> ir.Value:
    """Sum over the experts e that a row chose of share_e * down_e(gelu_tanh(gate_e(x)) * up_e(x)): [1, R, D].

    `x` is the normed input of the experts, `residual` what the router reads, both [1, R, D].
    """
    with graph.scope("experts"):
        chosen, shares = _route(graph, weights, f"{prefix}.router", facts, hidden, residual)
        inner = facts.intermediate
        gate_up, down = (
            blocks.table(graph, weights, f"{prefix}.experts.{name}", f"{prefix}.experts.{name}", shape, facts.count)
            for name, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner)))
        )
        flat = graph.op("Reshape", x, graph.constant(np.array([-1, hidden], np.int64), "rows_shape"))
        flat = graph.set_bound(flat, graph.bound(x))
        used = graph.op("Unique", chosen, name="used")
        zeros = graph.op("ConstantOfShape", graph.op("Shape", flat), name="zeros")

        def add_expert(index: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            expert = graph.op("Gather", used, index, name="expert")
            places = graph.op("NonZero", graph.op("Equal", chosen, expert), name="places")  # [2, n]: row, rank
            zero, one = (graph.constant(np.array(axis, np.int64), f"axis_{axis}") for axis in (0, 1))
            rows = graph.op("Gather", places, zero, name="rows")
            share = graph.op("GatherND", shares, graph.op("Transpose", places), name="share")
            part = graph.set_bound(graph.op("Gather", flat, rows, name="take_rows"), graph.bound(x))
            both = blocks.stack_product(graph, part, gate_up, expert, "gate_up_proj")
            gate, up = graph.ops("Split", [both], 2, name="split_gate_up", axis=-1, num_outputs=2)
            product = graph.op("Mul", graph.op("Gelu", gate, approximate="tanh"), up)
            y = blocks.stack_product(graph, product, down, expert, "down_proj")
            y = graph.op("Mul", y, graph.op("Unsqueeze", share, one))
            # A row chooses an expert once, so no two of `rows` are the same.
            indices = graph.op("Unsqueeze", rows, one)
            return [graph.op("ScatterND", *carried, indices, y, name="add", reduction="add")]

        [total] = graph.loop(graph.op("Size", used), [zeros], add_expert, "loop")
        return graph.op("Reshape", total, graph.op("Shape", x))


def _route(
    graph: GraphBuilder, weights: Weights, prefix: str, facts: ExpertFacts, hidden: int, residual: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """The experts of every row, int64 [R, K], and their shares, float32 [R, K].

    p = softmax(proj(norm(residual) * scale / sqrt(D))) over all experts; the shares of the K best are renormalised to
    sum 1 and then multiplied by a scale of each expert.
    """
    scale = graph.weight(
        f"{prefix}.scale.over_sqrt",
        (hidden,),
        lambda: [weights.read(f"{prefix}.scale", (hidden,)) * np.float32(hidden**-0.5)],
    )
    normed = blocks.rms_norm(graph, residual, scale, "router_norm")
    # Always float32: the matrix is small, and a rounded score can choose another expert.
    name, shape = f"{prefix}.proj.weight", (facts.count, hidden)
    matrix = graph.weight(f"{name}.transposed", shape[::-1], lambda: [weights.read(name, shape).T])
    probabilities = graph.op("Softmax", graph.op("MatMul", normed, matrix, name="router"), axis=-1)
    flat = graph.op("Reshape", probabilities, graph.constant(np.array([-1, facts.count], np.int64), "router_shape"))
    best, chosen = graph.ops(
        "TopK", [flat, graph.constant(np.array([facts.used], np.int64), "used_experts")], 2, name="top"
    )
    last = graph.constant(np.array([-1], np.int64), "last_axis")
    shares = graph.op("Div", best, graph.op("ReduceSum", best, last, keepdims=1), name="renormalise")
    per_expert = graph.weight(
        f"{prefix}.per_expert_scale",
        (facts.count,),
        lambda: [weights.read(f"{prefix}.per_expert_scale", (facts.count,))],
    )
    return chosen, graph.op("Mul", shares, graph.op("Gather", per_expert, chosen), name="shares")

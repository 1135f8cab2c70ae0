"""What must stay in float32 in a float16 bundle (facts 0.12): checkpoints whose numbers do not fit into float16."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from siglance.export import matrices
from siglance.export.builder import FLOAT, FLOAT16, GraphBuilder

from .edits import around, replaced, then
from .mutant import Mutant
from .probes import HALF_LOGITS, HALF_SOFT_TOKENS


def _through_half(graph: GraphBuilder, value: ir.Value) -> ir.Value:
    return graph.op("Cast", graph.op("Cast", value, to=int(FLOAT16)), to=int(FLOAT))


def _stream_in_half(graph: GraphBuilder, inputs: list[Any], build: Any) -> list[ir.Value]:
    """The sum that a norm passes on is rounded to float16."""
    *others, total = build()
    return [*others, _through_half(graph, total)]


def _norm_of_half(graph: GraphBuilder, inputs: list[Any], build: Any) -> list[ir.Value]:
    x, residual, weight = inputs
    return build(_through_half(graph, x), _through_half(graph, residual), weight)


def _plain_product(right: Any) -> Any:
    """The product in float16 without the factor that keeps it in range."""
    return lambda graph, x, key, multiply: graph.op("Cast", multiply(graph.half(x)), to=int(FLOAT))


HALVES = "0.12 float32 around float16 products"
NOT_FINITE = "ModelOutputError.*not finite"
NEXT_NORM = r"decoder/layers\.\d+/(next_norm|pre_feedforward)"
MUTANTS = [
    Mutant(
        HALVES, "Gemma 3, residual", "the residual stream is float16", around(NEXT_NORM, _stream_in_half), HALF_LOGITS
    ),
    Mutant(HALVES, "Gemma 3, residual", "norms read float16", around(NEXT_NORM, _norm_of_half), HALF_LOGITS),
    Mutant(
        *(HALVES, "Gemma 3, norm output", "norms write float16"),
        then(r"decoder/layers\.\d+/pre_feedforward", _through_half),
        HALF_LOGITS,
    ),
    *(
        Mutant(
            HALVES, layout, "products are not scaled", replaced(matrices, "half_product", _plain_product), HALF_LOGITS
        )
        for layout in ("Gemma 3, gated product", "Gemma 3, norm output")
    ),
    Mutant(
        *(HALVES, "12B, large embedder", "products are not scaled"),
        *(replaced(matrices, "half_product", _plain_product), HALF_SOFT_TOKENS),
        refusal=NOT_FINITE,
    ),
    Mutant(
        *(HALVES, "12B, large embedder", "the embedder's layer writes float16"),
        *(then("vision/Add", _through_half), HALF_SOFT_TOKENS),
        refusal=NOT_FINITE,
    ),
    Mutant(
        *(HALVES, "Gemma 3, gated product", "the product of gate and up is float16"),
        around(r"decoder/layers\.\d+/Mul", lambda graph, inputs, build: _through_half(graph, build()[0])),
        HALF_LOGITS,
    ),
    *(
        Mutant(
            *(
                HALVES,
                "31B, large features",
                f"{name} float16",
                then(f"vision/{node}", _through_half),
                HALF_SOFT_TOKENS,
            ),
            refusal=NOT_FINITE,
        )
        for name, node in {
            "the stream of the tower is": r"layers\.\d+/Add",
            "the scaled mean is": "scale_pooled",
            "the difference to the biases is": "Sub",
        }.items()
    ),
]

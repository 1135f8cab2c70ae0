"""The decoder that calibration runs: its matrix products, and its inputs for a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .calibration_corpus import SEQUENCE
from .piecewise import LazyGraph, Piecewise, Values

__all__ = ["Product", "embedded", "exact_logits", "head_outputs", "products_of", "sequence_length"]


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of the decoder: node `at` computes `output` from `input` and the matrix `key` [rows, columns],
    which the graph stores as `weight`, transposed or not."""

    at: int
    input: str
    output: str
    key: str
    weight: str
    shape: tuple[int, int]


def products_of(decoder: LazyGraph) -> list[Product]:
    """The matrix products of the graph in order; the head is the last. Those nested in loops are left out."""
    found = []
    for at, node in enumerate(decoder.graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        x, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type not in ("MatMul", "Gemm") or weight is None or x is None or not decoder.is_weight(weight):
            continue
        assert weight.name is not None
        assert x.name is not None
        assert output.name is not None
        key = weight.name.removesuffix(".transposed")
        if key not in decoder.survey.seen:
            continue  # a matrix that is always stored as floats, such as a router
        first, second = decoder.shape(weight.name)
        # MatMul stores a matrix transposed; the head is multiplied as the table it usually is.
        shape = (second, first) if node.op_type == "MatMul" else (first, second)
        found.append(Product(at, x.name, output.name, key, weight.name, shape))
    return found


def sequence_length(decoder: LazyGraph) -> int:
    """The longest sequence that all layers take at once with the logits of all rows.

    Layers that share a window's state (Gemma 4 E2B, E4B) take no more rows than it holds; up to there they are causal.
    """
    sizes = [SEQUENCE]
    for value in decoder.graph.inputs:
        if value.name and value.name.startswith("past.") and value.shape is not None:
            size = value.shape[2]
            sizes += [size] if isinstance(size, int) else []
    return min(sizes)


def embedded(
    embed: LazyGraph,
    decoder: LazyGraph,
    sequences: Sequence[Sequence[int]],
    weights: Values | None = None,
) -> list[Values]:
    """The decoder's inputs for `sequences` of ids; `weights` replaces weights of the embedding graph."""
    values: list[Values] = [{"input_ids": np.array([ids], np.int64)} for ids in sequences]
    piecewise = Piecewise(embed, values)
    piecewise.run(len(piecewise.nodes), replaced=lambda index: weights or {})
    wanted = {value.name for value in decoder.graph.inputs}
    for ids, made in zip(sequences, values, strict=True):
        made |= sequence_inputs(len(ids))
        for name in made.keys() - wanted:
            del made[name]
    return values


def sequence_inputs(length: int) -> Values:
    """What the engine would make for a text of this length, run at once with the logits of all rows."""
    return {
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logit_rows": np.arange(length),
        "block_ends": np.zeros(length, np.int64),  # text is causal
    }


def exact_logits(decoder: LazyGraph, sequences: list[Values]) -> list[np.ndarray]:
    """The logits of the rows that each sequence of inputs asks for, [rows, V]; never with the whole head in memory."""
    piecewise = Piecewise(decoder, sequences)
    head = products_of(decoder)[-1]
    piecewise.advance(head.at)
    hidden = [values[head.input].reshape(-1, head.shape[1]) for values in sequences]
    parts: list[list[np.ndarray]] = [[] for _ in sequences]
    for rows in decoder.read_rows(head.weight):
        for own, x in zip(parts, hidden, strict=True):
            own.append(x @ rows.T)
    return [head_outputs(piecewise, head, np.concatenate(own, axis=1)) for own in parts]


def head_outputs(piecewise: Piecewise, head: Product, products: np.ndarray) -> np.ndarray:
    """Logits from the outputs of the head's matrix: what the nodes after it make of them, such as a soft cap."""
    piecewise.at = head.at + 1
    piecewise.sequences = [{head.output: products}]
    piecewise.run(len(piecewise.nodes))
    # The head's own outputs have that name if no node follows.
    return piecewise.sequences[0].get("logits", products)
